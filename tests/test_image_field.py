"""Laws of the field of a photograph: a hash grid that equals a slow one, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import SMALL
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.field import Field, HashGrid
from nerfstudio_softmining.plugin import compat

LAW = settings(max_examples=40, deadline=None, derandomize=True)
GRIDS = {
    "direct": dict(levels=3, features=2, log2_size=12, coarsest=4, growth=2.4),
    "hashed": dict(levels=4, features=3, log2_size=4, coarsest=5, growth=3.42),
    "both": dict(levels=6, features=2, log2_size=9, coarsest=3, growth=3.98),
    "one level": dict(levels=1, features=1, log2_size=8, coarsest=7, growth=1.5),
    "one cell": dict(levels=2, features=2, log2_size=1, coarsest=1, growth=1.0),
}
EACH_GRID = pytest.mark.parametrize("name", GRIDS)


def make_grid(name: str) -> HashGrid:
    """A grid in double precision whose entries are far from zero."""
    torch.manual_seed(0)
    grid = HashGrid(**GRIDS[name]).double()
    torch.nn.init.normal_(grid.table)
    return grid


def resolutions(levels: int, coarsest: int, growth: float, **_) -> list[int]:
    """Cells along each side of the levels, a geometric series."""
    return [round(coarsest * growth**level) for level in range(levels)]


def slow(table: Tensor, points: Tensor, *, levels, features, log2_size, coarsest, growth) -> Tensor:
    """The encoding by loops: all first features of the levels, then all second ones, ..."""
    result, start = torch.zeros(len(points), features, levels).double(), 0
    for level, resolution in enumerate(resolutions(levels, coarsest, growth)):
        stride = resolution + 2
        direct = stride**2 <= 2**log2_size
        for n, (row, column) in enumerate(points.tolist()):
            row, column = row * resolution, column * resolution
            for r in (int(row), int(row) + 1):
                for c in (int(column), int(column) + 1):
                    entry = r * stride + c if direct else (r ^ (c * 2654435761)) % 2**log2_size
                    weight = (1 - abs(row - r)) * (1 - abs(column - c))
                    result[n, :, level] += weight * table[:, start + entry]
        start += stride**2 if direct else 2**log2_size
    assert start == table.shape[1]
    return result.flatten(1)


def points_within_cells(name: str, count: int = 40) -> Tensor:
    """Points that are off the borders of the cells of all levels."""
    points = torch.rand(20 * count, 2, generator=torch.Generator().manual_seed(1)).double()
    inside = torch.ones(len(points)).bool()
    for resolution in resolutions(**GRIDS[name]):
        fraction = points * resolution % 1
        inside &= ((fraction > 0.02) & (fraction < 0.98)).all(dim=-1)
    assert inside.sum() >= count
    return points[inside][:count]


@EACH_GRID
def test_the_hash_grid_equals_a_slow_one(name):
    grid = make_grid(name)
    corners = torch.tensor([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.3), (0.5, 0.5)]).double()
    points = torch.cat((torch.rand(60, 2, generator=torch.Generator().manual_seed(2)).double(), corners))
    expected = slow(grid.table.detach(), points, **GRIDS[name])
    assert grid.num_features == expected.shape[1] and expected.abs().mean() > 0.1
    torch.testing.assert_close(grid(points).detach(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grid.float()(points.float()).detach().double(), expected, rtol=0, atol=5e-3)


@EACH_GRID
def test_its_gradients_are_those_of_finite_differences(name):
    grid, points = make_grid(name), points_within_cells(name, 8).requires_grad_()

    def encoding(table: Tensor, points: Tensor) -> Tensor:
        return torch.func.functional_call(grid, {"table": table}, (points,))

    table = grid.table.detach()[:, :600].clone().requires_grad_()
    rest = grid.table.detach()[:, 600:]
    assert torch.autograd.gradcheck(lambda part, at: encoding(torch.cat((part, rest), dim=1), at), (table, points))
    assert torch.autograd.gradcheck(lambda at: encoding(grid.table.detach(), at), points)


@EACH_GRID
def test_each_gradient_is_the_same_without_the_other(name):
    grid, points = make_grid(name), points_within_cells(name)
    both = points.clone().requires_grad_()
    of_table, of_points = torch.autograd.grad(grid(both).square().sum(), (grid.table, both))
    (alone,) = torch.autograd.grad(grid(points).square().sum(), grid.table)
    assert torch.equal(alone, of_table)
    grid.requires_grad_(False)
    (alone,) = torch.autograd.grad(grid(both).square().sum(), both)
    assert torch.equal(alone, of_points)


@EACH_GRID
@pytest.mark.parametrize("num_moving", [0, 1, 17])
def test_points_that_do_not_move_have_no_gradient(name, num_moving):
    grid, points = make_grid(name), points_within_cells(name).requires_grad_()
    of_all, of_some = (
        torch.autograd.grad(grid(points, number).square().sum(), (grid.table, points)) for number in (None, num_moving)
    )
    assert torch.equal(of_some[0], of_all[0])
    torch.testing.assert_close(of_some[1][:num_moving], of_all[1][:num_moving])
    assert of_all[1].any(dim=1).all() and not of_some[1][num_moving:].any()


@EACH_GRID
def test_features_are_continuous_across_the_borders_of_cells(name):
    grid, generator = make_grid(name), torch.Generator().manual_seed(3)
    for resolution in resolutions(**GRIDS[name]):
        border = torch.randint(resolution + 1, (20, 2), generator=generator) / resolution
        other = torch.rand(20, 2, generator=generator).double()
        for axis in range(2):
            points = other.clone()
            points[:, axis] = border[:, axis].double()
            either = [points.clone(), points.clone()]
            either[0][:, axis] = (points[:, axis] - 1e-9).clamp_min(0)
            either[1][:, axis] = (points[:, axis] + 1e-9).clamp_max(1)
            before, after = (grid(part) for part in either)
            assert (before - after).abs().max() < 1e-7 * max(resolutions(**GRIDS[name]))


@LAW
@given(st.integers(1, 40), st.integers(1, 64), st.floats(1, 4))
def test_levels_grow_from_the_coarsest_as_far_as_places_differ(levels, coarsest, growth):
    grid = HashGrid(levels, 1, 4, coarsest, growth)
    cells = grid.resolution.flatten().tolist()
    assert cells[0] == coarsest and len(cells) == levels and cells == sorted(cells) and cells[-1] <= 2**24
    for finer, coarser in zip(cells[1:], cells, strict=False):
        assert abs(finer - coarser * growth) <= (1 + growth) / 2 + 1 or finer == 2**24  # rounding
    assert grid(torch.rand(5, 2)).isfinite().all()


def test_cells_of_the_finest_level_are_equal_and_as_many_as_growth_says():
    field = Field(FitConfig(**SMALL, base_resolution=8, growth=1.5), 3, torch.device("cpu"))
    cells = 27
    assert field.encoding.resolution[-1] == cells
    grid = field.encoding.double()
    torch.nn.init.zeros_(grid.table)
    torch.nn.init.normal_(grid.table[:, int(grid.start[-1]) :])
    along = torch.arange(6 * cells + 1).double() / (6 * cells)
    features = grid(torch.stack((along, torch.full_like(along, 0.4)), dim=-1)).detach()[:, grid.num_features // 2 - 1]
    bend = (features[2:] - 2 * features[1:-1] + features[:-2]).abs() > 1e-9
    assert (bend.nonzero()[:, 0] + 1).remainder(6).eq(0).all() and bend.sum() > 0.7 * (cells - 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_field_has_a_value_everywhere_and_all_of_it_learns(channels):
    torch.manual_seed(0)
    field = Field(FitConfig(**SMALL), channels, torch.device("cpu"))
    points = torch.cat((torch.rand(500, 2), torch.tensor([(0.0, 0.0), (1.0, 1.0)])))
    values = field(points)
    assert values.shape == (502, channels) and values.dtype == torch.float32 and values.isfinite().all()
    values.square().mean().backward()
    assert all(part.grad is not None and part.grad.any() for part in field.parameters())


def test_tiny_cuda_nn_that_can_not_be_had_is_a_users_mistake(monkeypatch):
    monkeypatch.setattr(compat, "implementation", lambda: "torch")
    with pytest.raises(UserError, match="--implementation is tcnn.*auto"):
        Field(FitConfig(**SMALL, implementation="tcnn"), 3, torch.device("cpu"))
    for wanted in ("auto", "torch"):
        field = Field(FitConfig(**SMALL, implementation=wanted), 3, torch.device("cpu"))
        assert field.implementation == "torch"


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"batch": 0}, "--batch"),
        ({"levels": 0}, "--levels"),
        ({"features": -1}, "--features"),
        ({"log2_hashmap_size": 0}, "--log2-hashmap-size"),
        ({"log2_hashmap_size": 25}, "--log2-hashmap-size"),
        ({"base_resolution": 0}, "--base-resolution"),
        ({"growth": 0.9}, "--growth"),
        ({"growth": math.inf}, "--growth"),
        ({"width": 0}, "--width"),
        ({"alpha": -0.1}, "--alpha"),
        ({"alpha": 1.5}, "--alpha"),
        ({"alpha": math.nan}, "--alpha"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": math.nan}, "--learning-rate"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, flag):
    with pytest.raises(UserError, match=f"{flag} is "):
        FitConfig(**changes)
