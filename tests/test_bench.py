"""Laws of `softmining bench`: what it runs, what it keeps, what it says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.models.nerfacto import NerfactoModel
from rich.console import Console

from nerfstudio_softmining.bench import bench, meter, preset, report, training
from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SMALL = {
    "title": "A small comparison",
    "scenes": [
        {
            "path": "scene",
            "method": "softmining-nerfacto-lite-blender",
            "set": ["train_num_rays_per_batch=64", "log2_hashmap_size=10"],
        }
    ],
    "samplers": ["uniform", "langevin,noise=0.03", "error-map"],
    "seeds": [3, 4],
    "at": [4, 8],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_scene(folder / "scene", num_train=4, num_eval=2, size=24)
    return folder


def write_preset(folder: Path, **changes) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def command(path: Path, data: Path, output: Path) -> list[str]:
    start = [sys.executable, "-m", "nerfstudio_softmining.cli", "bench"]
    return [*start, str(path), "--data", str(data), "--output", str(output)]


def wait_for_evaluations(process: subprocess.Popen, output: Path, count: int) -> None:
    deadline, file = time.monotonic() + 300, output / "results.json"
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and len(json.loads(file.read_text())["runs"]) >= count:
            return
        time.sleep(0.01)


def qualities(output: Path) -> dict:
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert len({(run["sampler"], run["seed"], run["iteration"]) for run in runs}) == len(runs)
    return {(run["sampler"], run["seed"], run["iteration"]): (run["psnr"], run["ssim"]) for run in runs}


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_equals_an_uninterrupted_one(data, tmp_path):
    path = write_preset(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    output = subprocess.run(command(path, data, whole), capture_output=True, text=True, timeout=600)
    assert output.returncode == 0, output.stderr[-2000:]
    expected = qualities(whole)
    assert set(expected) == {(s, seed, at) for s in SMALL["samplers"] for seed in (3, 4) for at in (4, 8)}

    for count in (1, 4, 7):  # killed after its first evaluation, in the middle of a run, ...
        process = subprocess.Popen(command(path, data, broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_evaluations(process, broken, count)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(qualities(broken)) < len(expected)
    subprocess.run(command(path, data, broken), capture_output=True, timeout=600, check=True)
    assert qualities(broken) == expected

    for name in ("report.md", "scene_convergence.png", "scene_speed_up.png", "scene_pictures.jpg"):
        assert (whole / name).stat().st_size > 0
    text = (whole / "report.md").read_text()
    assert all(sampler in text for sampler in SMALL["samplers"])
    assert not list((whole / "runs").rglob("*.ckpt"))
    results = json.loads((whole / "results.json").read_text())
    assert {"nerfstudio", "torch", "python"} <= results["versions"].keys() and results["device"]
    for run in results["runs"]:
        assert run["seconds"] > 0 and run["rays_per_second"] > 0 and run["peak_memory"] > 0 and "lpips" in run
    before = (whole / "results.json").read_text()
    finished = subprocess.run(command(path, data, whole), capture_output=True, text=True, timeout=300, check=True)
    assert (whole / "results.json").read_text() == before and "PSNR in dB" in finished.stdout


def fake_training(run: training.Run, on_evaluation, on_step) -> None:
    if run.config.experiment_name == "edge":
        raise RuntimeError("out of memory")
    for at in run.at:
        seconds = {"seconds": 1.0, "seconds_per_step": 0.1, "rays_per_second": 10, "peak_memory": 1}
        on_evaluation({"iteration": at, "psnr": 20.0 + at, "ssim": 0.5, "lpips": None, **seconds})


def test_a_run_that_fails_is_reported_and_the_others_go_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "train", fake_training)
    path, output = write_preset(tmp_path, samplers=["edge", "uniform"]), tmp_path / "out"
    assert not bench.run_bench(path, data, output, {})
    assert {key[0] for key in qualities(output)} == {"uniform"}
    assert "scene, edge, seed 3: RuntimeError: out of memory" in (output / "report.md").read_text()
    monkeypatch.setattr(bench, "train", lambda run, *callbacks: fake_training(replace_name(run), *callbacks))
    assert bench.run_bench(path, data, output, {})
    assert {key[0] for key in qualities(output)} == {"uniform", "edge"}
    assert "out of memory" not in (output / "report.md").read_text()


def replace_name(run: training.Run) -> training.Run:
    run.config.experiment_name = "another"
    return run


def test_runs_of_one_seed_are_in_turn(data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "train", fake_training)
    output = tmp_path / "out"
    bench.run_bench(write_preset(tmp_path, samplers=["uniform", "error-map"]), data, output, {})
    runs = json.loads((output / "results.json").read_text())["runs"]
    order = [(run["seed"], run["sampler"]) for run in runs[::2]]
    assert order == [(seed, sampler) for seed in (3, 4) for sampler in ("uniform", "error-map")]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"samplers": ("nonsense",)}, "nonsense"),
        ({"samplers": ("langevin,nonsense=1",)}, "nonsense"),
        ({"samplers": ("langevin,noise=-1.0",)}, "noise is -1.0"),
        ({"samplers": ("uniform", "uniform")}, "--samplers"),
        ({"scenes": ("elsewhere",)}, "elsewhere"),
        ({"scenes": ("elsewhere",), "method": "softmining-nerfacto"}, "elsewhere"),
        ({"method": "nerfacto"}, "nerfacto"),
        ({"at": (8, 4)}, "--at"),
        ({"at": (0, 4)}, "--at"),
        ({"dataparser": "nonsense"}, "--dataparser"),
    ],
)
def test_a_users_mistake_is_named_before_anything_is_run(changes, word, data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "train", lambda *_: pytest.fail("has been run"))
    with pytest.raises(UserError, match=word):
        bench.run_bench(write_preset(tmp_path), data, tmp_path / "out", changes)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "title: x\nscenes: [{nonsense: 1}]\nsamplers: [uniform]"])
def test_a_file_that_is_no_preset_is_refused(text, tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="preset"):
        preset.read(path)
    with pytest.raises(UserError, match="missing.yaml"):
        preset.read(tmp_path / "missing.yaml")


def test_results_of_other_settings_are_not_mixed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "train", fake_training)
    path, output = write_preset(tmp_path), tmp_path / "out"
    bench.run_bench(path, data, output, {})
    kept = (output / "results.json").read_text()
    for changes in ({"at": (4, 9)}, {"image_scale": 0.5}, {"set": ("alpha=0.1",)}):
        with pytest.raises(UserError, match="other settings"):
            bench.run_bench(path, data, output, changes)
    assert (output / "results.json").read_text() == kept
    bench.run_bench(path, data, output, {"samplers": ("quadtree",), "seeds": (5,)})
    assert ("quadtree", 5, 8) in qualities(output) and ("uniform", 3, 8) in qualities(output)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_preset_can_be_run(path, tmp_path):
    comparison = preset.read(path)
    for scene in comparison.scenes:
        used = set()
        for sampler in comparison.samplers:
            config = preset.trainer_config(scene, sampler, 7, tmp_path, tmp_path, used)
            assert config.machine.seed == 7 and config.data == tmp_path / scene.path
        assert used >= set(scene.set)
    assert comparison.paper is None or (comparison.folder / comparison.paper).is_file()


def test_settings_reach_their_place(tmp_path):
    scene = preset.read(CONFIGS[0]).scenes[0]
    scene = replace(scene, set=("alpha=0.25", "train_num_rays_per_batch=99"), dataparser="colmap")
    config = preset.trainer_config(scene, "langevin,reinit_from=uniform,drift=2e-4", 0, tmp_path, tmp_path)
    manager = config.pipeline.datamanager
    assert manager.pixel_sampler.kind == "langevin"
    assert (manager.pixel_sampler.langevin.reinit_from, manager.pixel_sampler.langevin.drift) == ("uniform", 2e-4)
    assert (config.pipeline.model.alpha, manager.train_num_rays_per_batch) == (0.25, 99)
    assert "Colmap" in type(manager.dataparser).__name__
    peer = preset.trainer_config(replace(scene, dataparser=None), "nerfacto", 0, tmp_path, tmp_path)
    assert peer.method_name == "nerfacto" and peer.pipeline.datamanager.train_num_rays_per_batch == 99
    weighted = preset.trainer_config(scene, "uniform-weighted", 0, tmp_path, tmp_path).pipeline
    assert (weighted.datamanager.pixel_sampler.kind, weighted.model.weight_by) == ("uniform", "importance")
    llff = replace(scene, method="softmining-nerfacto-lite-llff", set=("downscale_factor=8",), dataparser=None)
    for sampler in ("mixture", "nerfacto"):
        dataparser = preset.trainer_config(llff, sampler, 0, tmp_path, tmp_path).pipeline.datamanager.dataparser
        assert dataparser.downscale_factor == 8
    surface = replace(scene, method="softmining-neus-facto", set=("inside_outside=False", "lr=1e-3", "warm_up_end=7"))
    config = preset.trainer_config(surface, "mixture", 0, tmp_path, tmp_path)
    fields = config.optimizers["fields"]
    assert config.pipeline.model.sdf_field.inside_outside is False
    assert (fields["optimizer"].lr, fields["scheduler"].warm_up_end) == (1e-3, 7)


def test_a_setting_that_no_run_has_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "train", fake_training)
    path = write_preset(tmp_path)
    with pytest.raises(UserError, match="'alhpa=0.1'.* is a setting of no run of scene"):
        bench.run_bench(path, data, tmp_path / "out", {"set": ("alhpa=0.1",)})
    assert not (tmp_path / "out").exists()
    # a setting of one sampler is that of a run
    bench.run_bench(path, data, tmp_path / "out", {"set": ("noise=0.05",)})


def test_settings_of_the_command_line_come_after_the_presets():
    part = preset.Scene("lego", method="softmining-nerfacto-lite", set=("alpha=0.5", "backward_fraction=1"))
    changed = bench.override(preset.Preset("title", scenes=(part,), samplers=("uniform",)), {"set": ("alpha=0.2",)})
    assert changed.scenes[0].set == ("alpha=0.5", "backward_fraction=1", "alpha=0.2")
    config = preset.trainer_config(changed.scenes[0], "uniform", 0, Path("data"), Path("out")).pipeline.model
    assert (config.alpha, config.backward_fraction) == (0.2, 1)


@given(st.lists(st.floats(10, 40), min_size=1, max_size=6), st.floats(5, 45))
def test_a_level_is_reached_where_the_curve_first_crosses_it(values, level):
    curve = pd.Series(values, index=[100 * (n + 1) for n in range(len(values))])
    place = report.crossing(curve, level)
    if math.isnan(place):
        assert max(values) < level
        return
    first = curve.index[curve >= level][0]
    assert first - 100 < place <= first or place == 100 == first
    assert (curve[curve.index < place] < level).all()


def entry(sampler: str, seed: int, iteration: int, psnr: float) -> dict:
    times = {"seconds": iteration / 10, "seconds_per_step": 0.1, "rays_per_second": 640, "peak_memory": 10**9}
    return {"scene": "s", "sampler": sampler, "seed": seed, "iteration": iteration, "psnr": psnr, "ssim": 0.5, **times}


def lines_of(table) -> dict[str, str]:
    """The lines of a table by the name in their first column."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return {line.split("|")[1].strip(): line for line in capture.get().splitlines() if line.startswith("|")}


