"""Install the plugin beside old, middle and new versions of its dependencies, and run its commands as a user would.

    python .ci/versions.py                              # all combinations
    python .ci/versions.py --only oldest --keep DIR     # one of them, keeping its environment and logs in DIR/oldest
    python .ci/versions.py --imports-only               # only the oldest, and only that the plugin and nerfstudio start

Each combination gets a new virtual environment. Its Python has to be on PATH, as python3.X, or in pyenv. Where other
work runs on the same processors, OMP_NUM_THREADS=1 makes the commands several times faster.
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
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "outputs", "softmining_demo")
METHOD = "softmining-nerfacto-lite-blender"
FAST_TESTS = ("mining_*", "compat", "checkpoints", "samplers*", "plugin_is_harmless", "cuda_path", "every_method")
MINUTES = 45
"""Time limit of each command."""
TAIL_LINES = 25
"""Lines of a failed command's log that are printed."""


class Combination(NamedTuple):
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
    # nuscenes-devkit, which nerfstudio depends on, forbids numpy 2, so that pip alone never installs it
    "numpy2": Combination("3.12", after=("numpy>=2",)),
}

# ------------------------------------------------------------------------------------- programs for the environment

NOT_AT_START = {
    *("comet-ml", "h5py", "ipywidgets", "jupyterlab", "nerfstudio", "nuscenes-devkit", "open3d", "plotly", "pymeshlab"),
    *("timm", "wandb", "xatlas"),
}
"""What nerfstudio depends on but does not import when it starts. Without them an environment is 2 GB smaller."""
INSTALL_FOR_START = f"""
import subprocess, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
needed = map(Requirement, requires("nerfstudio") + requires("nerfstudio-softmining"))
needed = [one for one in needed if one.marker is None or one.marker.evaluate(dict(extra=""))]
needed = [str(one) for one in needed if one.name not in {NOT_AT_START}]
subprocess.run([sys.executable, "-m", "pip", "install", "--no-compile", *sys.argv[1:], *needed], check=True)
"""
# an entry point may load although the module behind it does not, so all modules are imported
LOAD_PLUGIN = """
import importlib, pkgutil
from importlib.metadata import distribution
import nerfstudio_softmining
for module in pkgutil.walk_packages(nerfstudio_softmining.__path__, "nerfstudio_softmining."):
    importlib.import_module(module.name)
for entry in distribution("nerfstudio-softmining").entry_points:
    assert entry.load() is not None, entry
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

# -------------------------------------------------------------------------------------------------------------- steps

Step = tuple[str, tuple[str, ...]]
"""Column of the table, and a command, which runs in an empty folder beside a copy of the checkout."""


def install_steps(combination: Combination) -> list[Step]:
    """Return the commands that set up an environment as users do."""
    groups = (combination.before, ("../checkout[test]",), combination.after)
    return [("install", ("pip", "install", *packages)) for packages in groups if packages]


def quick_install_steps(combination: Combination) -> list[Step]:
    """Return the commands that set up an environment in which nerfstudio and the plugin start, but not much else."""
    pip = ("pip", "install", "--no-compile")
    return [
        ("install", (*pip, *combination.before)),
        ("install", (*pip, "--no-deps", "nerfstudio==1.1.5", "../checkout")),
        ("install", ("python", "-c", INSTALL_FOR_START, *combination.before)),
    ]


def start_steps() -> list[Step]:
    """Return the commands that show whether the plugin loads and leaves nerfstudio's own methods alone."""
    helps = [
        (column, ("ns-train", method, "--help")) for column, method in (("nerfacto", "nerfacto"), ("ours", METHOD))
    ]
    return [("plugin loads", ("python", "-c", LOAD_PLUGIN)), *helps]


def user_steps(data: Path | None) -> list[Step]:
    """Return what a user types.

    Args:
        data: A scene of NeRF Synthetic; if None, a tiny scene is rendered.
    """
    scene, scale = (data, 0.1) if data else (Path("scene"), 1.0)
    train = ("ns-train", METHOD, "--data", str(scene), "--vis", "tensorboard", "--output-dir", "out")
    train += ("--pipeline.datamanager.camera-res-scale-factor", str(scale), "--experiment-name", "run", "--timestamp")
    first, resumed = (f"out/run/{METHOD}/{name}" for name in ("first", "resumed"))
    resume = ("--max-num-iterations", "20", "--load-dir", f"{first}/nerfstudio_models")
    compared = {"path": scene.name, "method": METHOD, "views": [0], "image_scale": scale}
    preset = {"title": "Versions", "scenes": [compared], "samplers": ["uniform", "detail"], "seeds": [0], "at": [20]}
    write_preset = f"from pathlib import Path; Path('preset.yaml').write_text({json.dumps(preset)!r})"
    tests = [path.name for name in FAST_TESTS for path in sorted((ROOT / "tests").glob(f"test_{name}.py"))]
    return [
        *([] if data else [("scene", ("python", "-c", WRITE_SCENE))]),
        ("train", (*train, "first", "--max-num-iterations", "50")),
        ("resume", (*train, "resumed", *resume)),
        ("eval", ("ns-eval", "--load-config", f"{resumed}/config.yml", "--output-path", "eval.json")),
        ("doctor", ("softmining", "doctor")),
        ("image", ("softmining", "image", f"{scene}/train/r_0.png", "--at", "50")),
        ("render", ("softmining", "render", "outputs/image/r_0/runs/detail/0/checkpoint.pt", "--output", "large.png")),
        ("bench", ("python", "-c", write_preset)),
        ("bench", ("softmining", "bench", "preset.yaml", "--data", str(scene.parent))),
        ("tests", ("pytest", "-q", *(f"../checkout/tests/{name}" for name in tests))),
        ("demo", ("softmining", "demo", "--iterations", "50")),
    ]


