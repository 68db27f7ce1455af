"""Checkpoints: whole or not there at all, never run as code, and as much of them used as fits."""

from __future__ import annotations

import contextlib
import pickle
import resource
import shutil
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from captures import write_capture
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from trainer_cases import METHOD, assert_same, checkpoints, make_trainer, read, small_config

from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.checkpoints import write
from nerfstudio_softmining.plugin.pixel_sampler import SPECS
from nerfstudio_softmining.plugin.trainer import RESUME

STEPS = 12


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scene"
    write_scene(folder, num_train=4, num_eval=1, size=24)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scene) -> Any:
    """The settings of a finished training with three checkpoints."""
    config = small_config(scene, tmp_path_factory.mktemp("whole"), STEPS)
    config.steps_per_save, config.save_only_latest_checkpoint = 4, False
    make_trainer(config).train()
    return config


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of its checkpoints after steps 4, 8 and 11."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(trained.get_checkpoint_dir(), copy)
    return copy


def resumed(scene: Path, folder: Path, steps: int = 2, method: str = METHOD, **sampler) -> Any:
    config = small_config(scene, folder.with_name("resumed"), steps, method=method, **sampler)
    config.load_dir = folder
    return config


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def turn_into_text(path: Path) -> None:
    path.write_text("no checkpoint")


def turn_into_another(path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, path)


DAMAGE = [truncate, flip_bits, empty, turn_into_text, turn_into_another]


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_named(scene, folder, damage, capsys):
    paths = sorted(folder.glob("*.ckpt"))
    damage(paths[-1])
    trainer = make_trainer(resumed(scene, folder))
    printed = capsys.readouterr().out
    assert paths[-1].name in printed.replace("\n", "") and trainer._start_step == 9
    trainer.train()
    printed = capsys.readouterr().out
    assert "9 (81.82%)" in printed and "(100" not in printed  # of 11 steps in all


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_without_a_whole_checkpoint_is_named(scene, folder, damage):
    for path in folder.glob("*.ckpt"):
        damage(path)
    with pytest.raises(UserError, match=r"--load-dir is .*3 checkpoints, none of which can be read"):
        make_trainer(resumed(scene, folder))


def test_what_holds_no_checkpoints_is_named_with_what_to_name_instead(scene, trained, tmp_path):
    run = trained.get_base_dir()
    with pytest.raises(UserError, match=r"has no checkpoints\. Set it to .*nerfstudio_models"):
        make_trainer(resumed(scene, run))
    config = resumed(scene, run / "nerfstudio_models")
    config.load_step = 5
    with pytest.raises(UserError, match=r"there is no checkpoint .*step-000000005.ckpt"):
        make_trainer(config)
    config.load_dir, config.load_checkpoint = None, tmp_path / "none.ckpt"
    with pytest.raises(UserError, match=r"there is no checkpoint .*none.ckpt"):
        make_trainer(config)


class Code:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch before 2.4 loads no numpy scalars safely"
)
def test_code_in_a_checkpoint_does_not_run(scene, folder):
    made = folder / "made"
    for path in folder.glob("*.ckpt"):
        torch.save({**read(path), "more": Code(made)}, path)
    with pytest.raises(UserError, match="none of which can be read"):
        make_trainer(resumed(scene, folder))
    path.write_bytes(pickle.dumps(Code(made)))
    with pytest.raises(UserError, match="none of which can be read"):
        make_trainer(resumed(scene, folder))
    assert not made.exists()
    torch.load(path.with_name("step-000000004.ckpt"), weights_only=False)
    assert made.exists()