def test_what_is_not_reached_is_said():
    runs = [entry("uniform", seed, at, psnr) for seed in (0, 1) for at, psnr in ((100, 20.0), (200, 22.0))]
    runs += [entry("edge", 0, 100, 21.0), entry("edge", 0, 200, 23.0), entry("edge", 1, 100, 19.0)]
    runs += [entry("edge", 1, 200, 20.0)]  # 20.0 and 21.5 on the mean
    runs = report.to_frame(runs)
    lines = lines_of(report.iterations((20.5, 22.0, 30.0), runs))
    uniform, edge = lines["uniform"], lines["edge"]
    assert "125 (1.00x)" in uniform and "200 (1.00x)" in uniform and uniform.count("not reached") == 1
    assert "133 (0.94x)" in edge and edge.count("not reached") == 2
    lines = lines_of(report.iterations((), runs))
    assert "20.00 dB" in lines["sampler"] and "22.00 dB" in lines["sampler"]
    assert "at most 100" in lines["uniform"] and "200 (1.00x)" in lines["uniform"]


def test_seconds_are_compared_with_stock_nerfacto_where_it_is_there():
    runs = [
        {**entry(sampler, 0, at, psnr), "seconds": seconds}
        for sampler, rows in {
            "uniform": [(100, 20.0, 5.0), (200, 22.0, 10.0)],
            "nerfacto": [(100, 20.0, 10.0), (200, 22.0, 20.0)],
            "mixture": [(100, 21.0, 6.0), (200, 23.0, 12.0)],
        }.items()
        for at, psnr, seconds in rows
    ]
    frame = report.to_frame(runs)
    lines = lines_of(report.seconds((21.5, 25.0), frame))
    assert "18 (1.00x)" in lines["nerfacto"] and "8 (2.33x)" in lines["mixture"]
    assert all("not reached" in lines[name] for name in ("uniform", "nerfacto", "mixture"))
    lines = lines_of(report.seconds((21.5,), frame[frame["sampler"] != "nerfacto"]))
    assert "9 (1.00x)" in lines["uniform"] and "(1.17x)" in lines["mixture"]


