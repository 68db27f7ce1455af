"""Every ray-based method of nerfstudio, soft mined: its losses, its pixel gradient, its training."""

from __future__ import annotations

import random
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import nerfacc
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captures import write_capture
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.field_components.encodings import TensorCPEncoding, TensorVMEncoding, TriplaneEncoding
from nerfstudio.model_components.losses import DepthLossType
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.models.nerfacto import NerfactoModel
from nerfstudio.models.splatfacto import SplatfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from nerfstudio.utils import colors
from nerfstudio.utils.external import TCNN_EXISTS
from torch import Tensor, nn
from virtual_device import DEVICE, VirtualDevice

from nerfstudio_softmining.bench import run_page
from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining import langevin
from nerfstudio_softmining.plugin import compat, methods
from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManager
from nerfstudio_softmining.plugin.model import SoftMiningConfig, SoftMiningMixin
from nerfstudio_softmining.plugin.models import SoftMiningDepthNerfactoModelConfig, SoftMiningVanillaNeRFModelConfig
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY
from nerfstudio_softmining.plugin.soft_mined import soft_mined
from nerfstudio_softmining.plugin.tensor_encoding import make_differentiable

RAYS = 64
GRIDS = {"log2_hashmap_size": 10, "num_levels": 4, "max_res": 64}
SAMPLES = {"num_coarse_samples": 16, "num_importance_samples": 16}
NEUS = {"num_samples": 16, "num_samples_importance": 16, "num_samples_outside": 8}
SMALL = {
    "nerfacto-big": GRIDS,
    "depth-nerfacto": GRIDS,
    "vanilla-nerf": SAMPLES,
    "mipnerf": SAMPLES,
    "tensorf": {"init_resolution": 16, "final_resolution": 32, "upsampling_iters": (100, 200)},
    "instant-ngp": {"log2_hashmap_size": 10, "max_res": 64, "grid_resolution": 16, "background_color": "black"},
    "neus": NEUS,
    "neus-facto": {"num_neus_samples_per_ray": 16, "num_proposal_samples_per_ray": (32, 16)},
}
"""Settings under which each method is small. nerfacto-huge and instant-ngp-bounded have the models of others."""
METHODS = pytest.mark.parametrize("name", SMALL)
STOCK_NEEDS_TCNN = {"neus", "neus-facto"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_scene(folder / "scene", num_train=4, num_eval=1, size=24)
    write_capture(folder / "capture", num_images=12, depths=True)
    return folder


@pytest.fixture(autouse=True)
def ray_marching(monkeypatch, request) -> None:
    """Stand in for nerfacc's CUDA kernels, so that everything else of instant-ngp runs on a CPU."""
    if "needs" not in request.node.name:
        monkeypatch.setattr(compat, "require_ray_marching", lambda: None)
    monkeypatch.setattr(nerfacc.OccGridEstimator, "sampling", march)
    monkeypatch.setattr(nerfacc, "pack_info", pack)
    monkeypatch.setattr(nerfacc, "render_weight_from_density", weights_of_packed_samples)


def march(grid, rays_o: Tensor, rays_d: Tensor, *, near_plane: float, stratified: bool, **_) -> tuple[Tensor, ...]:
    """Return the samples of rays in occupied cells of the inner level of an occupancy grid."""
    count, steps = len(rays_o), 16
    steps_along = torch.linspace(0, 4, steps + 1, dtype=rays_o.dtype, device=rays_o.device)
    edges = max(near_plane, 2.0) + steps_along.repeat(count, 1)
    if stratified:
        edges = edges + 0.2 * torch.rand(count, 1, device=rays_o.device)
    places = rays_o[:, None] + rays_d[:, None] * (edges[:, 1:] + edges[:, :-1])[..., None] / 2
    low, high = grid.aabbs[0].view(2, 3)
    cell = ((places - low) / (high - low) * grid.resolution).long()
    inside = ((cell >= 0) & (cell < grid.resolution)).all(dim=-1)
    x, y, z = (cell.clamp_min(0).minimum(grid.resolution.long() - 1)).unbind(-1)
    ray, sample = (inside & (grid.binaries[0, x, y, z] | ~grid.binaries.any())).nonzero(as_tuple=True)
    return ray, edges[ray, sample], edges[ray, sample + 1]


def pack(ray_indices: Tensor, n_rays: int) -> Tensor:
    """Return where the samples of each ray start, and how many there are [rays, 2]."""
    count = torch.bincount(ray_indices, minlength=n_rays)
    return torch.stack((count.cumsum(0) - count, count), dim=-1)


def weights_of_packed_samples(t_starts: Tensor, t_ends: Tensor, sigmas: Tensor, packed_info: Tensor) -> tuple[Tensor]:
    """Return the weight of each sample in the colour of its ray, by the rendering equation."""
    weights = []
    for start, count in packed_info.tolist():
        depth = (sigmas * (t_ends - t_starts))[start : start + count]
        weights.append((-(depth.cumsum(0) - depth)).exp() * (1 - (-depth).exp()))
    return (torch.cat(weights),)


class Training:
    """The steps of nerfstudio's trainer, with a method of any kind.

    Args:
        data: folder with the scenes.
        method: settings of the method.
        kind: kind of sampler; nerfstudio's own datamanager if None.
        device: where it trains.
        settings: settings of the model.
    """

    def __init__(self, data, method: str, kind: str | None = "mixture", device="cpu", **settings) -> None:
        self.name = method.removeprefix("softmining-")
        config = deepcopy(all_methods[method]).pipeline
        if kind is None:
            target = config.datamanager._target
            config.datamanager = VanillaDataManagerConfig(dataparser=config.datamanager.dataparser)
            if "depth" in method:
                config.datamanager._target = target
        else:
            config.datamanager.pixel_sampler.kind = kind
        config.datamanager.train_num_rays_per_batch = RAYS
        if "depth" in method:
            config.datamanager.data = data / "capture"
        else:
            config.datamanager.dataparser = BlenderDataParserConfig()
            config.datamanager.data = data / "scene"
        if hasattr(config.model, "implementation"):
            config.model.implementation = "torch"
        if hasattr(config, "target_num_samples"):
            config.max_num_samples_per_ray, config.target_num_samples = 16, 16 * RAYS
        if hasattr(config.model, "sdf_field"):
            sdf = config.model.sdf_field
            sdf.log2_hashmap_size, sdf.num_levels, sdf.hidden_dim, sdf.num_layers = 10, 4, 80, 2
        for name, value in (SMALL[self.name] | settings).items():
            setattr(config.model, name, value)
        random.seed(0)
        torch.manual_seed(0)
        with compat.lenient_metrics():
            self.pipeline: VanillaPipeline = config.setup(device=device)
        groups = self.pipeline.get_param_groups()
        self.optimizer = torch.optim.Adam([parameter for group in groups.values() for parameter in group], lr=1e-3)
        scaler = torch.cuda.amp.GradScaler(enabled=False)
        self.callbacks = self.pipeline.get_training_callbacks(
            TrainingCallbackAttributes(None, scaler, self.pipeline, None)
        )
        self.steps = 0

    def losses(self) -> dict[str, Tensor]:
        """Compute the losses of the next batch, and their gradients."""
        self.pipeline.train()
        self.optimizer.zero_grad()
        self._run(TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        _, losses, _ = self.pipeline.get_train_loss_dict(self.steps)
        sum(losses.values()).backward()
        return losses

    def step(self) -> dict[str, Tensor]:
        losses = self.losses()
        self.optimizer.step()
        self._run(TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        self.steps += 1
        return losses

    def _run(self, location) -> None:
        for callback in self.callbacks:
            callback.run_callback_at_location(self.steps, location)

    @property
    def manager(self):
        return self.pipeline.datamanager


@METHODS
def test_uniform_has_the_losses_and_gradients_of_the_method_itself(data, name):
    if name in STOCK_NEEDS_TCNN and not TCNN_EXISTS:
        pytest.skip("nerfstudio's own needs tiny-cuda-nn")
    ours, theirs = Training(data, f"softmining-{name}", "uniform"), Training(data, name, None)
    torch.manual_seed(0)
    expected = theirs.losses()
    torch.manual_seed(0)
    losses = ours.losses()
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-7)
    parameters = dict(ours.pipeline.named_parameters())
    assert parameters.keys() == dict(theirs.pipeline.named_parameters()).keys()
    for key, parameter in theirs.pipeline.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(parameters[key].grad, parameter.grad, rtol=1e-3, atol=1e-3 * scale + 1e-9)


@METHODS
def test_reconstruction_losses_are_weighted_and_no_others(data, name):
    training = Training(data, f"softmining-{name}", "uniform")
    model = training.pipeline.model.train()
    rays, batch = training.manager.next_train(0)
    ratio = torch.linspace(0.3, 3.0, RAYS)
    torch.manual_seed(1)
    outputs = model(rays)
    found = {}
    for weighted in (False, True):
        batch[BATCH_KEY].density_ratio, batch[BATCH_KEY].importance_weighted = ratio, weighted
        torch.manual_seed(1)
        losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
        found[weighted] = {key: value.detach() for key, value in losses.items()}
    mining, truth = batch[BATCH_KEY], batch["image"]
    power = 1 if "neus" in name else 2
    for key, value in found[True].items():
        if not key.startswith("rgb_loss"):
            torch.testing.assert_close(value, found[False][key])
            continue
        prediction = outputs[key.replace("rgb_loss", "rgb")].detach()
        error = (prediction - truth).abs().pow(power).mean(dim=-1)
        coefficient = found[False][key] / error.mean()
        torch.testing.assert_close(value, coefficient * (ratio.pow(-model.config.alpha) * error).mean())
    prediction = outputs["rgb_fine" if "rgb_fine" in outputs else "rgb"].detach()
    torch.testing.assert_close(mining.importance, (prediction - truth).abs().mean(dim=-1))
    torch.testing.assert_close(mining.error.detach(), (prediction - truth).square().mean(dim=-1))


@METHODS
def test_the_pixel_gradient_is_a_finite_difference_of_the_finest_error(data, name, monkeypatch, request):
    training = Training(data, f"softmining-{name}", "langevin")
    for _ in range(3):
        training.step()
    model = training.pipeline.model.train().double()
    # TensoRF makes colours and densities of the default kind
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    monkeypatch.setattr(colors, "WHITE", colors.WHITE.double())
    for module in model.modules():  # nerfstudio's torch encoding of viewing directions cuts their gradient off
        if type(module).__name__ == "SHEncoding":
            module.forward = lambda directions: torch.full((len(directions), 16), 0.3).double()
    rays, batch = training.manager.next_train(training.steps)
    mining = batch[BATCH_KEY]

    def render(offsets: Tensor) -> dict[str, Any]:
        torch.manual_seed(2)
        bundle = rays[:]
        for part in ("origins", "directions", "pixel_area"):
            setattr(bundle, part, getattr(rays, part).double())
        bundle.metadata = {"directions_norm": rays.metadata["directions_norm"], "direction_offsets": offsets}
        return model(bundle)

    offsets = torch.zeros(len(rays), 3, dtype=torch.float64, requires_grad=True)
    outputs = render(offsets)
    losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
    own = [value for key, value in losses.items() if key.startswith("rgb_loss")]
    found, of_loss = torch.autograd.grad(sum(own), (offsets, mining.weighted_error), retain_graph=True)
    slope = langevin.grad_log_importance(found, of_loss, mining.weighted_error.detach(), mining.error_power)

    step = 1e-7
    direction = F.normalize(slope.nan_to_num(), dim=-1)
    truth, key = batch["image"].double(), "rgb_fine" if "rgb_fine" in outputs else "rgb"
    logs = []
    for sign in (1, -1):
        error = render(sign * step * direction)[key].detach() - truth
        norm = error.abs().mean(dim=-1) if mining.error_power == 1 else error.square().mean(dim=-1).sqrt()
        logs.append(norm.log())
    measured, expected = (logs[0] - logs[1]) / (2 * step), (slope * direction).sum(dim=-1)
    known = mining.error > 1e-8
    assert known.sum() > 10 and expected[known].norm() > 0
    assert (measured - expected)[known].norm() < 0.05 * expected[known].norm()
    if len(own) > 1:  # the coarse stage neither sees the pixel gradient nor adds to it
        assert torch.autograd.grad(own[0], offsets, allow_unused=True) == (None,)


@METHODS
def test_trains_with_the_pool_and_is_evaluated(data, name):
    training = Training(data, f"softmining-{name}", "mixture")
    for _ in range(4):
        losses = training.step()
    assert all(loss.isfinite() for loss in losses.values())
    batch = training.manager.last_batch
    assert batch.num_chains > 0 and batch.weights.std() > 0
    training.pipeline.eval()
    metrics, images = training.pipeline.get_eval_image_metrics_and_images(training.steps)
    assert metrics["psnr"] > 3 and images["img"].isfinite().all()
    training.pipeline.eval()
    camera, _ = training.manager.fixed_indices_eval_dataloader.get_camera(0)
    outputs = training.pipeline.model.get_outputs_for_camera(camera)
    size = (int(camera.height), int(camera.width), 1)
    assert outputs["importance"].shape == outputs["sample_density"].shape == size
    assert outputs["importance"].isfinite().all()
    assert all(output.is_floating_point() for output in outputs.values())  # or `ns-render dataset` cannot store them
    if "depth_fine" not in outputs:  # whose rays end outside of the scene's box so early
        assert outputs["importance"].max() > 0


@pytest.mark.parametrize("name", ["depth-nerfacto", "vanilla-nerf"])
def test_the_report_shows_the_truth_beside_the_finest_render(data, name):
    training = Training(data, f"softmining-{name}", "mixture")
    training.step()
    training.pipeline.eval()
    (view,) = run_page._render(training.pipeline, 1, name)
    _, batch = training.manager.fixed_indices_eval_dataloader.get_camera(0)
    assert view.truth.shape == view.render.shape == batch["image"].shape
    np.testing.assert_allclose(view.truth, batch["image"].numpy(), atol=1e-6)
    expected = -10 * np.log10(np.square(view.render - view.truth).mean())
    assert view.psnr == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", [name for name in SMALL if "neus" not in name])  # whose second derivatives end it
@pytest.mark.parametrize("kind", ["mixture", "langevin"])
def test_a_step_mixes_no_devices_and_soft_mining_waits_for_nothing(data, name, kind):
    with VirtualDevice() as device:
        training = Training(data, f"softmining-{name}", kind, DEVICE)
        training.step()
        device.waits.clear()
        training.step()
        assert not [wait for wait in device.waits if wait.startswith("nerfstudio_softmining/")]


@METHODS
def test_an_interrupted_training_goes_on_bit_for_bit(data, name):
    whole = Training(data, f"softmining-{name}", "mixture")
    for _ in range(3):
        whole.step()
    resumed = Training(data, f"softmining-{name}", "mixture")
    saved = deepcopy((whole.pipeline.state_dict(), whole.optimizer.state_dict()))
    resumed.pipeline.load_pipeline(saved[0], whole.steps - 1)
    resumed.optimizer.load_state_dict(saved[1])
    resumed.steps = whole.steps
    expected = [whole.step() for _ in range(2)]  # which share their randomness with nobody
    for theirs in expected:
        for key, value in resumed.step().items():
            assert torch.equal(theirs[key], value), key


@pytest.mark.parametrize("make", [TensorVMEncoding, TensorCPEncoding, TriplaneEncoding])
def test_encodings_of_tensorf_keep_their_values_and_get_a_gradient(make):
    torch.manual_seed(0)
    holder = nn.ModuleList([make(8, 3)]).double()
    position = (2 * torch.rand(5, 2, 3, dtype=torch.float64) - 1).requires_grad_()
    theirs = holder[0](position)
    assert not torch.autograd.grad(theirs.sum(), position, allow_unused=True)[0]
    (ours,) = make_differentiable(holder)
    assert torch.equal(ours(position), theirs)
    ours.follows_positions = True
    torch.testing.assert_close(ours(position), theirs)
    assert torch.autograd.gradcheck(ours, position)


def test_there_is_a_method_for_each_of_nerfstudios_that_are_listed():
    for name in methods.SOFT_MINED:
        method = all_methods[f"softmining-{name}"]
        assert method.method_name == f"softmining-{name}"
        assert issubclass(method.pipeline.model._target, SoftMiningMixin)
        theirs = all_methods[name]
        assert method.max_num_iterations == theirs.max_num_iterations
        assert method.optimizers.keys() == theirs.optimizers.keys()
        own = vars(theirs.pipeline.model)
        for setting, value in vars(method.pipeline.model).items():
            if setting in own and setting not in ("_target", "implementation"):
                assert value == own[setting], (name, setting)


def test_a_datamanager_of_another_kind_is_named_and_one_can_be_given():
    class Theirs(VanillaDataManager):
        pass

    class Ours(SoftMiningDataManager):
        pass

    method = deepcopy(all_methods["vanilla-nerf"])
    method.pipeline.datamanager._target = Theirs
    with pytest.raises(UserError, match="vanilla-nerf has a datamanager of its own, Theirs"):
        soft_mined(method, SoftMiningVanillaNeRFModelConfig)
    config = soft_mined(method, SoftMiningVanillaNeRFModelConfig, datamanager=Ours)
    assert config.pipeline.datamanager._target is Ours and method.pipeline.datamanager._target is Theirs


def test_methods_that_render_whole_images_are_refused():
    with pytest.raises(UserError, match="splatfacto cannot be soft mined.*whole images"):
        soft_mined(all_methods["splatfacto"], SoftMiningConfig)


@dataclass
class NoRaysConfig(SoftMiningConfig, SplatfactoModelConfig):
    _target: type = field(default_factory=lambda: NoRays)


class NoRays(SoftMiningMixin, Model):
    pass


@dataclass
class OtherLossConfig(SoftMiningConfig, ModelConfig):
    _target: type = field(default_factory=lambda: OtherLoss)


class Plain(NerfactoModel):
    def populate_modules(self):
        super().populate_modules()
        self.rgb_loss = nn.HuberLoss()


class OtherLoss(SoftMiningMixin, Plain):
    pass


def test_models_that_cannot_be_soft_mined_say_why():
    scene = {"scene_box": None, "num_train_data": 1}
    with pytest.raises(UserError, match="no ray sampler"):
        NoRaysConfig().setup(**scene)
    config = deepcopy(all_methods["softmining-nerfacto"].pipeline.model)
    config._target = OtherLoss
    for name, value in (GRIDS | {"implementation": "torch"}).items():
        setattr(config, name, value)
    with pytest.raises(UserError, match="its rgb_loss is HuberLoss"):
        config.setup(scene_box=SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3])), num_train_data=1)


