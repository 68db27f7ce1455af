"""`softmining report`: finished trainings as one web page, which needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nerfstudio_softmining import files
from nerfstudio_softmining.bench.report import LARGEST_ERROR
from nerfstudio_softmining.bench.training import metrics_within_mask
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat

CURVES = {
    "Train Metrics Dict/psnr": "PSNR of training rays, dB",
    "Eval Images Metrics/psnr": "PSNR of a held-out view, dB",
    "Soft Mining/effective sample size": "Effective sample size",
}
"""Scalars of a run's log that are plotted, and the titles of their plots."""
DENSITY = "Soft Mining/density"
"""Picture of a run's log that is shown."""
LARGEST_SIDE = 640
"""Pixels of the longer side of a picture."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2, h3 { line-height: 1.2; } table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; } td.number { text-align: right; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1.5em; }
figure { margin: 0; } figcaption { font-size: .9em; color: #555; } img { display: block; width: 100%; }
.pair { position: relative; } .pair img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 50%); }
input[type=range] { width: 100%; margin: .3em 0; }
"""
MOVE = "this.previousElementSibling.lastElementChild.style.clipPath=`inset(0 0 0 ${this.value}%)`"
"""Script of a slider: how much of the truth it uncovers."""


@dataclass
class View:
    """A held-out view and what a run made of it, in [0, 1]."""

    number: int
    truth: np.ndarray
    render: np.ndarray
    psnr: float
    ssim: float


@dataclass
class Run:
    """A finished training."""

    name: str
    settings: dict[str, Any]
    """Settings that the page lists."""
    curves: dict[str, tuple[list[int], list[float]]]
    """Steps and values of each of the [CURVES][] that the log has."""
    density: bytes | None
    """The last picture of the density in the log, as PNG."""
    views: list[View]


def run_report(folders: Sequence[Path], output: Path, max_views: int) -> None:
    """Render held-out views of finished trainings, and write the page.

    Args:
        folders: folders of the runs, which have a config.yml, or these files themselves.
        output: the page.
        max_views: held-out views to render, evenly spaced; all if there are fewer.

    Raises:
        UserError: if a folder is not that of a run, or the page cannot be written.
    """
    if output.suffix != ".html":
        raise UserError(f"--output is {output}: it is a file that ends in .html.")
    if max_views < 1:
        raise UserError(f"--views is {max_views}: render 1 or more.")
    configs = [folder if folder.is_file() else folder / "config.yml" for folder in folders]
    for config in configs:
        if not config.is_file():
            raise UserError(f"{config} does not exist. Name the folder of a run, such as outputs/SCENE/METHOD/TIME.")
    runs = [load_run(config, max_views) for config in configs]
    files.write(page(runs), output)
    CONSOLE.print(f"{output} opens in any browser, without a network.", soft_wrap=True)


