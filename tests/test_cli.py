"""Laws of the `softmining` command: how it ends, what it keeps, what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from sampler_cases import feed, make_sampler

from nerfstudio_softmining import cli, doctor
from nerfstudio_softmining.demo import demo
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSamplerConfig

SOFTMINING = [sys.executable, "-m", "nerfstudio_softmining.cli"]


def softmining(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTMINING, *arguments], cwd=cwd, capture_output=True, text=True, timeout=180)


# --------------------------------------------------------------------------------------------------------------- cli


def test_a_users_mistake_ends_with_its_message_alone(tmp_path: Path) -> None:
    result = softmining("demo", "--iterations", "0", cwd=tmp_path)
    assert result.returncode == 1
    assert "--iterations is 0" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("keep")
    with pytest.raises(UserError, match="is a file"):
        demo.run_demo(file, iterations=1, seed=0)
    assert file.read_text() == "keep"


def test_importing_the_command_line_is_light() -> None:
    heavy = "{'torch', 'nerfstudio', 'numpy', 'matplotlib', 'cv2'} & set(sys.modules)"
    code = f"import sys, nerfstudio_softmining.cli; sys.exit(str({heavy}) if {heavy} else 0)"
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0


def test_every_parameter_has_its_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["softmining", "demo", "--help"])
        cli.main()
    text = capsys.readouterr().out
    for told in ("--output", "--iterations", "--seed", "Folder for everything", "Training steps of", "Seed of"):
        assert told in text


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    monkeypatch.setattr(sys, "argv", ["softmining", "demo"])
    assert cli.main() == 130
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture
def fake_nerfstudio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `nerfstudio.scripts` package of the test's own; the path of its `train.py`, yet to be written."""
    scripts = tmp_path / "fake" / "nerfstudio" / "scripts"
    scripts.mkdir(parents=True)
    for package in (scripts, scripts.parent):
        (package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    return scripts / "train.py"


def test_all_that_a_command_prints_is_told_and_kept(fake_nerfstudio: Path, tmp_path: Path) -> None:
    fake_nerfstudio.write_text("import sys; print('10 (1.00%)  5 ms'); print(sys.argv[1:], '🎉', file=sys.stderr)")
    lines: list[str] = []
    demo.run_logged("train", ["--x", "1"], tmp_path / "log", lines.append)
    assert sorted(lines) == ["10 (1.00%)  5 ms\n", "['--x', '1'] 🎉\n"]
    assert (tmp_path / "log").read_text(encoding="utf-8") == "".join(lines)


def test_a_command_that_fails_is_shown_by_its_last_lines(fake_nerfstudio: Path, tmp_path: Path) -> None:
    fake_nerfstudio.write_text("for i in range(99): print('line', i)\nraise SystemExit(3)")
    with pytest.raises(UserError) as error:
        demo.run_logged("train", [], tmp_path / "log", lambda line: None)
    message = str(error.value)
    assert "exit code 3" in message and "line 98" in message and "line 50" not in message
    assert str(tmp_path / "log") in message


def test_a_command_does_not_outlive_an_interruption(fake_nerfstudio: Path, tmp_path: Path) -> None:
    fake_nerfstudio.write_text("import os, time\nprint(os.getpid())\ntime.sleep(60)")
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        demo.run_logged("train", [], tmp_path / "log", interrupt)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIG_DFL)


def test_progress_is_read_from_what_nerfstudio_writes(capsys: pytest.CaptureFixture[str]) -> None:
    from nerfstudio.configs.base_config import LocalWriterConfig
    from nerfstudio.utils import writer

    local = writer.LocalWriter(LocalWriterConfig(enable=True, max_log_size=0))
    writer.GLOBAL_BUFFER.update(max_iter=1000, steps_per_log=10, events={}, max_buffer_size=20)
    try:
        for step in (0, 250, 1250):
            writer.GLOBAL_BUFFER["step"] = step
            writer.EVENT_STORAGE[:] = [{"name": "ETA (time)", "event": 1.5, "step": step, "write_type": None}]
            local.write_stats_log(step)
    finally:
        writer.EVENT_STORAGE.clear()
        writer.GLOBAL_BUFFER.clear()
    steps = [demo.PROGRESS_LINE.match(line) for line in capsys.readouterr().out.splitlines()]
    assert [int(match.group(1)) for match in steps if match] == [0, 250, 1250]


