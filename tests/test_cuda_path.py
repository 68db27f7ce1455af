"""One whole step on a device that is not the CPU: nothing mixes devices, and nothing waits.

Without a GPU the device is a [VirtualDevice][]. On a machine with one, `pytest tests/test_cuda_path.py` also runs the
steps there, with torch's own check of waits.
"""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path

import pytest
import sampler_cost
import torch
from captures import write_capture
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from nerfstudio.utils import comms
from torch import Tensor
from virtual_device import DEVICE, MixedDevicesError, VirtualDevice

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import methods
from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManager
from nerfstudio_softmining.plugin.pixel_sampler import SPECS, MiningPixelSampler

KINDS = tuple(SPECS)
LISTINGS = {
    "plain": {},
    "masks": {"masks": True},
    "mixed sizes": {"mixed_sizes": True},
    "mixed sizes and masks": {"mixed_sizes": True, "masks": True},
    "fisheye crop": {"camera_model": "OPENCV_FISHEYE", "fisheye_crop_radius": 10},
    "panorama": {"camera_model": "EQUIRECTANGULAR"},
    "distorted": {"k1": 0.05, "k2": 0.01, "p1": 0.001, "p2": 0.001},
}
EPOCHS_APART = {"quadtree": {"reduction": 1}, "multinomial": {"refresh": 1000}, "error-map": {"interval": 1000}}
"""Settings with which the maps that wait when they are rebuilt are not rebuilt within the steps of a test."""
MAY_WAIT = {
    "cameras/camera_optimizers.py:get_metrics_dict",  # makes constants on the host
    "cameras/camera_utils.py:normalize_with_norm",
    "cameras/cameras.py:is_jagged",  # looks whether images differ in size
    "cameras/cameras.py:_generate_rays_from_coords",  # looks which types of camera and lens there are
    "data/pixel_samplers.py:<dictcomp>",  # its own draw, which `uniform` is: indices go to the host
    "data/pixel_samplers.py:collate_image_dataset_batch",
    "data/pixel_samplers.py:collate_image_dataset_batch_list",
    "data/pixel_samplers.py:rejection_sample_mask",
    "data/pixel_samplers.py:sample_method",
    "data/pixel_samplers.py:sample_method_equirectangular",
    "data/pixel_samplers.py:sample_method_fisheye",
    "field_components/encodings.py:hash_fn",  # makes constants on the host
    "field_components/encodings.py:pytorch_fwd",
    "model_components/ray_samplers.py:generate_ray_samples",
}
"""Functions of nerfstudio 1.1.5 that wait in a step."""


