"""A coarse map of the error of each image, as instant-ngp keeps it.

Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", SIGGRAPH 2022; the constants
are those of its released code.
"""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

CELLS_PER_ROOT = 3.5
"""Rows and columns of a map are this many times the fourth root of the samples that it is made from."""
CELL_FLOOR = 0.01
"""Fraction of the draws within an image that is uniform over its rows, and within a row over its columns."""
IMAGE_FLOOR = 0.1
"""Fraction of the draws that is uniform over the images."""
EPSILON = 1e-30
"""Added to all errors, so that draws are uniform without any. A denormal number could be flushed to zero."""


def resolution(samples: float) -> int:
    """Return the rows and columns of a map that the given number of samples of each image can fill.

    >>> resolution(128 * 4096 / 100)
    29
    """
    return max(1, int(samples**0.25 * CELLS_PER_ROOT))


def deposit(
    error: Float[Tensor, "images rows columns"],
    image_index: Int64[Tensor, " n"],
    position: Float[Tensor, "n 2"],
    value: Float[Tensor, " n"],
) -> None:
    """Add values to the map in place, each bilinearly to the four cells whose centres surround it.

    Args:
        error: the map.
        image_index: image of each sample.
        position: position of each sample there, (row, column) in [0, 1].
        value: error of each sample divided by the density it was drawn with.

    >>> import torch
    >>> error = torch.zeros(1, 1, 2)
    >>> deposit(error, torch.tensor([0]), torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]))
    >>> error
    tensor([[[0.5000, 0.5000]]])
    """
    _, rows, columns = error.shape
    place = [(position[:, axis] * size - 0.5).clamp(0, size - 1) for axis, size in enumerate((rows, columns))]
    row, column = (along.long() for along in place)
    down, across = place[0] - row, place[1] - column
    for row_step, row_fraction in ((0, 1 - down), (1, down)):
        for column_step, column_fraction in ((0, 1 - across), (1, across)):
            # past the last row or column the fraction is 0
            index = (image_index, (row + row_step).clamp_max(rows - 1), (column + column_step).clamp_max(columns - 1))
            error.index_put_(index, row_fraction * column_fraction * value, accumulate=True)


def probabilities(error: Float[Tensor, "images rows columns"]) -> Float[Tensor, "images rows columns"]:
    """Compute the probability of drawing each cell from its error and the floors of images, rows and columns.

    >>> import torch
    >>> probabilities(torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]))
    tensor([[[0.0025, 0.4975]],
    <BLANKLINE>
            [[0.4975, 0.0025]]])
    """
    error = error + EPSILON
    row_sum, image_sum = error.sum(dim=2), error.sum(dim=(1, 2))
    images, rows, columns = error.shape
    image = (1 - IMAGE_FLOOR) * image_sum / image_sum.sum() + IMAGE_FLOOR / images
    row = (1 - CELL_FLOOR) * row_sum / image_sum[:, None] + CELL_FLOOR / rows
    column = (1 - CELL_FLOOR) * error / row_sum[:, :, None] + CELL_FLOOR / columns
    return image[:, None, None] * row[:, :, None] * column