def test_a_checkpoint_of_another_number_of_images_keeps_the_field(tmp_path, capsys):
    def config(num_images: int, folder: str) -> Any:
        data = write_capture(tmp_path / f"{num_images}", num_images=num_images)
        config = small_config(data, tmp_path / folder, 4, method="softmining-nerfacto")
        config.pipeline.model.num_levels, config.pipeline.model.log2_hashmap_size = 2, 8
        config.pipeline.datamanager.dataparser.eval_mode = "all"
        return config

    first = config(6, "first")
    make_trainer(first).train()
    second = config(5, "second")
    second.load_dir = first.get_checkpoint_dir()
    capsys.readouterr()
    trainer = make_trainer(second)
    printed = capsys.readouterr().out
    assert "does not fit 5 training images" in printed.replace("\n", " ")
    assert "of 6 training images" in printed.replace("\n", " ")
    before, after = read(checkpoints(first)[0])["pipeline"], trainer.pipeline.state_dict()
    anew = "_model.camera_optimizer.pose_adjustment"
    assert len(after[anew]) == 5 and not after[anew].any() and before[anew].any()
    for name, value in after.items():
        if isinstance(value, torch.Tensor) and before[name].shape == value.shape:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    trainer.train()
    assert trainer.pipeline.state_dict()[anew].any()


def test_a_checkpoint_of_another_model_is_refused(scene, folder, tmp_path):
    config = resumed(scene, folder)
    config.pipeline.model.log2_hashmap_size = 11
    with pytest.raises(UserError, match=r"does not fit SoftMiningNerfactoModel: its parameter .* has the shape"):
        make_trainer(config)
    with pytest.raises(UserError, match=r"does not fit SoftMiningTensoRFModel: its parameter .* is missing"):
        make_trainer(resumed(scene, folder, method="softmining-tensorf"))


def test_a_checkpoint_of_nerfacto_goes_on_soft_mined(scene, tmp_path):
    """It has no sampler and no state of the schedule of proposals, and its Adam runs in many kernels."""
    stock = small_config(scene, tmp_path / "stock", 4, method="nerfacto")
    ours = small_config(scene, tmp_path / "ours", 4, method="softmining-nerfacto")
    for config in (stock, ours):
        config.pipeline.datamanager.dataparser = small_config(scene, tmp_path).pipeline.datamanager.dataparser
        config.pipeline.model.num_levels, config.pipeline.model.log2_hashmap_size = 2, 8
        config.pipeline.model.implementation = "torch"
    stock.pipeline.datamanager._target = small_config(
        scene, tmp_path, method="vanilla-nerf"
    ).pipeline.datamanager._target
    with compat.lenient_metrics():
        make_trainer(stock).train()
    ours.load_dir = stock.get_checkpoint_dir()
    trainer = make_trainer(ours)
    saved, loaded = read(checkpoints(stock)[0])["pipeline"], trainer.pipeline.state_dict()
    names = [name for name, value in loaded.items() if name.startswith("_model.") and isinstance(value, torch.Tensor)]
    assert len(names) > 10 and all(torch.equal(saved[name], loaded[name]) for name in names)
    trainer.train()


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("num_rays", [16, 300])
def test_a_checkpoint_of_another_sampler_or_batch_size_goes_on(scene, folder, kind, num_rays):
    config = resumed(scene, folder, kind=kind)
    config.pipeline.datamanager.train_num_rays_per_batch = num_rays
    trainer = make_trainer(config)
    trainer.train()
    assert len(trainer.pipeline.datamanager.last_batch.indices) == num_rays


def test_parameters_that_are_not_finite_are_named_and_not_saved(scene, folder):
    config = resumed(scene, folder, steps=4)
    config.steps_per_save = 1
    trainer = make_trainer(config)
    parameter = trainer.pipeline.model.field.mlp_head.layers[0].weight

    def spoil(step: int) -> None:
        if step == STEPS + 2:
            parameter.data[0, 0] = torch.nan

    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], spoil, 1))
    message = (
        rf"diverged by step {STEPS + 2}.*field\.mlp_head.*step-0+{STEPS + 1}\.ckpt, is whole.*--optimizers\.fields"
    )
    with pytest.raises(UserError, match=message):
        trainer.train()
    (path,) = checkpoints(config)
    assert all(value.isfinite().all() for value in read(path)["pipeline"].values() if isinstance(value, torch.Tensor))