def test_gains_over_all_scenes_are_those_over_the_same_seed_where_all_scenes_have_it():
    runs = report.to_frame(
        [
            {**entry(sampler, seed, at, 20.0 + seed + gain * number), "scene": scene}
            for scene, number in (("a", 1), ("b", 3))
            for sampler, gain in (("uniform", 0.0), ("edge", 0.5), ("error-map", 1.0))
            for seed in (0, 1)
            for at in (100, 200)
            if (sampler, seed, at, scene) != ("error-map", 1, 200, "b")
        ]
    )
    lines = lines_of(report.gains(runs, "uniform", "Gain"))
    assert lines["edge"].split("|")[2:5] == ["     2 ", " 1.00 ± 0.00 ", " 1.00 ± 0.00 "]
    assert lines["error-map"].count("2.00") == 2 and "±" not in lines["error-map"] and "uniform" not in lines
    alone = runs[runs["scene"] == "a"]
    lines = lines_of(report.gains(alone, "edge", "Gain"))
    assert lines["uniform"].count("-0.50 ± 0.00") == 2 and "edge" not in lines
    assert lines["error-map"].count("0.50 ± 0.00") == 2
    assert any("Gain over uniform" in str(table.title) for table in report.tables((), alone))
    assert (
        lines_of(report.gains(alone[alone["sampler"] == "uniform"], "uniform", "Gain"))
        .keys()
        .isdisjoint(SMALL["samplers"])
    )


