"""`softmining doctor`: what is installed, what works with it, and how to get what is missing.

Each check looks at one thing and answers with one row; a check that breaks is a row too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "note", "problem"]
"""`note`: works without it, or slower; `problem`: does not work."""

PACKAGE = "nerfstudio_softmining"
PLUGIN_GROUPS = {"methods": "nerfstudio.method_configs", "dataparsers": "nerfstudio.dataparser_configs"}
"""What is registered -> entry point group in which nerfstudio looks for it."""
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
TCNN_INSTALL = "pip install ninja git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Row:
    """Answer of one check."""

    found: str
    state: State = "ok"
    fix: str = ""
    """What to do where the state is not `ok`."""


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    item: str
    look: Callable[[], Row]
    required: bool = True
    """Whether nothing works when the check itself breaks."""


# ------------------------------------------------------------------------------------------------------------ checks


def check_python() -> Row:
    """Look at Python itself."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Row(found)
    return Row(found, "problem", "nerfstudio 1.1.5 installs on Python 3.10 to 3.12: make an environment with it")


def check_torch() -> Row:
    """Look at PyTorch, and the device that training will use."""
    import torch

    version = torch.__version__
    if torch.cuda.is_available():
        return Row(f"{version}, on {torch.cuda.get_device_name()} (cuda)")
    fix = "without a GPU, use softmining-nerfacto-lite: it is sized for a CPU"
    if shutil.which("nvidia-smi"):
        fix = "to use the NVIDIA GPU of this machine, install a CUDA build of torch: https://pytorch.org"
    return Row(f"{version}, on the CPU", "note", fix)


def check_nerfstudio() -> Row:
    """Look at nerfstudio, of which the plugin knows one minor version."""
    version = importlib.metadata.version("nerfstudio")
    importlib.import_module("nerfstudio.engine.trainer")
    return judge_nerfstudio(version)


def judge_nerfstudio(version: str) -> Row:
    """Return whether the plugin is made for this version of nerfstudio."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if (1, 1, 5) <= numbers < (1, 2):
        return Row(version)
    return Row(version, "problem", "pip install 'nerfstudio>=1.1.5,<1.2'")


def check_numpy() -> Row:
    """Look at numpy."""
    import numpy

    return Row(numpy.__version__)


def check_tcnn() -> Row:
    """Look for tiny-cuda-nn, nerfacto's fast networks on NVIDIA GPUs."""
    import torch

    if importlib.util.find_spec("tinycudann") is None:
        found = "not installed: the torch implementation will be used, which is slower on a GPU"
        if torch.cuda.is_available():
            return Row(found, "note", TCNN_INSTALL)
        return Row(found, "note", f"not needed without an NVIDIA GPU; with one: {TCNN_INSTALL}")
    try:
        importlib.import_module("tinycudann")
    except Exception as error:
        return Row(f"installed, but does not load: {one_line(error)}", "note", f"build it again: {TCNN_INSTALL}")
    return Row(importlib.metadata.version("tinycudann"))


def check_nerfacc() -> Row:
    """Look for the CUDA kernels of nerfacc. Importing them would compile them, which takes minutes."""
    import torch

    spec = importlib.util.find_spec("nerfacc")
    if spec is None or not spec.submodule_search_locations:
        return Row("nerfacc is not installed", "problem", "pip install nerfacc==0.5.2")
    purpose = "needed only by methods in the manner of instant-ngp"
    version = importlib.metadata.version("nerfacc")
    compiled = any(file.suffix in (".so", ".pyd") for file in Path(spec.submodule_search_locations[0]).glob("csrc*"))
    if not torch.cuda.is_available():
        return Row(f"{version}, not usable without CUDA", "note", f"{purpose}, on an NVIDIA GPU")
    if compiled:
        return Row(f"{version}, compiled")
    if shutil.which("nvcc"):
        return Row(f"{version}, not compiled yet", "note", f"{purpose}; compiled at first use, in some minutes")
    fix = f"{purpose}: install the CUDA toolkit, or a compiled wheel: https://github.com/nerfstudio-project/nerfacc"
    return Row(f"{version}, not compiled, and no nvcc to do it", "note", fix)