def test_divergence_is_seen_between_checkpoints_and_its_losses_are_named(scene, folder):
    config = resumed(scene, folder, steps=100)
    config.steps_per_save = 1000
    trainer = make_trainer(config)
    trainer.pipeline.model.field.mlp_head.layers[0].weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"diverged by step 100:.*rgb_loss is nan"):
        trainer.train()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within this, no file can become larger, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_training_goes_on(scene, tmp_path, capsys):
    config = small_config(scene, tmp_path, STEPS)
    config.steps_per_save = 4
    trainer = make_trainer(config)
    save = trainer.save_checkpoint

    def save_on_a_full_disk(step: int) -> None:
        if step == 4:
            save(step)
            return
        with largest_file(20_000):
            save(step)

    trainer.save_checkpoint = save_on_a_full_disk
    with pytest.raises(UserError, match=r"step-0+11\.ckpt cannot be written .* The last one, .*step-0+4\.ckpt, is"):
        trainer.train()
    assert "Training goes on, but the checkpoint" in capsys.readouterr().out
    (path,) = checkpoints(config)
    assert read(path)["step"] == 4 and not list(config.get_base_dir().glob("*.ckpt"))
    assert yaml.load((config.get_base_dir() / RESUME).read_text(), Loader=yaml.Loader).load_checkpoint == path


@pytest.fixture
def usual_signals() -> Iterator[dict[int, Any]]:
    """Signals as a terminal has them; they are ignored where the tests run in the background or under nohup."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_step_and_the_rest_goes_on_bit_for_bit(scene, trained, tmp_path, stop, usual_signals):
    config = small_config(scene, tmp_path, STEPS)
    trainer = make_trainer(config)

    def interrupt(step: int) -> None:
        if step == 6:
            signal.raise_signal(stop)

    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], interrupt, 1))
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 128 + stop
    assert usual_signals == {number: signal.getsignal(number) for number in usual_signals}
    (path,) = checkpoints(config)
    assert read(path)["step"] == 6
    resume = config.get_base_dir() / RESUME
    make_trainer(yaml.load(resume.read_text(), Loader=yaml.Loader)).train()
    assert_same(read(checkpoints(config)[0]), read(checkpoints(trained)[-1]))
    assert not resume.exists()


def test_a_signal_ends_a_training_that_is_paused(scene, tmp_path, usual_signals):
    config = small_config(scene, tmp_path, STEPS)
    trainer = make_trainer(config)

    def pause(step: int) -> None:
        if step == 6:
            trainer.training_state = "paused"
            signal.setitimer(signal.ITIMER_REAL, 0.2)

    alarm = signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], pause, 1))
    with pytest.raises(SystemExit) as end:
        trainer.train()
    signal.signal(signal.SIGALRM, alarm)
    assert end.value.code == 128 + signal.SIGINT
    assert read(checkpoints(config)[0])["step"] == 6


def test_a_second_interrupt_ends_at_once(scene, folder, usual_signals):
    config = resumed(scene, folder, steps=4)
    trainer = make_trainer(config)

    def interrupt(step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], interrupt, 1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("num_writes", range(5))
def test_an_interrupt_while_a_checkpoint_is_written_is_no_other_error(tmp_path, monkeypatch, num_writes):
    """torch.save raises an error of its own where the file cannot be ended."""
    path = tmp_path / "nerfstudio_models" / "step-000000001.ckpt"
    write({"step": 1}, path)
    open_file = Path.open

    class Interrupted:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, num_writes

        def write(self, part: bytes) -> int:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return self.file.write(part)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    @contextlib.contextmanager
    def interrupted(*arguments: Any) -> Iterator[Interrupted]:
        with open_file(*arguments) as file:
            yield Interrupted(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "open", interrupted)
        write({"step": 2, "weights": torch.ones(100_000)}, path)
    assert read(path) == {"step": 1} and [file.name for file in tmp_path.rglob("*") if file.is_file()] == [path.name]


def test_signals_that_are_ignored_stay_ignored(scene, folder, usual_signals):
    """As SIGHUP is under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trainer = make_trainer(resumed(scene, folder))
    trainer.callbacks.append(
        TrainingCallback(
            [TrainingCallbackLocation.AFTER_TRAIN_ITERATION], lambda step: signal.raise_signal(signal.SIGHUP), 1
        )
    )
    trainer.train()


def test_a_checkpoint_is_a_file_of_torch(trained):
    for path in checkpoints(trained):
        assert zipfile.is_zipfile(path)