def test_means_and_spreads_are_those_of_the_seeds():
    assert report.mean_and_spread([20.0, 22.0, 24.0]) == "22.00 ± 2.00"
    assert report.mean_and_spread([20.0]) == "20.00" and report.mean_and_spread([None]) == "-"


def test_the_papers_figures_stand_beside_ours():
    comparison = preset.read(next(path for path in CONFIGS if path.stem == "table1"))
    runs = [entry(sampler, 0, 1000, psnr) for sampler, psnr in (("uniform", 26.0), ("langevin", 27.5))]
    runs = report.to_frame([{**run, "scene": "nerf_synthetic/lego"} for run in runs])
    line = lines_of(report.with_paper(comparison.folder / comparison.paper, runs))["lego"]  # the last one
    assert "27.50 (+1.50)" in line and "29.58 (+2.54)" in line  # table 1 of the paper


def test_evaluation_is_not_counted_as_training(monkeypatch):
    clock = iter([0.0, 1.0, 100.0, 102.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    clocked = meter.Meter(10.0)
    for _ in range(2):
        with clocked:
            pass
    assert clocked.read(64)["seconds"] == 13.0
    assert clocked.read(64)["rays_per_second"] == round(64 / 1.5)


def test_steps_are_timed_beside_stock_nerfacto_with_the_same_model(data, tmp_path):
    scene = SMALL["scenes"][0] | {"same_settings": True}
    names = ["nerfacto,datamanager=vanilla", "uniform", "mixture", "mixture,vis=viewer"]
    path = write_preset(tmp_path, scenes=[scene], samplers=names, seeds=[0], rounds=3, steps=4)
    output = tmp_path / "out"
    run = subprocess.run(command(path, data, output), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    costs = json.loads((output / "step_time.json").read_text())["scene"]
    assert list(costs) == names
    for name, cost in costs.items():
        assert len(cost["seconds"]) == 2 and min(cost["seconds"]) > 0
        stages = cost["stages"]
        assert all(stages[stage] > 0 for stage in ("draw", "rays", "forward", "loss", "backward", "optimizers"))
        assert 0.2 < sum(stages.values()) / max(cost["seconds"]) < 5
        assert cost["operations"] > 500 and cost["host_memory"] > 1e8 and cost["start_up"] > 1
        assert name in (output / "report.md").read_text()
    assert (output / "scene_stages.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_method_that_cannot_be_timed_is_named_and_the_others_are_timed(data, tmp_path):
    (tmp_path / "empty" / "broken").mkdir(parents=True)
    (tmp_path / "empty" / "scene").symlink_to(data / "scene")
    scenes = [SMALL["scenes"][0] | {"path": name} for name in ("broken", "scene")]
    path = write_preset(tmp_path, scenes=scenes, samplers=["uniform"], seeds=[0], rounds=2, steps=1)
    run = subprocess.run(
        command(path, tmp_path / "empty", tmp_path / "out"), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 1 and "Traceback" not in run.stdout + run.stderr
    assert "broken, uniform failed: Blender finds no scene" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "step_time.json").read_text())["scene"]["uniform"]["seconds"]


@pytest.mark.parametrize("changes", [{"rounds": 1}, {"rounds": -2}, {"rounds": 3, "steps": 0}])
def test_rounds_without_anything_to_time_are_refused(data, tmp_path, changes):
    with pytest.raises(UserError, match="rounds is"):
        bench.run_bench(write_preset(tmp_path, **changes), data, tmp_path / "out", {})


def test_another_method_gets_the_settings_of_the_scenes_method(data):
    scene = preset.Scene("scene", SMALL["scenes"][0]["method"], same_settings=True)
    ours = preset.trainer_config(scene, "uniform", 0, data, data)
    theirs = preset.trainer_config(scene, "nerfacto,datamanager=vanilla", 0, data, data)
    ours_model, theirs_model = vars(ours.pipeline.model), vars(theirs.pipeline.model)
    assert {name: ours_model[name] for name in theirs_model.keys() - {"_target"}} == {
        name: value for name, value in theirs_model.items() if name != "_target"
    }
    assert theirs.pipeline.model._target is NerfactoModel and ours.pipeline.model._target is not NerfactoModel
    assert type(theirs.pipeline.datamanager) is VanillaDataManagerConfig
    assert theirs.pipeline.datamanager.train_num_rays_per_batch == ours.pipeline.datamanager.train_num_rays_per_batch
    for group, settings in ours.optimizers.items():
        assert theirs.optimizers[group]["optimizer"].lr == settings["optimizer"].lr
        assert type(theirs.optimizers[group]["optimizer"]) is AdamOptimizerConfig
    alone = preset.trainer_config(replace(scene, same_settings=False), "nerfacto", 0, data, data)
    assert alone.pipeline.model.max_res != ours.pipeline.model.max_res


def test_a_run_has_a_viewer_where_it_is_asked_for(data):
    scene = preset.Scene("scene", SMALL["scenes"][0]["method"])
    for name in ("uniform", "nerfacto"):
        assert not preset.trainer_config(scene, name, 0, data, data).is_viewer_enabled()
        assert preset.trainer_config(scene, f"{name},vis=viewer", 0, data, data).is_viewer_enabled()


@pytest.mark.skipif(os.name != "posix", reason="only POSIX can send Ctrl-C to one other process")
def test_ctrl_c_keeps_what_is_finished(data, tmp_path):
    path, output = write_preset(tmp_path, at=[4, 4000]), tmp_path / "out"
    process = subprocess.Popen(
        command(path, data, output),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    wait_for_evaluations(process, output, 1)
    process.send_signal(signal.SIGINT)
    try:
        text = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in text
    assert len(qualities(output)) == 1