def test_a_model_that_computes_more_losses_than_it_says_is_named(data):
    training = Training(data, "softmining-vanilla-nerf")
    training.pipeline.model.num_losses = 1
    with pytest.raises(TypeError, match="computes rgb_loss 2 times.*num_losses is 1"):
        training.step()


def test_a_loss_of_pairs_of_rays_is_refused():
    with pytest.raises(UserError, match="depth-loss-type is SPARSENERF_RANKING"):
        SoftMiningDepthNerfactoModelConfig(depth_loss_type=DepthLossType.SPARSENERF_RANKING)


@pytest.mark.parametrize(
    "has_gpu, kernels, reason",
    [
        (False, None, "there is no CUDA GPU"),
        (True, SimpleNamespace(_C=None), "no CUDA toolkit"),
        (True, None, "cannot build them"),  # importing None fails
    ],
)
@pytest.mark.parametrize("name", ["instant-ngp", "instant-ngp-bounded"])
def test_instant_ngp_says_what_it_needs_before_it_looks_for_data(name, has_gpu, kernels, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setitem(sys.modules, "nerfacc.cuda._backend", kernels)
    config = deepcopy(all_methods[f"softmining-{name}"]).pipeline
    config.datamanager.data = tmp_path / "nothing"
    with pytest.raises(UserError, match=f"nerfacc's CUDA kernels.*{reason}.*softmining-nerfacto"):
        config.setup(device="cpu")