def test_nothing_of_an_earlier_demo_is_overwritten(tmp_path: Path) -> None:
    for name in ("run", "run-2", "run-3"):
        folder = demo.fresh_folder(tmp_path)
        assert folder == tmp_path / name and not list(folder.iterdir())
        (folder / "kept").touch()


def test_rays_are_drawn_from_the_last_checkpoint(tmp_path: Path) -> None:
    """As the sampler has learnt to: where errors were large, although all images look the same."""
    folder = tmp_path / "nerfstudio_models"
    folder.mkdir()
    images = [np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)] * 3
    sampler, batch = make_sampler(200, 3, kind=MiningPixelSamplerConfig().kind), {"image_idx": torch.arange(3)}
    batch |= {"image": [torch.from_numpy(image) / 255 for image in images]}
    for _ in range(40):
        rays = sampler.sample(batch)
        sampler.update(feed(rays["mining"], importance=0.02 + 0.88 * (rays["indices"][:, 0] == 1)))
    state = {"step": 999, "pipeline": {"datamanager._extra_state": {"sampler": sampler.state_dict()}}, "optimizers": {}}
    (folder / "step-000000499.ckpt").write_text("an older one")
    torch.save(state, folder / "step-000000999.ckpt")
    indices = demo.next_rays(tmp_path, images)
    counts = np.bincount(indices[:, 0], minlength=3)
    assert len(indices) == demo.SHOWN_RAYS and counts[1] > 0.8 * len(indices)
    figure = demo.rays_figure(images, indices)
    drawn = [axis.collections[0].get_offsets() for axis in figure.axes]
    assert [len(points) for points in drawn] == sorted(counts, reverse=True)
    # x is the column; the image with most rays comes first
    np.testing.assert_allclose(drawn[0], indices[indices[:, 0] == 1, :0:-1] + 0.5)


# ------------------------------------------------------------------------------------------------------------ doctor


def register(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Let these be all that is registered, in any group."""
    entries = [EntryPoint(f"entry-{i}", value, "any group") for i, value in enumerate(values)]
    monkeypatch.setattr(doctor, "entry_points", lambda group: entries)


def test_the_doctor_wants_nothing_that_is_not_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    register(monkeypatch, "nerfstudio_softmining.errors:UserError")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.run_doctor() == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for check in doctor.CHECKS:
        assert check.item in text
    assert str(tmp_path / "checkpoints") in text
    assert "problem" not in text


def test_the_doctor_runs_from_the_command_line(tmp_path: Path) -> None:
    if not entry_points(group=doctor.PLUGIN_GROUPS["methods"], name="softmining-nerfacto"):
        pytest.skip("the plugin is not installed here, so nothing is registered")
    result = softmining("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "softmining-nerfacto-lite-blender" in result.stdout and "Traceback" not in result.stderr


def test_a_method_that_does_not_load_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, "nerfstudio_softmining.errors:UserError", "nerfstudio_softmining.no_such_module:x")
    row = doctor.check_registered("methods")
    assert row.state == "problem" and row.fix
    assert "entry-1" in row.found and "no_such_module" in row.found and "entry-0" not in row.found
    assert doctor.run_doctor() == 1
    assert "To be mended: methods, dataparsers." in capsys.readouterr().out


def test_other_plugins_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "somebody_elses.broken:method")
    row = doctor.check_registered("methods")
    assert row.state == "problem" and "none registered" in row.found


@pytest.mark.parametrize("required", [True, False])
def test_a_check_that_breaks_is_a_row(required: bool) -> None:
    def look() -> doctor.Row:
        raise OSError("[libbroken.so] not found\nand more")

    row = doctor.answer(doctor.Check("thing", look, required))
    assert row.state == ("problem" if required else "note")
    assert row.found == "OSError: [libbroken.so] not found"


@pytest.mark.parametrize(
    ("version", "state"),
    [("1.1.5", "ok"), ("1.1.5.post1", "ok"), ("1.1.9", "ok"), ("1.1.4", "problem"), ("1.2.0", "problem")],
)
def test_only_the_known_minor_version_of_nerfstudio_is_accepted(version: str, state: str) -> None:
    assert doctor.judge_nerfstudio(version).state == state