def check_lpips() -> Row:
    """Look for the weights behind the LPIPS metric."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    if path.is_file():
        return Row("weights are there")
    fix = f"downloaded at the first evaluation with internet; without, copy {LPIPS_WEIGHTS} to {path.parent}"
    return Row("no weights yet: the metric will be left out if they cannot be downloaded", "note", fix)


def check_registered(kind: str) -> Row:
    """Load what this plugin has registered with nerfstudio.

    Args:
        kind: Key of [PLUGIN_GROUPS][].
    """
    entries = [entry for entry in entry_points(group=PLUGIN_GROUPS[kind]) if entry.value.startswith(PACKAGE)]
    if not entries:
        fix = f"install the plugin in the environment of {sys.executable}: pip install nerfstudio-softmining"
        return Row("none registered", "problem", fix)
    broken = []
    for entry in entries:
        if reason := why_unusable(entry):
            broken.append(f"{entry.name}: {reason}")
    if broken:
        fix = "mend what the message names, or pip install --force-reinstall --no-deps nerfstudio-softmining"
        return Row("do not load:\n" + "\n".join(broken), "problem", fix)
    return Row("\n".join(sorted(entry.name for entry in entries)))


def why_unusable(entry: EntryPoint) -> str:
    """Return why what is registered cannot be used; empty if it can."""
    try:
        specification = entry.load()
    except Exception as error:
        return one_line(error)
    if specification is None:
        return "cannot be imported"
    config = getattr(specification, "config", None)
    return getattr(config, "reason", "")  # of a stand-in, see unavailable.py


def check_open3d() -> Row:
    """Look for open3d, which ns-export imports and which needs libraries of the system."""
    try:
        importlib.import_module("open3d")
    except Exception as error:
        fix = "needed by ns-export; on Debian and Ubuntu: apt-get install libusb-1.0-0 libgl1 libgomp1 libx11-6"
        return Row(f"does not load: {one_line(error)}", "note", fix)
    return Row(importlib.metadata.version("open3d"))


def check_ffmpeg() -> Row:
    """Look for ffmpeg, without which ns-render does not start."""
    if path := shutil.which("ffmpeg"):
        return Row(path)
    fix = "needed by ns-render and ns-process-data: apt-get, brew or conda install ffmpeg"
    return Row("not on PATH", "note", fix)


CHECKS = [
    Check("Python", check_python),
    Check("torch", check_torch),
    Check("numpy", check_numpy),
    Check("nerfstudio", check_nerfstudio),
    Check("methods", lambda: check_registered("methods")),
    Check("dataparsers", lambda: check_registered("dataparsers")),
    Check("tiny-cuda-nn", check_tcnn, required=False),
    Check("nerfacc CUDA kernels", check_nerfacc, required=False),
    Check("LPIPS", check_lpips, required=False),
    Check("open3d", check_open3d, required=False),
    Check("ffmpeg", check_ffmpeg, required=False),
]


# ------------------------------------------------------------------------------------------------------------- table


def one_line(error: BaseException) -> str:
    """Return the kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def answer(check: Check) -> Row:
    """Return the check's row, or one that says how the check broke."""
    try:
        return check.look()
    except Exception as error:
        return Row(one_line(error), "problem" if check.required else "note", "install it again, in this environment")


def run_doctor() -> int:
    """Print a table of what was found, and what to do about it.

    Returns:
        Exit code: 1 if something is missing that is required.
    """
    console = Console()
    with console.status("Looking at what is installed"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {check.item: answer(check) for check in CHECKS}
    table = Table("item", "state", "found")
    for item, row in rows.items():
        table.add_row(item, f"[{COLOURS[row.state]}]{row.state}[/]", escape(row.found))
    console.print(table)
    for item, row in rows.items():  # below the table, where commands are not broken into lines
        if row.fix:
            console.print(f"{item}: {row.fix}", soft_wrap=True, markup=False, highlight=False)
    problems = [item for item, row in rows.items() if row.state == "problem"]
    if problems:
        console.print(f"\nTo be mended: {', '.join(problems)}.")
        return 1
    console.print("\nNothing that is required is missing. Try it: softmining demo")
    return 0
