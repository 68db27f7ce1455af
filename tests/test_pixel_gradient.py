"""The pixel gradient is that of the rendered error, whatever the camera, and costs the model nothing else."""

from __future__ import annotations

import pytest
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox

from nerfstudio_softmining.plugin.datamanager import _moving_with
from nerfstudio_softmining.plugin.models import SoftMiningNerfactoModelConfig
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY
from nerfstudio_softmining.plugin.rays import MiningRayGenerator
from nerfstudio_softmining.samplers.base import MiningBatch

RAYS = 48
CAMERAS = {
    "perspective": dict(camera_type=CameraType.PERSPECTIVE),
    "distorted": dict(
        camera_type=CameraType.PERSPECTIVE, distortion_params=torch.tensor([0.05, -0.02, 0.0, 0.0, 0.003, -0.002])
    ),
    "fisheye": dict(camera_type=CameraType.FISHEYE),
    "equirectangular": dict(camera_type=CameraType.EQUIRECTANGULAR),
    "orthophoto": dict(camera_type=CameraType.ORTHOPHOTO),
    "fisheye624": dict(camera_type=CameraType.FISHEYE624, distortion_params=0.01 * torch.arange(12.0).cos()),
}


def make_cameras(**options) -> Cameras:
    pose = torch.eye(4)[:3].repeat(2, 1, 1)
    pose[:, 2, 3] = 1.0
    pose[1, 0, 3] = 0.3
    size = dict(fx=32.0, fy=32.0, cx=32.0, cy=16.0, width=64, height=32)
    if options["camera_type"] is not CameraType.EQUIRECTANGULAR:
        size = dict(fx=40.0, fy=44.0, cx=31.0, cy=17.0, width=64, height=32)
    if "distortion_params" in options:
        options = {**options, "distortion_params": options["distortion_params"].expand(2, -1)}
    return Cameras(camera_to_worlds=pose, **size, **options)


def hash_table(model) -> torch.Tensor:
    return next(p for n, p in model.field.named_parameters() if n.endswith("hash_table"))


def make_model(**changes):
    torch.manual_seed(0)
    config = SoftMiningNerfactoModelConfig(
        num_levels=4,
        max_res=32,
        log2_hashmap_size=12,
        num_proposal_iterations=1,
        num_proposal_samples_per_ray=(12,),
        num_nerf_samples_per_ray=12,
        background_color="black",
        implementation="torch",
        use_appearance_embedding=False,
        camera_optimizer=CameraOptimizerConfig(mode="off"),
        distortion_loss_mult=0.0,
        **changes,
    )
    model = config.setup(scene_box=SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3])), num_train_data=2)
    with torch.no_grad():  # a field with something to see in it
        hash_table(model).mul_(1000)
    model.density_fns = [lambda x: torch.ones_like(x[..., :1])]  # samples that do not depend on the pixel
    return model.train()


def ours_and_theirs(cameras: Cameras, indices: torch.Tensor) -> tuple[RayBundle, RayBundle]:
    """Rays with a pixel gradient, and nerfstudio's own."""
    theirs = cameras.generate_rays(camera_indices=indices[:, :1], coords=indices[:, 1:] + 0.5)
    return MiningRayGenerator(cameras).differentiable(indices)[0], theirs


def mining_batch(**filled) -> MiningBatch:
    return MiningBatch(torch.zeros(RAYS, 3).long(), torch.ones(RAYS), num_uniform=0, **filled)


def forward(model, rays, truth, mining=None, seed=1):
    """Render and compute the losses, with the same jitter each time."""
    torch.manual_seed(seed)
    batch = {
        "image": truth,
        BATCH_KEY: mining or mining_batch(),
    }
    outputs = model(rays)
    return outputs, model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))


def indices_and_truth():
    generator = torch.Generator().manual_seed(2)
    camera = torch.randint(2, (RAYS, 1), generator=generator)
    row = torch.randint(4, 28, (RAYS, 1), generator=generator)
    column = torch.randint(4, 60, (RAYS, 1), generator=generator)
    return torch.cat((camera, row, column), dim=1), torch.rand(RAYS, 3, generator=generator)


