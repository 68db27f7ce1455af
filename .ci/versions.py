"""Install the plugin beside old, middle and new versions of its dependencies, and run its commands as a user would.

    python .ci/versions.py                              # all combinations
    python .ci/versions.py --only oldest --keep DIR     # one of them, keeping its environment and logs in DIR
    python .ci/versions.py --imports-only               # only the oldest, and only that the plugin and nerfstudio start

Each combination gets a new virtual environment. Its Python has to be on PATH, as python3.X, or in pyenv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "outputs", "softmining_demo")
METHOD = "softmining-nerfacto-lite-blender"
FAST_TESTS = ("mining_*", "compat", "sampling", "plugin_is_harmless", "cuda_path")
TAIL_LINES = 25
"""Lines of a failed command's log that are printed."""
LOAD_PLUGIN = """
import importlib, pkgutil
from importlib.metadata import distribution
import nerfstudio_softmining
for module in pkgutil.walk_packages(nerfstudio_softmining.__path__, "nerfstudio_softmining."):
    importlib.import_module(module.name)
for entry in distribution("nerfstudio-softmining").entry_points:
    assert entry.load() is not None, entry
    print(entry.group, entry.name, entry.load())
"""
"""All modules too, as an entry point may load although what it stands for does not."""
NOT_STARTED = """
comet-ml h5py ipywidgets jupyterlab nerfstudio nuscenes-devkit open3d plotly pymeshlab timm wandb xatlas
""".split()
"""What nerfstudio asks for but does not import when it starts. They are a third of an environment."""
INSTALL_STARTED = f"""
import subprocess, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
needed = [Requirement(text) for text in requires("nerfstudio") + requires("nerfstudio-softmining")]
needed = [one for one in needed if one.name not in {NOT_STARTED}]
needed = [str(one) for one in needed if one.marker is None or one.marker.evaluate(dict(extra=""))]
subprocess.run([sys.executable, "-m", "pip", "install", "--no-compile", *needed, *sys.argv[1:]], check=True)
"""
WRITE_SCENE = """
from pathlib import Path
from nerfstudio_softmining.demo.scene import write_scene
write_scene(Path("scene"), num_train=8, num_eval=2, size=64)
"""
SHOW_VERSIONS = """
import json, platform
from importlib.metadata import version
packages = ("torch", "torchvision", "numpy", "nerfstudio")
print(json.dumps({"Python": platform.python_version()} | {name: version(name) for name in packages}))
"""


@dataclass(frozen=True)
class Combination:
    """Versions to install together."""

    python: str
    before: tuple[str, ...] = ()
    """What pip installs before the plugin."""
    after: tuple[str, ...] = ()
    """What pip installs after the plugin, even where a dependency forbids it."""


COMBINATIONS = {
    # what nerfstudio's installation page tells everyone to install
    "oldest": Combination("3.10", before=("torch==2.1.2", "torchvision==0.16.2", "numpy<2")),
    "between": Combination("3.11", before=("torch==2.5.1", "torchvision==0.20.1")),
    "newest": Combination("3.12"),
    # nuscenes-devkit, of nerfstudio's dependencies, forbids numpy 2, so that pip alone never installs it
    "numpy2": Combination("3.12", after=("numpy>=2",)),
}


@dataclass(frozen=True)
class Step:
    """One command, run in an empty folder beside a copy of the checkout."""

    name: str
    """Column of the table. Steps of the same name share one."""
    command: tuple[str, ...]
    minutes: float = 15
    """Time limit."""


def install_steps(combination: Combination) -> Iterator[Step]:
    """Yield the pip commands that set up an environment as users do."""
    for packages in (combination.before, ("../checkout[test]",), combination.after):
        if packages:
            yield Step("install", ("python", "-m", "pip", "install", *packages), 60)


def quick_install_steps(combination: Combination) -> Iterator[Step]:
    """Yield the commands that set up an environment in which nerfstudio and the plugin start, but not much else."""
    pip = ("python", "-m", "pip", "install", "--no-compile")
    yield Step("install", (*pip, *combination.before), 60)
    yield Step("install", (*pip, "--no-deps", "nerfstudio==1.1.5", "../checkout"), 5)
    yield Step("install", ("python", "-c", INSTALL_STARTED, *combination.before), 60)


def start_steps() -> Iterator[Step]:
    """Yield the commands that show whether the plugin loads and leaves nerfstudio's own methods alone."""
    yield Step("plugin loads", ("python", "-c", LOAD_PLUGIN), 5)
    yield Step("nerfacto", ("ns-train", "nerfacto", "--help"), 5)


