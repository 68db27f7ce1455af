"""The `softmining` command. Its subcommands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import tyro

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import file_name
from nerfstudio_softmining.images.config import FitConfig


def demo(output: Path = Path("softmining_demo"), iterations: int = 500, seed: int = 42) -> int:
    """Train on a small scene with uniform rays and with soft mining, and show both: a few minutes on two CPU cores.

    Args:
        output: Folder for everything that the demo writes.
        iterations: Training steps of each.
        seed: Seed of both trainings.
    """
    from nerfstudio_softmining.demo.demo import run_demo

    run_demo(output, iterations, seed)
    return 0


def bench(
    preset: tyro.conf.Positional[Path],
    data: Path,
    output: Path | None = None,
    scenes: tuple[str, ...] = (),
    samplers: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    at: tuple[int, ...] = (),
    method: str | None = None,
    dataparser: str | None = None,
    views: tuple[int, ...] = (),
    image_scale: float | None = None,
    set: tuple[str, ...] = (),
) -> int:
    """Compare samplers on scenes: what a file in configs/ asks for, and flags that override it.

    What is finished is not run again; after Ctrl-C or a crash the same command goes on.

    Args:
        preset: A file in configs/, such as configs/lite.yaml.
        data: Folder that the scenes' folders are in.
        output: Folder for results.json, report.md, plots and pictures; outputs/bench/PRESET if not given.
        scenes: Scenes to run, by their folder within --data; all of the preset if not given.
        samplers: uniform, uniform-weighted, any kind of sampler or any nerfstudio method, each with settings of its
            own after commas, as in langevin,drift=0.
        seeds: Seeds of the runs.
        at: Iterations at which the held-out views are rendered; the last ends a run.
        method: Method of this plugin whose settings all samplers share.
        dataparser: Dataparser, such as colmap or blender-data.
        views: Held-out views to render, by their number.
        image_scale: Factor on the resolution of the images as they are on disk.
        set: Settings of the model (and its SDF field), dataparser, datamanager, sampler, optimizers or schedulers, as
            name=value, added to those of the preset.
    """
    from nerfstudio_softmining.bench.bench import run_bench

    changes = {
        "scenes": scenes,
        "samplers": samplers,
        "seeds": seeds,
        "at": at,
        "method": method,
        "dataparser": dataparser,
        "views": views,
        "image_scale": image_scale,
        "set": set,
    }
    return 0 if run_bench(preset, data, output or Path("outputs/bench") / file_name(preset.stem), changes) else 1


def image(
    photo: tyro.conf.Positional[Path],
    output: Path | None = None,
    samplers: tuple[str, ...] = ("detail",),
    seeds: tuple[int, ...] = (0,),
    at: tuple[int, ...] = (500, 1000, 2000, 5000),
    config: tyro.conf.OmitArgPrefixes[FitConfig] = FitConfig(),  # noqa: B008
) -> int:
    """Fit a field to a photograph, and show what comes out.

    After Ctrl-C, or with more iterations in --at, the same command goes on.

    Args:
        photo: Any image that OpenCV reads: 8 or 16 bit, .exr or .hdr; grey, RGB or RGBA.
        output: Folder for reconstructions, plots, results.json and checkpoints; outputs/image/PHOTO if not given.
        samplers: How points are chosen: uniform-weighted, or any kind of sampler (docs/samplers.md). Settings of its
            own follow a name after commas, as in langevin,drift=0.
        seeds: Seeds of the fits.
        at: Iterations at which PSNR is kept; the last ends a fit.
        config: The rest.
    """
    # Large tensors on the CPU in huge pages, where the system has them: a step of fitting a photograph of 14 megapixels
    # allocates 50 MB, and takes 17 ms instead of 29. Torch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from nerfstudio_softmining.images.image import run_image

    return run_image(photo, output or Path("outputs/image") / file_name(photo.stem), samplers, seeds, at, config)


def render(
    checkpoint: tyro.conf.Positional[Path],
    output: Path,
    size: tuple[int, int] | None = None,
    scale: float = 1.0,
) -> int:
    """Render what `softmining image` has learnt, at any resolution.

    Args:
        checkpoint: A checkpoint.pt in the runs/ that `softmining image` has left.
        output: File of the picture; its suffix becomes .png, or .exr for high dynamic range.
        size: Height and width in pixels.
        scale: Factor on the photograph's size, if no size is given.
    """
    from nerfstudio_softmining.images.image import run_render

    run_render(checkpoint, output, size, scale)
    return 0


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    output: Path = Path("outputs/report.html"),
    views: int = 8,
) -> int:
    """Show finished trainings on one web page: settings, curves, and held-out views beside the truth.

    Give it runs that you trust only: nerfstudio loads a run's config.yml in a way that can run any code.

    Args:
        runs: Folders of runs, which ns-train has left: outputs/SCENE/METHOD/TIME.
        output: The page, which opens in any browser and needs no network.
        views: Held-out views to render, evenly spaced.
    """
    from nerfstudio_softmining.bench.run_page import run_report

    run_report(runs, output, views)
    return 0


def doctor() -> int:
    """Say what is installed, what works with it and how to get what is missing."""
    from nerfstudio_softmining.doctor import run_doctor

    return run_doctor()


def main() -> int:
    """Run the command line; the result is the exit code."""
    if threading.current_thread() is threading.main_thread():
        # as an exception, which ends processes that a command has started
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"demo": demo, "bench": bench, "image": image, "render": render, "report": report, "doctor": doctor},
            prog="softmining",
            description="Soft mining for nerfstudio.",
        )
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # what reads the output has ended, as in `softmining doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"{error.filename or 'a file'} cannot be used ({error.strerror}).") from error


if __name__ == "__main__":
    sys.exit(main())
