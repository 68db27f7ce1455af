"""A backward pass through a part of the samples has the gradient of all of them as its mean."""

from __future__ import annotations

import pytest
import torch
from nerfstudio.cameras.rays import Frustums, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.fields.nerfacto_field import NerfactoField

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import thin_backward
from nerfstudio_softmining.plugin.hash_encoding import quicken
from nerfstudio_softmining.plugin.models import SoftMiningDepthNerfactoModelConfig, SoftMiningNerfactoModelConfig

RAYS, SAMPLES = 20, 12


def make_field() -> NerfactoField:
    torch.manual_seed(0)
    box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    field = NerfactoField(
        box.aabb, num_images=3, num_levels=3, max_res=32, log2_hashmap_size=8, hidden_dim=8, implementation="torch"
    )
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    quicken(field)
    return field


def make_rays(differentiable: bool) -> tuple[RaySamples, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    origins = (torch.rand(RAYS, 1, 3, generator=random) / 4).requires_grad_(differentiable)
    directions = torch.nn.functional.normalize(torch.randn(RAYS, 1, 3, generator=random), dim=-1)
    directions.requires_grad_(differentiable)
    ends = torch.linspace(0.05, 0.7, SAMPLES + 1)[:, None].expand(RAYS, -1, 1)
    frustums = Frustums(
        origins.expand(-1, SAMPLES, -1),
        directions.expand(-1, SAMPLES, -1),
        ends[:, :-1],
        ends[:, 1:],
        torch.ones(RAYS, SAMPLES, 1),
    )
    cameras = torch.arange(RAYS)[:, None, None].expand(-1, SAMPLES, 1) % 3
    return RaySamples(frustums, cameras, deltas=ends.diff(dim=1)), [origins, directions]


def gradients(field: NerfactoField, differentiable: bool = False) -> list[torch.Tensor]:
    """Return the gradients of the field's parameters, and of the rays, from a loss of rendered colours."""
    field.zero_grad(set_to_none=True)
    rays, moving = make_rays(differentiable)
    outputs = field.forward(rays)
    weights = rays.get_weights(outputs[FieldHeadNames.DENSITY])
    colours = (weights * outputs[FieldHeadNames.RGB]).sum(dim=1)
    (colours - torch.linspace(0, 1, 3)).square().mean().backward()
    found = [*field.parameters(), *(moving if differentiable else [])]
    return [torch.zeros_like(part) if part.grad is None else part.grad.clone() for part in found]


@pytest.mark.parametrize("differentiable", [False, True], ids=["fixed rays", "moving rays"])
def test_the_gradient_of_all_samples_is_that_of_one_backward_pass(monkeypatch, differentiable):
    field = make_field()
    expected = gradients(field, differentiable)
    thin_backward.thin(field, 0.5)
    everything = torch.arange(RAYS * SAMPLES), torch.ones(RAYS * SAMPLES)
    monkeypatch.setattr(thin_backward.thinning, "draw_kept", lambda probability, count: everything)
    for ours, theirs in zip(gradients(field, differentiable), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
    assert sum(part.abs().sum() > 0 for part in expected) > 5


@pytest.mark.parametrize("differentiable", [False, True], ids=["fixed rays", "moving rays"])
def test_the_mean_gradient_of_a_part_of_the_samples_is_that_of_all(differentiable):
    field = make_field()
    expected = gradients(field, differentiable)
    thin_backward.thin(field, 0.2)
    runs = [gradients(field, differentiable) for _ in range(300)]
    for parts, whole in zip(zip(*runs, strict=True), expected, strict=True):
        samples = torch.stack(parts)
        error = samples.std(dim=0) / len(runs) ** 0.5
        assert ((samples.mean(dim=0) - whole).abs() <= 6 * error + 0.01 * whole.abs().max()).all()


def test_the_backward_pass_evaluates_a_part_of_the_samples_alone(monkeypatch):
    field, counts = make_field(), []
    original = NerfactoField.get_density
    monkeypatch.setattr(
        NerfactoField, "get_density", lambda self, rays: counts.append(rays.frustums.shape) or original(self, rays)
    )
    thin_backward.thin(field, 0.25)
    gradients(field)
    assert counts == [(RAYS, SAMPLES), (RAYS * SAMPLES // 4,)]
    counts.clear()
    with torch.no_grad():
        field.forward(make_rays(False)[0])
    field.eval()
    field.forward(make_rays(False)[0])
    assert counts == [(RAYS, SAMPLES)] * 2


def test_values_are_those_of_the_field():
    field, (rays, _) = make_field(), make_rays(False)
    expected = field.forward(rays)
    thin_backward.thin(field, 0.1)
    for head, value in field.forward(rays).items():
        assert torch.equal(value, expected[head]) and value.requires_grad


@pytest.mark.parametrize("config", [SoftMiningNerfactoModelConfig, SoftMiningDepthNerfactoModelConfig])
def test_normals_need_all_samples(config):
    with pytest.raises(UserError, match=r"backward-fraction is 0\.5.*predict-normals"):
        config(backward_fraction=0.5, predict_normals=True)
    with pytest.raises(UserError, match="backward-fraction is 0"):
        config(backward_fraction=0.0)
