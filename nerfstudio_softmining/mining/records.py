"""Index, join and choose among records: named tuples of tensors that share their first dimension."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

Record = TypeVar("Record", bound=tuple)
"""A NamedTuple of tensors."""


def take(record: Record, index: Any) -> Record:
    """Index all fields of a record at once.

    >>> from typing import NamedTuple
    >>> class Points(NamedTuple):
    ...     x: Tensor
    ...     y: Tensor
    >>> take(Points(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])), slice(1, None))
    Points(x=tensor([2, 3]), y=tensor([5, 6]))
    """
    return type(record)(*(field[index] for field in record))


def concatenate(*records: Record, dim: int = 0) -> Record:
    """Join records of one type along a dimension, field by field.

    >>> from typing import NamedTuple
    >>> class Points(NamedTuple):
    ...     x: Tensor
    >>> concatenate(Points(torch.tensor([1])), Points(torch.tensor([2, 3])))
    Points(x=tensor([1, 2, 3]))
    """
    return type(records[0])(*(torch.cat(fields, dim=dim) for fields in zip(*records, strict=True)))


def unflatten(record: Record, shape: tuple[int, int]) -> Record:
    """Split the first dimension of all fields into two, as `Tensor.unflatten`; one of them may be -1.

    >>> from typing import NamedTuple
    >>> class Points(NamedTuple):
    ...     x: Tensor
    >>> unflatten(Points(torch.tensor([1, 2, 3, 4])), (2, -1))
    Points(x=tensor([[1, 2],
            [3, 4]]))
    """
    return type(record)(*(field.unflatten(0, shape) for field in record))


def flatten(record: Record) -> Record:
    """Join the first two dimensions of all fields, which undoes [unflatten][].

    >>> from typing import NamedTuple
    >>> class Points(NamedTuple):
    ...     x: Tensor
    >>> flatten(Points(torch.tensor([[1, 2], [3, 4]])))
    Points(x=tensor([1, 2, 3, 4]))
    """
    return type(record)(*(field.flatten(0, 1) for field in record))


def where(condition: Bool[Tensor, "*n"], chosen: Record, other: Record) -> Record:
    """Choose entries of one record where a condition holds, else those of another.

    Args:
        condition: one value for each entry, or a single one for all.
        chosen: the record where the condition is true.
        other: the record where it is false.

    >>> from typing import NamedTuple
    >>> class Points(NamedTuple):
    ...     x: Tensor
    >>> where(torch.tensor([True, False]), Points(torch.tensor([1, 2])), Points(torch.tensor([3, 4])))
    Points(x=tensor([1, 4]))
    """
    fields = (
        torch.where(condition.view(*condition.shape, *[1] * (a.dim() - condition.dim())), a, b)
        for a, b in zip(chosen, other, strict=True)
    )
    return type(chosen)(*fields)