def load_run(path: Path, max_views: int) -> Run:
    """Read a run's settings and log, and render its held-out views.

    Raises:
        UserError: if its checkpoint or data cannot be loaded.
    """

    def at_its_place(config: Any) -> Any:
        config.output_dir = path.resolve().parents[3]  # wherever the run's folders are now
        return config

    compat.prepare("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with compat.lenient_metrics():
            config, pipeline, _, step = eval_setup(path, test_mode="test", update_config_callback=at_its_place)
    except (OSError, AssertionError, IndexError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the run of {path} cannot be loaded ({error!r}). It needs its checkpoint in nerfstudio_models/, and "
            "its data at the place where it was trained."
        ) from error
    manager, model = config.pipeline.datamanager, config.pipeline.model
    sampler = getattr(manager, "pixel_sampler", None)
    settings = {
        "method": config.method_name,
        "data": config.data or getattr(manager, "data", None),
        "steps": step + 1,
        "rays a step": getattr(manager, "train_num_rays_per_batch", None),
        "sampler": getattr(sampler, "kind", "uniform"),
        "alpha": getattr(model, "alpha", None),
        "seed": config.machine.seed,
    }
    views = list(_render(pipeline, max_views, path.parent.name))
    log = EventAccumulator(str(path.parent), size_guidance={"scalars": 2000, "images": 1})
    log.Reload()
    curves = {
        name: ([event.step for event in log.Scalars(name)], [event.value for event in log.Scalars(name)])
        for name in CURVES
        if name in log.Tags()["scalars"]
    }
    density = log.Images(DENSITY)[-1].encoded_image_string if DENSITY in log.Tags()["images"] else None
    return Run("/".join(path.resolve().parts[-4:-1]), settings, curves, density, views)


@torch.no_grad()
def _render(pipeline: Any, max_views: int, name: str) -> Iterator[View]:
    """Render held-out views, evenly spaced."""
    manager = pipeline.datamanager
    count = len(manager.eval_dataset)
    numbers = np.unique(np.linspace(0, count - 1, min(max_views, count)).round().astype(int)).tolist()
    for number in track(numbers, f"Rendering {name}", transient=True):
        camera, batch = manager.fixed_indices_eval_dataloader.get_camera(number)
        outputs = pipeline.model.get_outputs_for_camera(camera)
        metrics, images = metrics_within_mask(pipeline.model, outputs, batch)
        # the truth is the first and the finest render the last of the pictures side by side
        pictures = images["img"].clamp(0, 1).cpu().numpy()
        truth, *_, render = np.split(pictures, pictures.shape[1] // int(camera.width), axis=1)
        ssim = metrics["ssim" if "ssim" in metrics else "fine_ssim"]
        yield View(number, truth, render, float(metrics["psnr"]), float(ssim))


def page(runs: Sequence[Run]) -> str:
    """Return the page of some runs."""
    title = f"Soft mining: {runs[0].name}" if len(runs) == 1 else f"Soft mining: {len(runs)} runs"
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(runs), _curves(runs)]
    for run in runs:
        parts.append(f"<h2>{html.escape(run.name)}</h2>")
        parts.append(_settings(run))
        if run.density is not None:
            parts.append(
                "<figure style='max-width:360px'>"
                f"{_image(run.density, 'png', 'density')}<figcaption>Where rays went on a training view, at the last "
                "picture of the log: brighter is more.</figcaption></figure>"
            )
        parts.append("<h3>Held-out views, the worst first</h3><div class='views'>")
        parts += [_view(view) for view in sorted(run.views, key=lambda view: view.psnr)]
        parts.append("</div>")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _summary(runs: Sequence[Run]) -> str:
    rows = [
        f"<tr><td>{html.escape(run.name)}</td><td class=number>{np.nanmean([view.psnr for view in run.views]):.2f}</td>"
        f"<td class=number>{np.nanmean([view.ssim for view in run.views]):.3f}</td>"
        f"<td class=number>{len(run.views)}</td></tr>"
        for run in runs
    ]
    return f"<table><tr><th>run</th><th>PSNR, dB</th><th>SSIM</th><th>views</th></tr>{''.join(rows)}</table>"


def _settings(run: Run) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in run.settings.items()
        if value is not None
    ]
    return f"<table>{''.join(rows)}</table>"


def _curves(runs: Sequence[Run]) -> str:
    """Plot the curves of all runs, one plot for each scalar."""
    import plotly.graph_objects as go  # slow to import

    parts: list[str] = []
    for name, title in CURVES.items():
        figure = go.Figure(
            layout={"template": "plotly_white", "title": title, "height": 320, "xaxis": {"title": "step"}}
        )
        for run in runs:
            if name in run.curves:
                steps, values = run.curves[name]
                figure.add_scatter(x=steps, y=values, mode="lines+markers", name=html.escape(run.name))
        if figure.data:
            parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts, config={"displaylogo": False}))
    if not parts:
        return "<p>There are no curves: the runs have no TensorBoard log. Train with --vis viewer+tensorboard.</p>"
    return "".join(parts)


def _view(view: View) -> str:
    """Show a view: the truth over the render by a slider, and the error."""
    error = np.abs(view.truth - view.render).mean(axis=-1) / LARGEST_ERROR
    colours = colormaps["inferno"](error.clip(0, 1))[..., :3]
    return (
        f"<figure><div class='pair'>{_photo(view.truth, 'truth')}{_photo(view.render, 'render')}</div>"
        f"<input type='range' value='50' aria-label='truth or render' oninput='{html.escape(MOVE)}'>"
        f"{_photo(colours, 'error')}"
        f"<figcaption>View {view.number}: {view.psnr:.2f} dB, SSIM {view.ssim:.3f}. Left of the slider is the truth, "
        f"right of it the render; below, the error, bright from {LARGEST_ERROR} on.</figcaption></figure>"
    )


def _photo(colours: np.ndarray, label: str) -> str:
    """Return colours [height, width, 3] in [0, 1] as a picture of the page."""
    height, width = colours.shape[:2]
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(colours.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", (255 * small[..., ::-1]).round().astype(np.uint8), (cv2.IMWRITE_JPEG_QUALITY, 88))[1]
    return _image(encoded.tobytes(), "jpeg", label)


def _image(data: bytes, kind: str, label: str) -> str:
    return f"<img alt='{label}' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
