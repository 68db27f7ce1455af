"""Files that others have made neither run code, nor write beside the output, nor change what a page shows."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from captures import train, write_capture
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import SMALL as SMALL_FIT
from image_cases import picture
from test_bench import SMALL as SMALL_BENCH
from test_bench import fake_training
from test_odd_data import build, change_frames
from test_run_page import NASTY, make_run

from nerfstudio_softmining import cli
from nerfstudio_softmining.bench import bench, preset, results, step_time, training
from nerfstudio_softmining.bench.run_page import page
from nerfstudio_softmining.demo import demo
from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import file_name
from nerfstudio_softmining.images import fit, image
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.plugin import compat

CLIMBS = "../../../../outside"
"""A name that leads out of any folder of a comparison."""
ONE_RUN = SMALL_BENCH | {"at": [2], "seeds": [0]}
SAFE_GLOBALS = pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch before 2.4 loads no numpy scalars safely"
)


class Malicious:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# -------------------------------------------------------------------------------------------------------------- code


def test_a_malicious_pickle_is_one(tmp_path):
    """Else the tests below would show nothing."""
    torch.save({"state": Malicious(tmp_path / "run")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "run").is_dir()


def test_the_checkpoint_of_an_image_fit_runs_no_code(tmp_path):
    torch.save({"average": Malicious(tmp_path / "run"), "encoding": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="not the checkpoint of an image fit"):
        fit.load(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="not the checkpoint of an image fit"):
        image.run_render(tmp_path / "checkpoint.pt", tmp_path / "out.png", None, 1.0)
    assert everything(tmp_path) == {tmp_path / "checkpoint.pt"}


@SAFE_GLOBALS
def test_the_checkpoint_of_a_demo_runs_no_code_and_may_hold_numpy_scalars(tmp_path):
    file = tmp_path / "nerfstudio_models" / "step-000000009.ckpt"
    file.parent.mkdir()
    state = {"step": 9, "pipeline": {"datamanager._extra_state": {"sampler": {}}}, "optimizers": {}}
    torch.save(state | {"lr": np.float64(0.1)}, file)
    images = [picture(16, 16)]
    assert len(demo.next_rays(tmp_path, images)) == demo.SHOWN_RAYS
    torch.save(state | {"optimizers": Malicious(tmp_path / "run")}, file)
    with pytest.raises(UserError, match="none of which can be read"):
        demo.next_rays(tmp_path, images)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def preset_file(tmp_path) -> Path:
    write_scene(tmp_path / "data/scene", num_train=2, num_eval=1, size=16)
    return tmp_path / "preset.yaml"


@SAFE_GLOBALS
def test_the_checkpoint_that_a_comparison_resumes_from_runs_no_code(tmp_path, preset_file):
    preset_file.write_text(yaml.safe_dump(SMALL_BENCH | {"at": [2]}))
    ours = preset.read(preset_file)
    config = preset.trainer_config(ours.scenes[0], "uniform", 3, tmp_path / "data", tmp_path / "out")
    file = config.get_base_dir() / "nerfstudio_models" / "step-000000001.ckpt"
    file.parent.mkdir(parents=True)
    torch.save({"step": 1, "pipeline": Malicious(tmp_path / "run")}, file)
    evaluations: list[dict] = []
    entries = [{"iteration": 1, "seconds": 0.0}]
    training.train(training.Run(config, (2,), (), entries), evaluations.append, lambda iteration: None)
    assert evaluations[-1]["iteration"] == 2 and not (tmp_path / "run").exists()


def test_a_depth_map_runs_no_code(tmp_path):
    def depth(number: int, frame: dict) -> None:
        frame["depth_file_path"] = f"depths/{number:03}.npy"
        content = np.array([Malicious(tmp_path / "run")], dtype=object)
        np.save(tmp_path / frame["depth_file_path"], content, allow_pickle=True)

    change_frames(write_capture(tmp_path, 3), depth)
    with pytest.raises(UserError, match=r"the depth map .*\.npy, listed in .*transforms\.json, cannot be read"):
        train(build(tmp_path, method="depth-nerfacto"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_preset_runs_no_code(tmp_path, tag):
    (tmp_path / "preset.yaml").write_text(f"title: {tag} [{tmp_path / 'run'}]\nscenes: []\nsamplers: []")
    with pytest.raises(UserError, match="is not a preset"):
        preset.read(tmp_path / "preset.yaml")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------------- paths


@given(st.text() | st.sampled_from(["..", ".", "", CLIMBS, "C:\\x", "a/../..", ". .", "/", "\0", "a\n"]))
def test_any_name_is_one_part_of_a_path(name):
    base = Path("/base/folder")
    path = base / file_name(name)
    assert path.parent == base and path.name not in ("", ".", "..") and os.path.normpath(path) == str(path)
    assert not set("/\\\0") & set(path.name)


def test_usual_names_are_what_folders_are_called():
    for name in ("scene", "langevin,noise=0.03", "uniform-weighted", "a photo (1)"):
        assert file_name(name) == name


@pytest.mark.parametrize("key", ["seeds", "at", "samplers", "title", "name", "path", "method", "set", "views"])
@pytest.mark.parametrize("value", [[CLIMBS], {"a": 1}, [True]])
def test_a_preset_has_values_of_the_types_of_its_keys(preset_file, key, value):
    """A seed that is text would lead the folder of its run anywhere, which is emptied before the run."""
    content = json.loads(json.dumps(SMALL_BENCH))
    (content if key in content else content["scenes"][0])[key] = value
    preset_file.write_text(yaml.safe_dump(content))
    if isinstance(value, list) and key in ("samplers", "set") and value != [True]:
        preset.read(preset_file)
        return
    with pytest.raises(UserError, match=f"is not a preset.*{key} is "):
        preset.read(preset_file)


def filling_training(run: training.Run, on_evaluation, on_step) -> None:
    """Write files wherever a run has its own."""
    folder = run.config.get_base_dir()
    folder.mkdir(parents=True)
    (folder / "file").touch()
    if run.pictures is not None:
        for at in run.at:
            results.write_bytes(255 * np.random.default_rng(0).random((8, 16, 3)), run.pictures / f"{at}.png")
    fake_training(run, on_evaluation, on_step)


@pytest.mark.parametrize("name", [CLIMBS, "..", "[/red]", ":x:" + NASTY])
def test_names_in_a_preset_lead_nowhere_else_and_are_text(tmp_path, preset_file, name, monkeypatch):
    monkeypatch.setattr(bench, "train", filling_training)
    # a setting of nerfstudio's models that may be any text
    samplers = [f"uniform,prompt=/{name}", "uniform"]
    scene = SMALL_BENCH["scenes"][0] | {"name": name}
    preset_file.write_text(yaml.safe_dump(ONE_RUN | {"title": name, "scenes": [scene], "samplers": samplers}))
    before, output = everything(tmp_path), tmp_path / "here/there/output"
    assert bench.run_bench(preset_file, tmp_path / "data", output, {})
    assert everything(tmp_path) - before - everything(output) == {tmp_path / "here", tmp_path / "here/there", output}
    report = (output / "report.md").read_text()
    assert f"## {name.replace('<', '&lt;')}" in report and "<script" not in report
    assert len(list(output.glob("*_pictures.jpg"))) == 1


@pytest.mark.parametrize("name", [CLIMBS, "[/red]", NASTY])
def test_names_lead_nowhere_else_where_steps_are_timed(tmp_path, preset_file, name, monkeypatch):
    cost = step_time.Cost([0.1, 0.2], dict.fromkeys(step_time.STAGES, 0.1), 5, 1.0, 10, 0)
    monkeypatch.setattr(step_time, "_measure", lambda *arguments: {f"uniform,{name}": cost})
    scene = SMALL_BENCH["scenes"][0] | {"name": name}
    preset_file.write_text(yaml.safe_dump(SMALL_BENCH | {"title": name, "scenes": [scene], "rounds": 2}))
    before, output = everything(tmp_path), tmp_path / "here/output"
    assert bench.run_bench(preset_file, tmp_path / "data", output, {})
    assert everything(tmp_path) - before - everything(output) == {tmp_path / "here", output}
    assert "<script" not in (output / "report.md").read_text()


@pytest.mark.parametrize("name", ["<script>alert(1)<!--&.png", "[red]x[bold].png", "...png", "..png"])
def test_the_name_of_a_photograph_leads_nowhere_else_and_is_text(tmp_path, name, monkeypatch):
    photo, folder = tmp_path / name, tmp_path / "here"
    photo.write_bytes(cv2.imencode(".png", picture(12, 20))[1].tobytes())
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fit, "CHUNK", 64)
    before = everything(tmp_path)
    assert cli.image(photo, None, ("uniform",), (0,), (2,), FitConfig(**SMALL_FIT)) == 0
    output = folder / "outputs/image" / file_name(photo.stem)
    made = everything(tmp_path) - before
    assert made - everything(output) == {folder / "outputs", folder / "outputs/image", output}
    report = (output / "report.md").read_text()
    assert "<script" not in report and "\n![PSNR against" in report


def test_the_name_of_a_preset_leads_nowhere_else(monkeypatch, tmp_path):
    outputs: list[Path] = []
    monkeypatch.setattr(bench, "run_bench", lambda preset, data, output, changes: not outputs.append(output))
    cli.bench(Path("...yaml"), tmp_path)
    assert outputs == [Path("outputs/bench") / file_name(Path("...yaml").stem)] and ".." not in outputs[0].parts


# --------------------------------------------------------------------------------------------------------------- HTML


class Elements(HTMLParser):
    """The elements of a page, their attributes of scripts, and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text += data


@settings(deadline=None, max_examples=12)
@given(st.text(alphabet="<>/\"'&;=script onload!-", max_size=30) | st.sampled_from([NASTY, "</script><img onload=x>"]))
def test_a_page_has_the_same_elements_whatever_the_names(name):
    pages = [page([make_run(run), make_run("b")]) for run in ("harmless", name)]
    harmless, nasty = (Elements(content) for content in pages)
    assert nasty.elements == harmless.elements
    assert name.strip() in nasty.text


@pytest.mark.parametrize("name", [NASTY, "</script><script>alert(1)</script>", "<!--<script>"])
def test_a_page_with_curves_has_the_same_elements_whatever_the_names(name):
    curves = {"Train Metrics Dict/psnr": ([0, 10], [10.0, 12.0])}
    harmless, nasty = (Elements(page([make_run(run, **curves)])) for run in ("harmless", name))
    assert nasty.elements == harmless.elements


def test_only_old_versions_of_torch_load_a_checkpoint_unsafely():
    assert compat.allow_numpy_scalars_in_checkpoints() == hasattr(torch.serialization, "add_safe_globals")