def avoidable(waits: list[str]) -> set[str]:
    """Leave out nerfstudio's own waits, and those of the backward pass through its ray generation."""
    allowed = {f"nerfstudio/{place}" for place in MAY_WAIT}
    return {wait for wait in waits if wait.partition(": ")[0] not in allowed and not wait.startswith("outside: index")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captures")
    return {name: write_capture(folder / name.replace(" ", "_"), **listing) for name, listing in LISTINGS.items()}


class Training:
    """The steps of nerfstudio's trainer on a device."""

    def __init__(
        self,
        data: Path,
        kind: str,
        device: torch.device,
        images_on_gpu: bool = True,
        masks_on_gpu: bool = True,
        eval_mode: str = "all",
        begin: bool = True,
        **settings,
    ) -> None:
        random.seed(0)
        torch.manual_seed(0)
        config = deepcopy(methods.softmining_nerfacto_lite.config).pipeline
        config.datamanager.data = data
        config.datamanager.dataparser.eval_mode = eval_mode
        config.datamanager.train_num_rays_per_batch = 64
        config.datamanager.images_on_gpu, config.datamanager.masks_on_gpu = images_on_gpu, masks_on_gpu
        config.datamanager.pixel_sampler.kind = kind
        if kind != "uniform":
            own = EPOCHS_APART.get(kind, {}) | settings.get(kind, {})
            vars(config.datamanager.pixel_sampler.config_for(kind)).update(own)
        config.model.log2_hashmap_size = 10
        config.model.implementation = "torch"
        config.model.num_levels, config.model.num_nerf_samples_per_ray = 2, 4
        config.model.num_proposal_samples_per_ray = (8,)
        self.pipeline: VanillaPipeline = config.setup(device=device, test_mode="test")
        if not begin:
            return
        self.optimizer = torch.optim.Adam(self.pipeline.model.parameters(), lr=1e-2, eps=1e-15)
        self.callbacks = self.pipeline.get_training_callbacks(
            TrainingCallbackAttributes(None, None, self.pipeline, None)
        )
        self.steps = 0

    def step(self) -> Tensor:
        self.pipeline.train()
        self.optimizer.zero_grad()
        _, losses, _ = self.pipeline.get_train_loss_dict(self.steps)
        loss = sum(losses.values())
        loss.backward()
        self.optimizer.step()
        for callback in self.callbacks:
            callback.run_callback_at_location(self.steps, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        self.steps += 1
        return loss.detach()


def case(kind: str, scene: str):
    return pytest.param(kind, scene, id=f"{kind} on {scene}")


CASES = [
    case(kind, scene)
    for kind in KINDS
    for scene in LISTINGS
    if kind in ("uniform", "mixture", "detail", "langevin") or scene in ("plain", "mixed sizes and masks")
]


@pytest.mark.parametrize(("kind", "scene"), CASES)
def test_a_step_mixes_no_devices_and_waits_for_nothing(scenes, kind, scene):
    with VirtualDevice() as device:
        training = Training(scenes[scene], kind, DEVICE)
        training.step()  # caches the images and builds the maps
        device.waits.clear()
        for _ in range(2):
            training.step()
        assert avoidable(device.waits) == set()


@pytest.mark.parametrize("kind", ["mixture", "detail", "uniform"])
def test_draw_rays_and_update_are_few_operations_distortion_or_not(scenes, kind):
    with VirtualDevice() as device:
        training = Training(scenes["distorted"], kind, DEVICE)
        training.step()
        manager, count = training.pipeline.datamanager, 0

        def counted(function):
            def call(*args):
                nonlocal count
                before = device.num_operations
                result = function(*args)
                count += device.num_operations - before
                return result

            return call

        manager.next_train = counted(manager.next_train)
        manager.train_pixel_sampler.update = counted(manager.train_pixel_sampler.update)
        for _ in range(16):
            training.step()
    assert count / 16 < 160  # views of tensors included; nerfstudio's rays alone are about 1,000


@pytest.mark.parametrize("kind", ["mixture", "detail", "langevin"])
def test_corrections_and_restarts_do_not_wait_either(scenes, kind):
    with VirtualDevice() as device:
        training = Training(
            scenes["masks"],
            kind,
            DEVICE,
            mixture={"interval": 2},
            detail={"interval": 2},
            langevin={"reinit_fraction": 0.5},
        )
        training.step()
        device.waits.clear()
        for _ in range(6):
            training.step()
        assert avoidable(device.waits) == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks_on_gpu", [True, False])
def test_images_on_the_host_are_drawn_from_there_with_their_masks(scenes, kind, masks_on_gpu):
    with VirtualDevice():
        scene = scenes["mixed sizes and masks"]
        training = Training(scene, kind, DEVICE, images_on_gpu=False, masks_on_gpu=masks_on_gpu)
        for _ in range(2):
            training.step()
        cached = next(training.pipeline.datamanager.iter_train_image_dataloader)
    assert {image.device.type for key in ("image", "mask") for image in cached[key]} == {"cpu"}


@pytest.mark.parametrize("scene, free, fits", [("plain", 5.0, True), ("masks", 5.0, False), ("masks", 6.0, True)])
@pytest.mark.parametrize("num_images, num_repeats", [(-1, -1), (2, -1), (2, 10)])
def test_a_gpu_has_to_have_room_for_all_that_is_cached(
    scenes, scene, free, fits, num_images, num_repeats, monkeypatch, capsys
):
    """Three bytes of colour a pixel, one of the mask, and twice as many where the next images are loaded in between."""
    manager = Training(scenes[scene], "mixture", torch.device("cpu"), begin=False).pipeline.datamanager
    assert manager._images_fit_on_device()
    cameras = manager.train_dataset.cameras
    pixels = int((cameras.height * cameras.width).sum()) * (1.0 if num_images == -1 else num_images / len(cameras))
    size = free * pixels * (2 if num_repeats > 0 else 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, 2 * size))
    monkeypatch.setattr(manager, "device", torch.device("cuda"))
    manager.config.train_num_images_to_sample_from = num_images
    manager.config.train_num_times_to_repeat_images = num_repeats
    assert manager._images_fit_on_device() == fits
    assert ("stay on the host" in capsys.readouterr().out.replace("\n", " ")) != fits


@pytest.mark.parametrize("scene", ["masks", "mixed sizes and masks"])
def test_images_that_a_gpu_has_no_room_for_stay_on_the_host(scenes, scene, monkeypatch):
    monkeypatch.setattr(SoftMiningDataManager, "_images_fit_on_device", lambda manager: False)
    with VirtualDevice():
        training = Training(scenes[scene], "mixture", DEVICE)
        training.step()
        cached = next(training.pipeline.datamanager.iter_train_image_dataloader)
    assert {image.device.type for key in ("image", "mask") for image in cached[key]} == {"cpu"}


@pytest.mark.parametrize("scene", ["masks", "mixed sizes and masks"])
def test_images_and_masks_are_cached_on_the_device_and_those_of_evaluation_on_the_host(scenes, scene):
    with VirtualDevice():
        manager = Training(scenes[scene], "mixture", DEVICE).pipeline.datamanager
        cached, evaluated = next(manager.iter_train_image_dataloader), next(manager.iter_eval_image_dataloader)
    for key in ("image", "mask"):
        assert {image.device for image in cached[key]} == {DEVICE}
        assert {image.device.type for image in evaluated[key]} == {"cpu"}
    assert {image.dtype for batch in (cached, evaluated) for image in batch["image"]} == {torch.uint8}


def test_steps_on_the_device_give_the_numbers_of_the_cpu(scenes):
    losses = []
    for device in (torch.device("cpu"), DEVICE):
        with VirtualDevice():
            training = Training(scenes["mixed sizes and masks"], "mixture", device)
            losses.append([training.step().item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_virtual_device_notices_what_it_should():
    with VirtualDevice() as device:
        there, here = torch.arange(3.0, device=DEVICE), torch.arange(3.0)
        with pytest.raises(MixedDevicesError):
            there + here
        with pytest.raises(MixedDevicesError):
            here.add_(there)
        assert device.waits == []
        for wait in (
            lambda: there.sum().item(),
            lambda: bool(there[0] > 0),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: here.to(DEVICE),
            lambda: there[there > 1],
            lambda: there[torch.tensor([0, 1])],
            lambda: there.nonzero(),
            lambda: torch.tensor([1.0], device=DEVICE),
        ):
            device.waits.clear()
            wait()
            assert len(device.waits) == 1
        device.waits.clear()
        there[1:].mul_(2)
        assert there.unsqueeze(0).expand(2, 3).sum() is not None and device.waits == []
        assert there.tolist() == [0.0, 2.0, 4.0]


def test_costs_are_measured_on_the_device_that_is_asked_for(monkeypatch):
    """On CUDA without the deterministic kernels that the CPU needs, whose warnings would count as waits."""
    monkeypatch.setattr(sampler_cost.compat, "prepare_cpu", lambda: pytest.fail("the CPU was prepared"))
    with VirtualDevice():
        cost = sampler_cost.Cost(images=(3,), size=(16, 16), rays=64, steps=2, kinds=("mixture",), device=DEVICE.type)
        sampler_cost.main(cost)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: only the virtual one is tested")
@pytest.mark.parametrize("scene", LISTINGS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
def test_a_step_on_cuda_waits_for_nothing(scenes, kind, scene, monkeypatch):
    training = Training(scenes[scene], kind, torch.device("cuda"))
    training.step()

    def without_waits(method):
        def call(*args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    for name in ("sample", "update"):
        monkeypatch.setattr(MiningPixelSampler, name, without_waits(getattr(MiningPixelSampler, name)))
    for _ in range(3):
        assert training.step().isfinite()


def test_rays_are_made_in_full_precision(tmp_path):
    """nerfstudio's trainer asks for rays within autocast, where its ray generation fails for orthophotos."""
    training = Training(write_capture(tmp_path, camera_model="ORTHOPHOTO"), "langevin", torch.device("cpu"))
    manager = training.pipeline.datamanager
    manager.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            manager.train_ray_generator(torch.zeros(1, 3, dtype=torch.int64))
        rays, batch = manager.next_train(0)
    assert rays.origins.dtype == rays.directions.dtype == batch["image"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_process_does_not_repeat_the_draws_of_the_first_after_resuming(scenes, kind, monkeypatch):
    """Only the first process saves, and all load what it has saved."""

    def draws_after(resumed: bool, rank: int) -> list[Tensor]:
        monkeypatch.setattr(comms, "get_rank", lambda: rank)
        manager = Training(scenes["plain"], kind, torch.device("cpu")).pipeline.datamanager
        manager.train()
        if resumed:
            manager.set_extra_state(deepcopy(saved))
        return [manager.next_train(step)[1]["indices"] for step in (7, 8)]

    first = Training(scenes["plain"], kind, torch.device("cpu"))
    first.step()
    saved = first.pipeline.datamanager.get_extra_state()
    same, apart, anew = draws_after(True, rank=0), draws_after(True, rank=1), draws_after(False, rank=1)
    for step in (0, 1):
        shared = (apart[step][:, None] == same[step]).all(dim=-1).any(dim=-1).float().mean()
        assert shared < 0.5
        assert not torch.equal(apart[step], anew[step])  # nor what it drew when the training began
    assert torch.equal(same[0], draws_after(True, rank=0)[0])


@pytest.mark.parametrize(("saved", "loads"), [("tcnn", False), ("torch", True)])
def test_a_checkpoint_of_the_other_implementation_is_refused(scenes, saved, loads):
    """nerfstudio loads what fits and renders noise."""
    pipeline = Training(scenes["plain"], "mixture", torch.device("cpu")).pipeline
    state = pipeline.state_dict()
    state["_model._extra_state"] = {**state["_model._extra_state"], "implementation": saved}
    if loads:
        pipeline.load_pipeline(state, step=0)
        return
    with pytest.raises(UserError, match=r"trained with --pipeline.model.implementation tcnn.*softmining doctor"):
        pipeline.load_pipeline(state, step=0)


def test_evaluating_loads_no_training_image(tmp_path):
    folder = write_capture(tmp_path / "scene", num_images=12)
    pipeline = Training(folder, "mixture", torch.device("cpu"), begin=False, eval_mode="interval").pipeline
    for file in pipeline.datamanager.train_dataset.image_filenames:
        file.unlink()
    assert "psnr" in pipeline.get_average_eval_image_metrics()