def rendered_error(model, cameras, indices, truth, slope, offset):
    rays = cameras.generate_rays(camera_indices=indices[:, :1], coords=indices[:, 1:] + 0.5 + offset)
    truth = truth + slope @ offset
    return (forward(model, rays, truth)[0]["rgb"] - truth).square().mean(-1).detach().double()


@pytest.mark.parametrize("kind", CAMERAS)
def test_pixel_gradient_is_a_finite_difference_of_the_rendered_error(kind):
    model, cameras = make_model(), make_cameras(**CAMERAS[kind])
    # nerfstudio's torch encoding of viewing directions cuts their gradient off: leave them out of the comparison
    model.field.direction_encoding.forward = lambda directions: torch.full((len(directions), 16), 0.3)
    indices, truth = indices_and_truth()
    rays, coords = MiningRayGenerator(cameras).differentiable(indices)
    mining = mining_batch(coords=coords)
    slope = 0.001 * torch.randn(RAYS, 3, 2, generator=torch.Generator().manual_seed(3))  # of the photographs
    _, losses = forward(model, rays, _moving_with(coords, truth, slope), mining)
    sum(losses.values()).backward()
    gradient = coords.grad / mining.weighted_error.grad[:, None]

    h = 1e-2  # pixels: the field is piecewise smooth, and single precision forbids much smaller steps
    difference = torch.stack(
        [
            rendered_error(model, cameras, indices, truth, slope, h * unit)
            - rendered_error(model, cameras, indices, truth, slope, -h * unit)
            for unit in torch.eye(2)
        ],
        dim=-1,
    ) / (2 * h)
    assert (gradient - difference).norm() < 0.1 * difference.norm()


def test_pixel_gradient_leaves_values_and_network_gradients_alone():
    """Rays that carry the pixel gradient render and train bit for bit like nerfstudio's own."""
    indices, truth = indices_and_truth()
    cameras = make_cameras(**CAMERAS["perspective"])
    results = []
    for rays in ours_and_theirs(cameras, indices):
        model = make_model()
        outputs, losses = forward(model, rays, truth)
        sum(losses.values()).backward()
        results.append((outputs["rgb"], hash_table(model).grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_proposal_networks_neither_see_nor_add_to_the_pixel_gradient():
    model = make_model()
    seen = []
    model.density_fns = [lambda x: (seen.append(x.requires_grad), model.proposal_networks[0].density_fn(x))[1]]
    indices, truth = indices_and_truth()
    rays, coords = MiningRayGenerator(make_cameras(**CAMERAS["perspective"])).differentiable(indices)
    _, losses = forward(model, rays, truth)
    assert seen == [False]
    (gradient,) = torch.autograd.grad(losses["interlevel_loss"], coords, allow_unused=True)
    assert gradient is None


def test_a_render_between_steps_leaves_the_gradient_of_the_poses():
    """Which the proposal networks add to in the steps that they are trained in."""
    model = make_model()
    model.density_fns = [network.density_fn for network in model.proposal_networks]
    model.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3").setup(num_cameras=2, device="cpu")
    indices, truth = indices_and_truth()
    cameras = make_cameras(**CAMERAS["perspective"])
    gradients = []
    for renders in (False, True):
        if renders:
            model.eval()
            with torch.no_grad():
                model(cameras.generate_rays(indices[:, :1], indices[:, 1:] + 0.5))
            model.train()
        model.zero_grad()
        rays = MiningRayGenerator(cameras).mined(indices)
        _, losses = forward(model, rays, truth)
        losses["interlevel_loss"].backward()
        gradients.append(model.camera_optimizer.pose_adjustment.grad.clone())
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_camera_optimizer_gets_its_gradient_beside_the_pixels():
    model = make_model()
    model.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3").setup(num_cameras=2, device="cpu")
    indices, truth = indices_and_truth()
    cameras = make_cameras(**CAMERAS["perspective"])
    gradients = []
    for rays in ours_and_theirs(cameras, indices):
        model.zero_grad()
        _, losses = forward(model, rays, truth)
        sum(losses.values()).backward()
        gradients.append(model.camera_optimizer.pose_adjustment.grad.clone())
    assert gradients[0].norm() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-9)
