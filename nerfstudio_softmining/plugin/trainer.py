"""nerfstudio's trainer, which loses nothing when it is interrupted."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import yaml
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining import files
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import checkpoints

STEPS_PER_CHECK = 100
"""Steps between two looks at whether all parameters are finite, which wait for the device."""
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that end a training after a last checkpoint: Ctrl-C, a scheduler's warning, a closed terminal."""
RESUME = "resume.yml"
"""Name of the settings that go on from the last checkpoint, in the folder of a run."""


class StopSignals:
    """Notes the first signal to stop. The second one acts as if this were not here.

    Args:
        on_receive: called at the first signal.
    """

    def __init__(self, on_receive: Callable[[], None]) -> None:
        self.received: int | None = None
        self._on_receive = on_receive
        self._previous: dict[int, Any] = {}

    def catch(self) -> None:
        """Begin to wait for signals. Those that are ignored so far, as under nohup, stay so."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._receive)

    def release(self) -> None:
        """Let signals act as they did before."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._on_receive()
        self.release()
        CONSOLE.print(f"\n{signal.Signals(number).name}: training stops after this step, with a checkpoint.")


class SoftMiningTrainer(Trainer):
    """nerfstudio's trainer, which loses nothing when it is interrupted.

    A checkpoint is written whole or not at all, and the one before it stays until then. Beside the checkpoints,
    `resume.yml` holds the settings that go on from the last one to the end of the training. A signal to stop ends it
    after the step, with a checkpoint. Parameters that are not finite end it, and are not saved.

    Args:
        config: the settings.
        args, kwargs: as nerfstudio gives them.
    """

    def __init__(self, config: TrainerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._signals = StopSignals(self._stop)
        self._last_step: int | None = None
        """The last step that has been trained here."""

    def _stop(self) -> None:
        """Let nerfstudio's loop end after the step, or at once while training is paused."""
        self.stop_training = True

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Set up data, model, viewer and logs."""
        super().setup(test_mode)
        # nerfstudio's progress counts the steps before a checkpoint as done, but not as steps to do
        writer.GLOBAL_BUFFER["max_iter"] = self._start_step + self.config.max_num_iterations

    def train(self) -> None:
        """Train the model."""
        if self.world_size == 1:  # processes that stop at different steps would wait for each other
            self._signals.catch()
        try:
            super().train()
        finally:
            self._signals.release()

    def train_iteration(self, step: int) -> Any:
        """Train one step."""
        result = super().train_iteration(step)
        self._last_step = step
        if step % STEPS_PER_CHECK == 0:
            self._check_parameters(result[1])
        if self._signals.received is not None:  # before the loop, which begins by forgetting it
            self._stop()
        return result

    def _after_train(self) -> None:
        self._signals.release()
        received = self._signals.received
        if self._last_step is not None:
            self.step = self._last_step  # after a stop, nerfstudio's own count is one step ahead
        if received is None:
            super()._after_train()
            return
        self.training_state = "completed"
        if self._last_step is not None:
            self.save_checkpoint(self._last_step)
        writer.write_out_storage()
        resume = self.base_dir / RESUME
        if resume.exists():
            CONSOLE.print(f"Go on by: ns-train {self.config.method_name} --load-config {resume}", soft_wrap=True)
        raise SystemExit(128 + received)

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Save model, optimizers and sampler after a step.

        Where the disk is full, say, training goes on, and the last checkpoint stays.

        Raises:
            UserError: if that was the last one of a training, or if parameters are not finite.
        """
        self._check_parameters({})
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        try:
            checkpoints.write(
                {
                    "step": step,
                    "pipeline": self.pipeline.state_dict(),
                    "optimizers": {name: part.state_dict() for name, part in self.optimizers.optimizers.items()},
                    "schedulers": {name: part.state_dict() for name, part in self.optimizers.schedulers.items()},
                    "scalers": self.grad_scaler.state_dict(),
                },
                path,
            )
            self._write_resume(step, path)
        except files.CannotWriteError as error:
            message = f"the checkpoint {error.cause}. {self._kept()}"
            if self.training_state == "completed":
                raise UserError(f"{message} Free some space, and go on from there.") from error
            CONSOLE.print(f"Training goes on, but {message}", style="red", markup=False)
            return
        if self.config.save_only_latest_checkpoint:
            for other in self.checkpoint_dir.glob("*.ckpt"):
                if other != path:
                    other.unlink()

    def _write_resume(self, step: int, checkpoint: Path) -> None:
        """Write the settings that go on from a checkpoint; remove them after the last step."""
        path, config = self.base_dir / RESUME, self.config
        remaining = self._start_step + config.max_num_iterations - (step + 1)
        if remaining <= 0:
            path.unlink(missing_ok=True)
            return
        changes: dict[str, Any] = {
            "load_dir": None,
            "load_step": None,
            "load_checkpoint": checkpoint,
            "load_config": None,
            "max_num_iterations": remaining,
        }
        decay_steps = getattr(config, "decay_steps", 0)
        if decay_steps is None:  # of methods whose learning rates fall over the whole training
            changes["decay_steps"] = config.max_num_iterations
        files.write(yaml.dump(dataclasses.replace(config, **changes)), path)

    def _kept(self) -> str:
        """Say which checkpoint is there."""
        last = max(self.checkpoint_dir.glob("step-*.ckpt"), default=None)
        return "There is none before it." if last is None else f"The last one, {last}, is whole."

    def _check_parameters(self, losses: dict[str, Tensor]) -> None:
        """Stop where training has diverged.

        Raises:
            UserError: if parameters are not finite.
        """
        names = list(checkpoints.not_finite(self.pipeline.model.named_parameters()))
        if not names:
            return
        parameters = dict(self.pipeline.model.named_parameters())
        groups = {
            group: optimizer.param_groups[0]["lr"]
            for group, optimizer in self.optimizers.optimizers.items()
            if any(parameters[name] is own for name in names for own in self.optimizers.parameters[group])
        }
        rates = " and ".join(f"--optimizers.{group}.optimizer.lr (now {rate:.2g})" for group, rate in groups.items())
        shown = ", ".join(f"{name} is {float(value):.3g}" for name, value in losses.items())
        raise UserError(
            f"training has diverged by step {self._last_step}: {len(names)} parameters, such as {names[0]}, are not "
            f"finite{f', {shown}' if shown else ''}. {self._kept()} Go on from it, or start anew, with a lower {rates}."
        )

    def _load_checkpoint(self) -> None:
        config = self.config
        if config.load_dir is not None and config.load_step is None:
            path, state = checkpoints.read_newest(config.load_dir)
        elif config.load_dir is not None or config.load_checkpoint is not None:
            path = config.load_checkpoint
            if config.load_dir is not None:
                path = config.load_dir / f"step-{config.load_step:09d}.ckpt"
            state = checkpoints.read(Path(str(path)))
        else:
            super()._load_checkpoint()
            return
        self._start_step = state["step"] + 1
        self.pipeline.load_pipeline(state["pipeline"], state["step"])
        checkpoints.load_optimizers(self.optimizers.optimizers, state["optimizers"])
        if config.load_scheduler:
            for group, scheduler in self.optimizers.schedulers.items():
                if group in state.get("schedulers", {}):
                    scheduler.load_state_dict(state["schedulers"][group])
        if state.get("scalers"):  # empty where training was on a CPU
            self.grad_scaler.load_state_dict(state["scalers"])
        CONSOLE.print(f"Going on after step {state['step']}, from {path}", soft_wrap=True)