# ------------------------------------------------------------------------------------------------------------ running


def find_python(version: str) -> str | None:
    """Return the path of the interpreter with this version, None if there is none."""
    command = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    environment = os.environ | {"PYENV_VERSION": version}  # pyenv's python3.X only runs where it is activated
    try:
        return subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(command: tuple[str, ...], folder: Path, log: Path) -> bool:
    """Run a command of the environment `folder`/env in `folder`/work, and return whether it succeeded."""
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
            return process.wait(60 * MINUTES) == 0
        except subprocess.TimeoutExpired:
            file.write(f"\nStopped after {MINUTES} minutes.\n")
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()


def try_combination(name: str, folder: Path, data: Path | None, imports_only: bool) -> tuple[dict[str, str], bool]:
    """Install a combination and run its steps.

    Args:
        name: Key of [COMBINATIONS][].
        folder: New folder for the environment, a copy of the checkout, logs, and what the commands write.
        data: A scene of NeRF Synthetic; if None, a tiny scene is rendered.
        imports_only: Whether to leave out what a user types.

    Returns:
        Row of the table, and whether all steps succeeded.
    """
    combination = COMBINATIONS[name]
    row = {"combination": name, "Python": combination.python}
    python = find_python(combination.python)
    if python is None:
        return row | {"install": f"python{combination.python} is missing"}, False
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*NOT_COPIED))
    (folder / "logs").mkdir()
    (folder / "work").mkdir()
    subprocess.run([python, "-m", "venv", folder / "env"], check=True)
    if imports_only:
        steps = quick_install_steps(combination) + start_steps()
    else:
        steps = install_steps(combination) + start_steps() + user_steps(data)
    for number, (column, command) in enumerate(steps):
        log = folder / "logs" / f"{number:02}_{column.replace(' ', '_')}.log"
        print(f"{name}: {column} ... ", end="", flush=True)
        start = time.perf_counter()
        success = run(command, folder, log)
        print(f"{'ok' if success else 'FAILED'} after {time.perf_counter() - start:.0f} s", flush=True)
        if not success:
            row[column] = "FAILED"
            print("\n".join(["", *log.read_text(errors="replace").splitlines()[-TAIL_LINES:], ""]), flush=True)
            if column == "install":
                break
        else:
            row.setdefault(column, "ok")
    versions = folder / "logs" / "versions.json"
    if run(("python", "-c", SHOW_VERSIONS), folder, versions):
        row |= json.loads(versions.read_text())
    return row, "FAILED" not in row.values()


def table(rows: list[dict[str, str]]) -> str:
    """Return rows as a table in GitHub's markdown."""
    first = ("combination", "Python", "torch", "torchvision", "numpy", "nerfstudio")
    columns = list(dict.fromkeys([*first, *(column for row in rows for column in row)]))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Try what the command line asks for, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMBINATIONS, default=[*COMBINATIONS], help="combinations to try")
    parser.add_argument("--keep", type=Path, help="folder in which environments and logs are kept")
    parser.add_argument("--data", type=Path, help="scene of NeRF Synthetic, such as nerf_synthetic/lego")
    parser.add_argument("--imports-only", action="store_true", help="only check that the plugin loads in oldest")
    arguments = parser.parse_args()
    names = ["oldest"] if arguments.imports_only else arguments.only
    for path in (arguments.keep / name for name in names) if arguments.keep else ():
        if path.exists():
            parser.error(f"--keep: {path} exists already")
    data = arguments.data and arguments.data.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which removes the environment and stops its commands
    rows, successes = [], []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="versions_") as temporary:
            folder = (arguments.keep or Path(temporary)).resolve() / name
            row, success = try_combination(name, folder, data, arguments.imports_only)
        rows.append(row)
        successes.append(success)
    print(f"\n{table(rows)}")
    return 0 if all(successes) else 1


if __name__ == "__main__":
    sys.exit(main())
