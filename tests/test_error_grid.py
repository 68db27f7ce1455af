"""The grid of errors in space: what rays added to it is found where they ended."""

from __future__ import annotations

import torch

from nerfstudio_softmining.plugin.error_grid import SIDE, ErrorGrid


def centres(count: int, seed: int) -> torch.Tensor:
    """Centres of different voxels, none of them next to another."""
    voxels = torch.randperm((SIDE // 2) ** 3, generator=torch.Generator().manual_seed(seed))[:count]
    x, y, z = voxels % (SIDE // 2), voxels // (SIDE // 2) % (SIDE // 2), voxels // (SIDE // 2) ** 2
    return (2 * torch.stack((x, y, z), dim=1) + 0.5) / SIDE


def test_the_mean_importance_and_the_number_of_rays_are_found_where_rays_ended():
    grid, places = ErrorGrid(), centres(50, 0)
    count = torch.arange(1, 51)
    where = torch.repeat_interleave(torch.arange(50), count)
    importance = torch.rand(len(where), generator=torch.Generator().manual_seed(1))
    grid.add(places[where], importance)
    found, density = grid.look_up(places)
    expected = torch.stack([importance[where == place].mean() for place in range(50)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(density, count / count.float().mean())


def test_later_rays_count_more():
    grid, place = ErrorGrid(), centres(1, 0)
    for importance in [0.0] * 100 + [1.0] * 100:
        grid.add(place, torch.full((1,), importance))
    assert 0.8 < grid.look_up(place)[0].item() < 0.95


def test_nothing_is_known_of_places_that_no_ray_ended_in():
    grid, places = ErrorGrid(), centres(2, 0)
    assert torch.stack(grid.look_up(places)).abs().max() == 0
    grid.add(places[:1], torch.ones(1))
    importance, density = grid.look_up(torch.cat((places, torch.tensor([[-1.0, 2.0, 0.5]]))))
    assert importance.tolist() == [1, 0, 0] and density.tolist() == [1, 0, 0]