def user_steps(data: Path | None) -> Iterator[Step]:
    """Yield what a user types.

    Args:
        data: A scene of NeRF Synthetic; if None, a tiny scene is rendered.
    """
    scene, scale = (data, 0.25) if data else (Path("scene"), 1.0)
    if not data:
        yield Step("scene", ("python", "-c", WRITE_SCENE), 5)
    train = ("ns-train", METHOD, "--data", f"{scene}", "--vis", "tensorboard", "--output-dir", "out")
    train += ("--pipeline.datamanager.camera-res-scale-factor", f"{scale}", "--experiment-name", "run", "--timestamp")
    first, resumed = (Path("out/run", METHOD, name) for name in ("first", "resumed"))
    yield Step("train", (*train, "first", "--max-num-iterations", "50"))
    checkpoints = f"{first}/nerfstudio_models"
    yield Step("resume", (*train, "resumed", "--max-num-iterations", "20", "--load-dir", checkpoints))
    yield Step("eval", ("ns-eval", "--load-config", f"{resumed}/config.yml", "--output-path", "eval.json"))
    yield Step("doctor", ("softmining", "doctor"))
    yield Step("image", ("softmining", "image", f"{scene}/train/r_0.png", "--at", "50"))
    compared = {"path": scene.name, "method": METHOD, "views": [0], "image_scale": scale}
    preset = {"title": "Versions", "scenes": [compared], "samplers": ["uniform", "detail"], "seeds": [0], "at": [20]}
    write = f"from pathlib import Path; Path('preset.yaml').write_text({json.dumps(preset)!r})"
    yield Step("bench", ("python", "-c", write))
    yield Step("bench", ("softmining", "bench", "preset.yaml", "--data", f"{scene.parent}"))
    tests = [path.name for name in FAST_TESTS for path in sorted((ROOT / "tests").glob(f"test_{name}.py"))]
    yield Step("tests", ("pytest", "-q", *(f"../checkout/tests/{name}" for name in tests)), 30)
    yield Step("demo", ("softmining", "demo", "--iterations", "50"))


def find_python(version: str) -> str | None:
    """Return the path of the interpreter with this version, None if there is none.

    pyenv's python3.X only runs where that version is activated, which the variable does.
    """
    try:
        command = [f"python{version}", "-c", "import sys; print(sys.executable)"]
        return subprocess.check_output(
            command, env=os.environ | {"PYENV_VERSION": version}, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(command: tuple[str, ...], folder: Path, log: Path, minutes: float) -> bool:
    """Run a command of the environment in `folder`/env from `folder`/work, and return whether it succeeded."""
    programs = folder / "env" / "bin"
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": f"{folder}/env"}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as file:
        process = subprocess.Popen(
            [programs / command[0], *command[1:]],
            cwd=folder / "work",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(60 * minutes) == 0
        except subprocess.TimeoutExpired:
            file.write(f"\nStopped after {minutes} minutes.\n")
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
                process.wait()


def try_combination(name: str, folder: Path, data: Path | None, imports_only: bool) -> tuple[dict[str, str], bool]:
    """Install a combination and run its steps.

    Args:
        name: Key of [COMBINATIONS][].
        folder: Empty folder for the environment, a copy of the checkout, logs, and what the commands write.
        data: A scene of NeRF Synthetic; if None, a tiny scene is rendered.
        imports_only: Leave out what a user types.

    Returns:
        Row of the table, and whether all steps succeeded.
    """
    combination = COMBINATIONS[name]
    row = {"combination": name, "Python": combination.python}
    python = find_python(combination.python)
    if python is None:
        return row | {"install": f"python{combination.python} is not on PATH"}, False
    for part in ("logs", "work"):
        (folder / part).mkdir(parents=True)
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*NOT_COPIED))
    subprocess.run([python, "-m", "venv", folder / "env"], check=True)
    if imports_only:
        steps = [*quick_install_steps(combination), *start_steps()]
    else:
        steps = [*install_steps(combination), *start_steps(), *user_steps(data)]
    seconds: dict[str, float] = {}
    for number, step in enumerate(steps):
        log = folder / "logs" / f"{number:02}_{step.name.replace(' ', '_')}.log"
        print(f"{name}: {step.name} ... ", end="", flush=True)
        start = time.perf_counter()
        success = run(step.command, folder, log, step.minutes)
        seconds[step.name] = seconds.get(step.name, 0) + time.perf_counter() - start
        print(f"{'ok' if success else 'FAILED'} after {time.perf_counter() - start:.0f} s", flush=True)
        if not row.get(step.name, "").startswith("FAILED"):
            row[step.name] = f"{'ok' if success else 'FAILED'}, {seconds[step.name]:.0f} s"
        if not success:
            print("\n".join(["", *log.read_text(errors="replace").splitlines()[-TAIL_LINES:], ""]), flush=True)
            if step.name == "install":
                break
        elif step.name == "install":
            log = folder / "logs" / "versions.log"
            if run(("python", "-c", SHOW_VERSIONS), folder, log, 1):
                row |= json.loads(log.read_text())
    return row, not any(value.startswith("FAILED") for value in row.values())


def table(rows: list[dict[str, str]]) -> str:
    """Return rows as a table in GitHub's markdown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Try what the command line asks for, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMBINATIONS, default=[*COMBINATIONS], help="combinations to try")
    parser.add_argument("--keep", type=Path, help="folder in which environments and logs are kept")
    parser.add_argument("--data", type=Path, help="scene of NeRF Synthetic, such as nerf_synthetic/lego")
    parser.add_argument("--imports-only", action="store_true", help="only check that oldest loads")
    arguments = parser.parse_args()
    data = arguments.data and arguments.data.resolve()
    rows, successes = [], []
    for name in ["oldest"] if arguments.imports_only else arguments.only:
        folder = Path(tempfile.mkdtemp(prefix="versions_"))
        if arguments.keep:
            folder.rmdir()
            folder = arguments.keep.resolve() / name
        try:
            row, success = try_combination(name, folder, data, arguments.imports_only)
        finally:
            if not arguments.keep:
                shutil.rmtree(folder)
        rows.append(row)
        successes.append(success)
    print(table(rows))
    return 0 if all(successes) else 1


if __name__ == "__main__":
    sys.exit(main())
