"""Settings of any dataclass at, within and beyond the bounds annotated on its fields, for tests by hypothesis."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.settings import Interval

CAPS = {
    "batch": 4096,
    "num_rays_per_batch": 4096,
    "train_num_rays_per_batch": 1024,
    "eval_num_rays_per_batch": 1024,
    "log2_hashmap_size": 12,
    "levels": 16,
    "features": 4,
    "width": 128,
    "camera_res_scale_factor": 4.0,
    "max_num_iterations": 100,
}
"""Largest values that are tried where larger ones cost memory or time, and nothing else."""
NO_BOUNDS = Interval(-sys.float_info.max)
BEYOND = (-math.inf, -sys.float_info.max, -1.0, -5e-324, 0.0, 2.0, 1e30, math.inf, math.nan)
SECONDS = 60
"""Time after which a case hangs."""


def in_bounds(name: str, hint: Any, bounds: Interval = NO_BOUNDS) -> SearchStrategy | None:
    """Values that the type of a field allows, its ends among them; None for what is no number, choice or truth."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        marks = [mark for mark in arguments[1:] if isinstance(mark, Interval)]
        return in_bounds(name, arguments[0], marks[0] if marks else bounds)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, UnionType):
        parts = [in_bounds(name, part, bounds) for part in arguments if part is not NoneType]
        known = [part for part in parts if part is not None]
        return st.one_of(st.none(), *known) if NoneType in arguments and len(known) == len(parts) else None
    if origin is tuple:
        part = in_bounds(name, arguments[0], bounds)
        return None if part is None else st.lists(part, max_size=3).map(tuple)
    if hint is bool:
        return st.booleans()
    low, high = bounds.low, min(bounds.high, CAPS.get(name, sys.float_info.max))
    if hint is int:
        low, high = int(max(low, -(1 << 31))), int(min(high, 1 << 62))
        usual = st.integers(low, min(high, max(low, 0) + 64))
        return st.one_of(usual, usual, st.sampled_from((low, high)))
    if hint is float:
        low = math.nextafter(low, math.inf) if bounds.excludes_low else low
        low, high = float(low), float(high)
        low_usual, high_usual = max(low, -10.0), min(high, 10.0)
        ends = [low, high, *(value for value in (1e-30, 1e-6, 1e30) if low <= value <= high)]
        usual = st.integers(0, 100).map(lambda percent: low_usual + (high_usual - low_usual) * percent / 100)
        return st.one_of(usual, usual, st.sampled_from(ends), st.floats(low_usual, high_usual))
    return None


def beyond(hint: Any, bounds: Interval = NO_BOUNDS) -> SearchStrategy | None:
    """Values that bounds rule out or that no bounds mention; None where any value of the type is as good."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return beyond(arguments[0], next(mark for mark in arguments[1:] if isinstance(mark, Interval)))
    if origin is Literal:
        return st.just("nonsense")
    if origin in (Union, UnionType):
        parts = [beyond(part, bounds) for part in arguments if part is not NoneType]
        return next((part for part in parts if part is not None), None)
    if hint is int:
        whole = [int(value) for value in BEYOND if math.isfinite(value)] + [10**400]
        ends = [int(end) + step for end in (bounds.low, bounds.high) if math.isfinite(end) for step in (-1, 1)]
        return st.sampled_from([value for value in whole + ends if not bounds.contains(value)] or [-1])
    if hint is float:
        ends = [
            math.nextafter(end, away)
            for end, away in ((bounds.low, -math.inf), (bounds.high, math.inf))
            if math.isfinite(end)
        ]
        return st.sampled_from([value for value in (*BEYOND, *ends) if not bounds.contains(value)])
    return None


@st.composite
def changes(draw, *configs: type, but_for: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Values of some fields of each dataclass. In a third of the cases, one of them is ruled out by its type."""
    drawn, spoilt = [], []
    for number, config in enumerate(configs):
        hints = get_type_hints(config, include_extras=True)
        names = [field.name for field in fields(config) if field.init and field.name not in but_for]
        good = {name: strategy for name in names if (strategy := in_bounds(name, hints[name])) is not None}
        drawn.append(draw(st.fixed_dictionaries({}, optional=good)))
        spoilt += [(number, name, bad) for name in good if (bad := beyond(hints[name])) is not None]
    if spoilt and draw(st.integers(0, 99)) > 66:
        number, name, bad = draw(st.sampled_from(spoilt))
        drawn[number][name] = draw(bad)
    return drawn


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Fail what takes more than a minute."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"hangs for {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def try_settings(count: int, cases: SearchStrategy, train: Callable[[Any], None], names: Callable) -> Counter[str]:
    """Train with each of many settings: it works, or an error names one of the settings that were changed.

    Args:
        count: number of cases.
        cases: the settings.
        train: trains with a case, and asserts that all is finite.
        names: gives the settings of a case that its error may name.

    Returns:
        How many cases were trained, and how many refused.
    """
    tally: Counter[str] = Counter()

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases)
    def run(case: Any) -> None:
        try:
            with no_hang(), contextlib.redirect_stdout(io.StringIO()):
                train(case)
            tally["trained"] += 1
        except UserError as error:
            message = str(error).replace("-", "_")
            assert any(name.replace("-", "_") in message for name in names(case)), message
            tally["refused"] += 1
        finally:
            torch.set_flush_denormal(False)  # which training sets, and hypothesis needs off

    run()
    print(dict(tally))
    return tally
