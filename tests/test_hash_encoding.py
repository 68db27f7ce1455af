"""The quick hash encoding is nerfstudio's: values, gradients and parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.field_components.mlp import MLPWithHashEncoding
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin.hash_encoding import QuickHashEncoding, SDFGrid, quicken

FEATURES = pytest.mark.parametrize("features", [1, 2, 3, 4])


def pair(features: int, log2_size: int = 10) -> tuple[HashEncoding, HashEncoding]:
    """nerfstudio's encoding, of coarse levels without collisions and fine ones with many, and ours."""
    torch.manual_seed(0)
    theirs = HashEncoding(4, 3, 200, log2_size, features, implementation="torch")
    ours = copy.deepcopy(theirs)
    quicken(ours)
    assert type(ours) is QuickHashEncoding
    return theirs, ours


def positions() -> Tensor:
    """Random positions; corners of the cube, of cells, and positions outside, as a field without contraction has."""
    inside = torch.rand(300, 3)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1 / 3, 0.5, 1.0])] * 3)
    return torch.cat((inside, corners, 4 * torch.rand(50, 3) - 2))


@FEATURES
def test_values_and_gradients_are_nerfstudios(features: int) -> None:
    results = []
    for encoding in pair(features):
        torch.manual_seed(1)
        point = positions().requires_grad_()
        encoded = encoding(point.view(2, -1, 3))
        (encoded * torch.rand_like(encoded)).sum().backward()
        results.append((encoded.detach(), point.grad, encoding.hash_table.grad))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * float(theirs.abs().max()))


def test_gradients_of_gradients_are_nerfstudios() -> None:
    """As an eikonal loss has them."""
    results = []
    for encoding in pair(2):
        torch.manual_seed(1)
        point = torch.rand(100, 3, requires_grad=True)
        encoded = encoding(point)
        (slope,) = torch.autograd.grad((encoded * torch.rand_like(encoded)).sum(), point, create_graph=True)
        slope.square().sum().backward()
        results.append((point.grad, encoding.hash_table.grad))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def sdf_grid(**changes) -> SDFGrid:
    torch.manual_seed(0)
    settings = dict(n_levels=3, n_features_per_level=2, log2_hashmap_size=10, base_resolution=4, per_level_scale=2.0)
    grid = SDFGrid(3, {"otype": "HashGrid", "interpolation": "Smoothstep", **settings, **changes})
    quicken(grid)
    return grid


def test_the_grid_of_an_sdf_is_smooth_across_its_cells() -> None:
    """Its gradient is continuous, which that of a linear grid is not."""
    face = torch.tensor([[0.5, 0.31, 0.77]])  # of a cell of each level
    jumps = {}
    for interpolation in ("Smoothstep", "Linear"):
        grid, slopes = sdf_grid(interpolation=interpolation), []
        for offset in (-1e-5, 1e-5):
            point = (face + torch.tensor([offset, 0, 0])).requires_grad_()
            grid(point).sum().backward()
            slopes.append(point.grad)
        jumps[interpolation] = (slopes[1] - slopes[0]).abs().max()
    assert jumps["Smoothstep"] < 1e-2 * jumps["Linear"]


def test_gradients_of_the_grid_of_an_sdf_are_finite_differences_twice() -> None:
    grid = sdf_grid().double()
    point = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, _: grid(p), (point, grid.hash_table))
    assert torch.autograd.gradgradcheck(grid, point)


def test_a_grid_without_hash_is_refused() -> None:
    with pytest.raises(UserError, match="use-hash is False"):
        sdf_grid(otype="DenseGrid")


def test_gradients_are_finite_differences() -> None:
    _, ours = pair(2)
    ours.double()
    point = torch.rand(20, 3, dtype=torch.float64, requires_grad=True)
    # away from the faces of cells, where there is a kink
    away = ((point[:, None] * ours.scalings[:, None] + 0.5) % 1 - 0.5).abs().amin(dim=(1, 2)) > 1e-3
    assert away.sum() > 5
    assert torch.autograd.gradcheck(lambda p, _: ours(p), (point[away].detach().requires_grad_(), ours.hash_table))


def test_checkpoints_are_interchangeable_in_both_directions() -> None:
    theirs, ours = pair(2)
    other = HashEncoding(4, 3, 200, 10, 2, implementation="torch")
    other.load_state_dict(ours.state_dict())
    point = positions()
    torch.testing.assert_close(other(point), theirs(point), rtol=0, atol=0)
    ours.load_state_dict(HashEncoding(4, 3, 200, 10, 2, implementation="torch").state_dict())
    assert theirs.state_dict().keys() == ours.state_dict().keys()


@FEATURES
def test_a_gradient_on_the_cpu_is_the_same_every_time(features: int) -> None:
    _, ours = pair(features, log2_size=4)
    gradients = []
    for _ in range(2):
        ours.hash_table.grad = None
        ours(torch.linspace(0, 1, 30_000).view(-1, 3)).square().sum().backward()
        gradients.append(ours.hash_table.grad)
    assert torch.equal(*gradients)


def test_positions_are_left_alone_where_nothing_follows_them() -> None:
    _, ours = pair(2)
    ours.follows_positions = False
    point = torch.rand(5, 3, requires_grad=True)
    ours(point).sum().backward()
    assert point.grad is None and ours.hash_table.grad is not None


def test_all_encodings_of_a_model_are_quickened() -> None:
    model = torch.nn.Sequential(MLPWithHashEncoding(4, implementation="torch"), torch.nn.Linear(64, 2))
    assert len(quicken(model)) == 1
    assert isinstance(model[0].model[0], QuickHashEncoding)
