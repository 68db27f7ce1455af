"""Any settings train, or are refused by a message that names one of them: no traceback, no hang.

Quick tests try some cases of each kind. `pytest -m slow -k random_settings -rP` tries thousands, and prints how many.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st
from image_cases import SMALL, make_photo
from sampler_cases import CASES, NAN, feed, make_config, wild
from setting_cases import changes, try_settings
from training_cases import Training

from nerfstudio_softmining.bench.bench import _check, override
from nerfstudio_softmining.bench.preset import Preset, Scene, trainer_config
from nerfstudio_softmining.bench.preset import read as read_preset
from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.mining.importance import soft_weights
from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManagerConfig
from nerfstudio_softmining.plugin.model import SoftMiningConfig
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY, SPECS, MiningPixelSamplerConfig
from nerfstudio_softmining.samplers.registry import samplers

ERRORS = (1.0, 1.0, 0.0, 1e-30, 1e30, NAN)
"""Factors on the errors of rays."""
SCENES = ("one size", "list", "rgba", "single", "masked list", "mask", "masked equirectangular list")


def sizes(quick: int, slow: int) -> pytest.MarkDecorator:
    """Run a test with a few cases, and where slow tests run with many."""
    return pytest.mark.parametrize("count", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def assert_settled(tally: dict[str, int], count: int, trained: float = 0.2) -> None:
    """Both outcomes are common, so that neither side goes untested."""
    assert tally["trained"] > trained * count and tally["refused"] > count / 20, tally


# ------------------------------------------------------------------------------------------------------------ samplers


@st.composite
def sampler_cases(draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(SPECS)))
    but_for = ("kind", "num_rays_per_batch")
    own, shared = draw(changes(SPECS[kind].config, MiningPixelSamplerConfig, but_for=but_for))
    return {
        "kind": kind,
        "scene": draw(st.sampled_from(SCENES)),
        "settings": own | shared,
        "rays": draw(st.sampled_from((64, 64, 64, 64, 2, 1, 65, 600)) | st.sampled_from((0, -1))),
        "error": draw(st.sampled_from(ERRORS)),
    }


def train_sampler(case: dict[str, Any]) -> None:
    scene = CASES[case["scene"]]
    torch.manual_seed(0)
    sampler = make_config(case["kind"], case["rays"], **scene.settings | case["settings"]).setup(num_images=9)
    sampler._importance = lambda indices: case["error"] * torch.ones(len(indices))
    sampler.training, batch = True, scene.batch()
    for step in range(3):
        rays = sampler.sample(batch)
        mining = rays[BATCH_KEY]
        assert len(mining.indices) == case["rays"] and rays["image"].isfinite().all()
        scene.place(mining.indices)  # all are on cached images
        weights = soft_weights(mining.density_ratio, 0.8)
        assert (mining.density_ratio >= 0).all() and weights.isfinite().all()
        feed(mining, wild(case["rays"], step), case["error"] * torch.rand(case["rays"]))
        sampler.update(mining)


@sizes(60, 6000)
def test_any_settings_of_any_sampler_draw_or_are_refused(count):
    names = ("rays_per_batch", "ignore_mask")
    tally = try_settings(count, sampler_cases(), train_sampler, lambda case: (*names, *case["settings"]))
    assert_settled(tally, count)


# ------------------------------------------------------------------------------------------------------------ pipeline


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scene"
    write_scene(folder, num_train=3, num_eval=2, size=16)
    return folder


@st.composite
def pipeline_cases(draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(["mixture", "mixture", *sorted(SPECS)]))
    manager, model = draw(changes(SoftMiningDataManagerConfig, SoftMiningConfig))
    return {"kind": kind, "manager": manager, "model": model}


@sizes(12, 1000)
def test_any_settings_of_the_datamanager_and_the_loss_train_or_are_refused(count, scene):
    def train(case: dict[str, Any]) -> None:
        training = Training(scene, kind=case["kind"], manager=case["manager"], **case["model"])
        for _ in range(2):
            training.step()
            assert training.last.weighted_error.isfinite().all()
        _, losses, _ = training.pipeline.get_eval_loss_dict(2)
        assert all(loss.isfinite() for loss in losses.values())
        assert all(part.isfinite().all() for part in training.pipeline.model.parameters())

    names = ("train_num_rays_per_batch",)
    tally = try_settings(count, pipeline_cases(), train, lambda case: (*names, *case["manager"], *case["model"]))
    assert_settled(tally, count)


# -------------------------------------------------------------------------------------------------------------- photos


@st.composite
def fit_cases(draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(samplers())))
    config, sampler = draw(changes(FitConfig, samplers()[kind].config, but_for=("implementation",)))
    return {
        "kind": kind,
        "config": SMALL | config,
        "sampler": sampler,
        "size": draw(st.sampled_from(((24, 40), (24, 40), (1, 1), (3, 90)))),
    }


def train_fit(case: dict[str, Any]) -> None:
    """Settings of the sampler are given as on the command line, as text."""
    sampler = ",".join((case["kind"], *(f"{name}={value}" for name, value in case["sampler"].items())))
    fit = Fit(make_photo(*case["size"]), make_settings(sampler, 0, 10, FitConfig(**case["config"])))
    for _ in range(3):
        fit.step()
        assert fit.loss.batch is not None and fit.loss.batch.weighted_error is not None
        assert fit.loss.batch.weighted_error.isfinite().all()
    assert torch.tensor(fit.psnr()).isfinite() and all(part.isfinite().all() for part in fit.field.parameters())


@sizes(40, 2500)
def test_any_settings_of_a_fit_train_or_are_refused(count):
    tally = try_settings(count, fit_cases(), train_fit, lambda case: (*case["config"], *case["sampler"]))
    assert_settled(tally, count)


# ---------------------------------------------------------------------------------------------------------------- text

LITERALS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=4,
)
CONFIGS = [FitConfig, SoftMiningConfig, SoftMiningDataManagerConfig, *(spec.config for spec in samplers().values())]
NAMES = sorted({field.name for config in CONFIGS for field in fields(config)} | {"_target", "", "set", "nonsense"})
ODD = ("((" * 200, "{[]: 1}", "1" * 5000, "1e999", "-", "\0", "'", "__import__('os')", "9" * 400)


@st.composite
def assignments(draw) -> str:
    """Something like name=value."""
    name = draw(st.sampled_from(NAMES))
    if draw(st.booleans()):
        return f"{name}={draw(st.sampled_from(('0', '0.5', '1', '2', '64', 'True', 'uniform', 'density', '(1,)')))}"
    value = draw(st.one_of(LITERALS.map(repr), st.text(max_size=8), st.sampled_from(ODD)))
    return draw(st.one_of(st.just(f"{name}={value}"), st.just(name + value), st.text(max_size=12)))


@sizes(80, 5000)
def test_any_text_for_a_setting_is_applied_or_refused(count):
    def set_up(case: tuple[str, str, str]) -> None:
        kind, text, place = case
        if place == "image":
            make_settings(f"{kind},{text}", 0, 10, FitConfig())
            return
        scene = Scene("scene", "softmining-nerfacto-lite-blender", set=(text,) if place == "set" else ())
        trainer_config(scene, kind if place == "set" else f"{kind},{text}", 0, Path("data"), Path("outputs"))

    kinds = st.sampled_from((*samplers(scenes=True), *samplers(scenes=True), "nonsense", "", "nerfacto"))
    cases = st.tuples(kinds, assignments(), st.sampled_from(("image", "bench", "set")))
    assert_settled(try_settings(count, cases, set_up, lambda case: ("",)), count, 0.01)


@sizes(80, 5000)
def test_any_file_is_a_preset_or_refused(count, tmp_path):
    path = tmp_path / "preset.yaml"
    scene_keys, keys = ([field.name for field in fields(part)] for part in (Scene, Preset))

    def some(keys: list[str], **usual: Any) -> st.SearchStrategy:
        """Some keys with any values, beside usual ones."""
        changed = st.dictionaries(st.sampled_from(keys), LITERALS, max_size=1)
        return st.one_of(st.just({}), st.just({}), changed).map(lambda values: usual | values)

    usual = some(scene_keys, path="scene", method="softmining-nerfacto-lite")
    scene = st.one_of(usual, usual, usual, LITERALS)
    preset = st.tuples(some(keys, title="a", samplers=["uniform"]), st.lists(scene, min_size=1, max_size=1))
    content = preset.map(lambda pair: yaml.dump({"scenes": pair[1]} | pair[0])).map(str.encode)
    (tmp_path / "scene").mkdir()

    def read(case: bytes) -> None:
        path.write_bytes(case)
        _check(override(read_preset(path), {}), tmp_path, tmp_path / "out")

    cases = st.one_of(content, content, content, st.binary(max_size=30), st.text(max_size=30).map(str.encode))
    assert_settled(try_settings(count, cases, read, lambda case: ("",)), count, 0.01)
