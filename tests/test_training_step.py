"""One training step as a whole: datamanager, model, backward pass, and the sampler that is told."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManager
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.engine.callbacks import TrainingCallbackAttributes
from training_cases import Training

from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY, SPECS, MiningPixelSampler, MiningPixelSamplerConfig

KINDS = tuple(SPECS)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scene"
    write_scene(folder, num_train=4, num_eval=1, size=24)
    return folder


def same(first, second) -> bool:
    return all(torch.allclose(a, b, equal_nan=True, atol=1e-4) for a, b in zip(first, second, strict=True))


def test_loss_scale_does_not_move_the_chains(scene):
    plain, scaled = Training(scene), Training(scene, loss_scale=2.0**12)
    for training in (plain, scaled):
        torch.manual_seed(1)
        training.step()
    assert same(plain.pool, scaled.pool)


def test_skipped_step_leaves_the_pool_and_the_next_one_moves_it(scene):
    training = Training(scene, loss_scale=2.0**12)
    training.step()
    before = training.pool
    training.step(spoil=float("inf"))
    assert training.scaler.get_scale() < 2.0**12
    assert same(before, training.pool)
    training.step()
    assert not same(before, training.pool)


@pytest.mark.parametrize("background", ["white", "black", "random", "last_sample"])
def test_trains_on_every_background(scene, background):
    training = Training(scene, background_color=background)
    for _ in range(3):
        training.step()
    assert training.pool.position.isfinite().all()


def test_trains_in_mixed_precision(scene):
    training = Training(scene, loss_scale=2.0**8)
    for _ in range(3):
        training.step(autocast=True)
    assert training.pool.position.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(scene, kind):
    training = Training(scene, kind=kind)
    for _ in range(4):
        training.step()
    assert training.last.importance.isfinite().all() and (training.last.density_ratio > 0).any()
    assert (training.last.coords is not None) == (kind == "langevin")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
def test_rays_are_weighted_by_their_density_if_asked_for(scene, kind):
    for weighted in (False, True):
        training = Training(scene, kind=kind)
        sampler = training.pipeline.datamanager.train_pixel_sampler
        sampler.config.config_for(kind).importance_weighted = weighted
        sampler.config.config_for(kind).alpha_warmup = 0
        training.step()
        mining = training.last
        known = torch.ones(len(mining.indices), dtype=torch.bool)
        if mining.follows_importance is not None:
            known = ~mining.follows_importance
        weights = mining.density_ratio.pow(-0.6) if weighted else torch.ones_like(mining.density_ratio)
        torch.testing.assert_close(mining.weighted_error[known], (weights * mining.error)[known])


def test_evaluating_all_pixels_gives_their_importance_and_leaves_the_training_as_it_is(scene):
    training = Training(scene, kind="multinomial")
    training.step()
    sampler, model = training.pipeline.datamanager.train_pixel_sampler, training.pipeline.model
    indices = training.last.indices
    random_state, before = torch.get_rng_state(), model.get_extra_state()
    importance = training.pipeline.datamanager._importance(indices)
    after = model.get_extra_state()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(before.pop("error_grid"), after.pop("error_grid")) and after == before
    outputs = model(training.pipeline.datamanager.train_ray_generator(indices))
    expected = (outputs["rgb"] - sampler.batch_at(indices)["image"]).abs().mean(dim=-1)
    # samples along a ray are jittered
    assert torch.corrcoef(torch.stack((importance, expected.detach())))[0, 1] > 0.9


def test_renders_between_steps_leave_the_training_as_it_is(scene):
    """Those of a viewer or an evaluation; proposal networks learn in every fifth step here."""
    results = []
    for renders in (False, True):
        training = Training(scene, kind="mixture", proposal_warmup=1)
        model, cameras = training.pipeline.model, training.pipeline.datamanager.eval_dataset.cameras
        for step in range(20):
            torch.manual_seed(step)
            training.step()
            if renders:
                training.pipeline.eval()
                model.get_outputs_for_camera(cameras[:1])
        results.append(list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_uniform_sampling_is_nerfactos_own(scene):
    """Rays and colours are bit for bit those of nerfstudio's datamanager; the loss is nerfacto's."""
    training = Training(scene, kind="uniform")
    training.pipeline.train()
    torch.manual_seed(3)
    made = []
    training.pipeline.model.register_forward_pre_hook(lambda module, inputs: made.append(inputs[0]))
    outputs, losses, _ = training.pipeline.get_train_loss_dict(5000)
    ours = training.pipeline.datamanager.config
    random.seed(0)
    stock = VanillaDataManagerConfig(data=scene, dataparser=ours.dataparser, train_num_rays_per_batch=64).setup()
    torch.manual_seed(3)
    rays, batch = stock.next_train(5000)
    mining = training.pipeline.datamanager._mining_batch
    assert torch.equal(batch["indices"], mining.indices)
    assert torch.equal(rays.directions, made[0].directions) and torch.equal(rays.origins, made[0].origins)
    torch.testing.assert_close(losses["rgb_loss"], torch.nn.functional.mse_loss(outputs["rgb"], batch["image"]))


@pytest.mark.parametrize("alpha_color", ["white", None])
def test_cached_bytes_become_the_colours_that_nerfstudio_loads(scene, alpha_color):
    training = Training(scene)
    manager = training.pipeline.datamanager
    stock = InputDataset(replace(manager.train_dataparser_outputs, alpha_color=alpha_color and torch.ones(3)))
    config, background = manager.config.pixel_sampler, alpha_color and torch.ones(3)
    sampler = MiningPixelSampler(config, len(manager.train_dataset), background=background)
    sampler.training = True
    cached = next(manager.iter_train_image_dataloader)
    batch = sampler.sample(cached)
    assert cached["image"].dtype == torch.uint8
    expected = [stock[image]["image"][row, column] for image, row, column in batch["indices"].tolist()]
    assert torch.equal(batch["image"], torch.stack(expected))


def test_alpha_of_zero_is_the_models_own_loss(scene):
    training = Training(scene, alpha=0.0)
    training.pipeline.train()
    outputs, losses, _ = training.pipeline.get_train_loss_dict(5000)
    mining = training.pipeline.datamanager._mining_batch
    colours = training.pipeline.datamanager.train_pixel_sampler.batch_at(mining.indices)["image"]
    torch.testing.assert_close(losses["rgb_loss"], torch.nn.functional.mse_loss(outputs["rgb"], colours))


def test_evaluation_loss_is_plain(scene):
    training = Training(scene)
    outputs, losses, _ = training.pipeline.get_eval_loss_dict(5000)
    assert "rgb_loss" in losses and training.pipeline.model.rgb_loss.batch is None


@pytest.mark.parametrize("kind", ["mixture", "uniform"])
def test_the_setting_of_a_crop_acts_without_metadata_of_the_scene(scene, kind):
    sampler = MiningPixelSamplerConfig(kind=kind, fisheye_crop_radius=6.0)
    training = Training(scene, kind=kind, manager={"pixel_sampler": sampler})
    for _ in range(3):
        training.step()
        offset = training.last.indices[:, 1:] + 0.5 - 12  # images have 24 x 24 pixels
        assert offset.norm(dim=1).max() < 6.8  # nerfstudio's own draw rounds down


def test_a_device_without_double_precision_is_refused():
    with pytest.raises(UserError, match="--machine.device-type is mps.*Set it to cpu"):
        compat.prepare("mps")


def test_a_datamanager_in_another_process_is_refused(scene):
    training = Training(scene)
    training.pipeline.datamanager.__class__ = ParallelDataManager
    with pytest.raises(UserError, match="ParallelDataManager"):
        training.pipeline.model.get_training_callbacks(
            TrainingCallbackAttributes(None, training.scaler, training.pipeline, None)
        )


def test_a_batch_from_another_sampler_is_refused(scene):
    training = Training(scene)
    training.pipeline.train()
    rays, batch = training.pipeline.datamanager.next_train(0)
    del batch[BATCH_KEY]
    outputs = training.pipeline.model(rays)
    with pytest.raises(UserError, match="pixel sampler"):
        training.pipeline.model.get_loss_dict(outputs, batch, {})


@pytest.mark.skipif("SOFTMINING_DATA" not in os.environ, reason="SOFTMINING_DATA is not set: the folder of real scenes")
def test_on_a_real_scene_the_pool_stands_where_the_error_is():
    training = Training(Path(os.environ["SOFTMINING_DATA"]) / "nerf_synthetic" / "lego", scale=0.125)
    for _ in range(60):
        training.step()
    mining = training.last
    chains = mining.importance[: -mining.num_uniform]
    assert chains.mean() > 1.2 * mining.importance[-mining.num_uniform :].mean()
