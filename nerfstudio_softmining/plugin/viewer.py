"""The panel "Soft mining" of nerfstudio's live viewer: where rays go, and settings that act at once."""

from __future__ import annotations

import base64
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import viser
from matplotlib import colormaps
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin.metrics import batch_metrics, density_colours
from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSampler
from nerfstudio_softmining.samplers.base import MiningBatch

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManager
    from nerfstudio_softmining.plugin.model import SoftMiningMixin

REFRESH_SECONDS = 2.0
"""Least time between two updates of the panel."""
MAX_POINTS = 500
"""Drawn pixels that the picture of a view shows."""
MAX_HISTORY = 2000
"""Steps that the plots keep."""
SMOOTHED_STEPS = 25
"""Steps that a point of a plot is the mean of."""
CURVES = {"PSNR of training rays, dB": "linear", "Weighted loss": "log"}
"""Plots over the steps, and how their values are scaled."""
PICTURE_SIDE = 480
"""Pixels of the longer side of a photograph in the panel."""
NUM_WORST = 5
"""Views in the list of those with the largest error."""
OFF = "uniform (soft mining off)"
PLOT = {
    "template": "plotly_dark",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 30, "r": 5, "t": 25, "b": 25},
    "showlegend": False,
}


def attach(trainer: Any, model: SoftMiningMixin) -> MiningPanel | None:
    """Add the panel to a trainer's live viewer; None where there is none."""
    viewer = getattr(trainer, "viewer_state", None)
    if not isinstance(viewer, Viewer):
        return None
    manager: SoftMiningDataManager = trainer.pipeline.datamanager
    sampler = manager.train_pixel_sampler
    if not isinstance(sampler, MiningPixelSampler):
        return None
    return MiningPanel(viewer, manager, sampler, model)


class MiningPanel:
    """Shows what the sampler does, and changes its settings.

    Nothing is computed while no browser is connected. Settings that a browser changes act at the next batch.

    Args:
        viewer: nerfstudio's viewer.
        manager: datamanager of the training.
        sampler: its pixel sampler.
        model: the model.
    """

    def __init__(
        self, viewer: Viewer, manager: SoftMiningDataManager, sampler: MiningPixelSampler, model: SoftMiningMixin
    ) -> None:
        self.viewer, self.manager, self.sampler, self.model = viewer, manager, sampler, model
        self._changes: dict[str, Any] = {}
        self._shown_at = -REFRESH_SECONDS
        self._history: deque[tuple[int, Tensor]] = deque(maxlen=MAX_HISTORY)
        """Step, and mean squared error of its rays without and with weights."""
        self._drawn: deque[Tensor] = deque(maxlen=64)
        self._shown_photo: tuple[int, np.ndarray, float] | None = None
        self._errors = torch.zeros(2, len(manager.train_dataset), device=manager.device)
        gui = viewer.viser_server.gui
        with gui.add_folder("Soft mining"):
            if manager.world_size == 1:  # others would go on with the old ones
                self._add_settings(gui)
            self.readings = gui.add_markdown("Waiting for the next batch.")
            with gui.add_folder("Where rays go"):
                last = len(manager.train_dataset) - 1
                self.view = gui.add_slider("Training view", 0, max(last, 1), 1, 0, disabled=last == 0)
                self.view.on_update(lambda _: self._show_soon())
                self.picture = gui.add_plotly(_figure())
                self.caption = gui.add_markdown("")
            with gui.add_folder("Quality"):
                # aspect is height / width, whatever viser says
                self.curves = [gui.add_plotly(_figure(), aspect=0.5) for _ in CURVES]
                self.worst = gui.add_markdown("")
                self.coloured = gui.add_checkbox(
                    "Errors at cameras", False, hint="Colour training cameras by the error of their rays."
                )
                self.coloured.on_update(lambda _: self._show_soon())
        self._camera_errors: viser.PointCloudHandle | None = None

    def _add_settings(self, gui: viser.GuiApi) -> None:
        kind = self.sampler.config.kind
        self.kind = gui.add_dropdown("Sampler", (kind, OFF) if kind != "uniform" else (kind,))
        self._on_change(self.kind, "sampler")
        self.alpha = gui.add_slider("Alpha", 0.0, 1.0, 0.01, self.model.rgb_loss.alpha, hint="Softness of the weights.")
        self._on_change(self.alpha, "alpha")
        self.settings = {}
        for name, value in self.sampler.live_settings().items():
            label = name.replace("_", " ").capitalize()
            if name.endswith("fraction"):
                self.settings[name] = gui.add_slider(label, 0.0, 1.0, 0.01, value)
            else:
                self.settings[name] = gui.add_number(
                    label, float(value), min=0.0, step=10.0 ** np.floor(np.log10(value or 1) - 1)
                )
            self._on_change(self.settings[name], name)

    def _on_change(self, handle: Any, name: str) -> None:
        @handle.on_update
        def _(_: Any) -> None:
            self._changes[name] = handle.value

    def _show_soon(self) -> None:
        self._shown_at = -REFRESH_SECONDS

    def update(self, step: int) -> None:
        """Act on changes, and show the last batch. Called after each step."""
        while self._changes:
            self._apply(*self._changes.popitem(), step)
        batch = self.manager.last_batch
        if not self.viewer.viser_server.get_clients() or batch is None or batch.error is None:
            return
        self._collect(step, batch)
        if time.monotonic() - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = time.monotonic()
            try:
                self._show(step, batch)
            except Exception as error:  # a picture is not worth a training
                self._shown_at = math.inf
                CONSOLE.print(f"Soft mining: the viewer's panel stops ({error!r}). Training goes on.", style="yellow")

    def _apply(self, name: str, value: Any, step: int) -> None:
        """Change a setting, or put its handle back where the value cannot be used."""
        if name == "sampler":
            self.sampler.draws_uniformly = value == OFF
        elif name == "alpha":
            self.model.rgb_loss.alpha = value
        else:
            try:
                self.sampler.change(name, value)
            except UserError as error:
                CONSOLE.print(f"Soft mining: {error}", style="yellow", markup=False)
                self.settings[name].value = self.sampler.live_settings()[name]
                return
        CONSOLE.print(f"Soft mining: {name} is {value} from step {step + 1} on.", markup=False)

    def _collect(self, step: int, batch: MiningBatch) -> None:
        assert batch.error is not None
        error, image = batch.error.detach(), batch.indices[:, 0].to(self._errors.device)
        assert batch.weighted_error is not None
        self._history.append((step, torch.stack((error.mean(), batch.weighted_error.detach().mean()))))
        self._errors *= 0.999
        self._errors.index_add_(1, image, torch.stack((error.to(image.device), torch.ones_like(error))))
        self._drawn.append(batch.indices)

    def _show(self, step: int, batch: MiningBatch) -> None:
        with self.viewer.viser_server.atomic():
            self.readings.content = self._read(step, batch)
            self._show_view()
            self._show_quality()

    def _read(self, step: int, batch: MiningBatch) -> str:
        """Describe the last batch."""
        values = {name: float(value) for name, value in batch_metrics(batch, self.model.rgb_loss).items()}
        return (
            f"**Step {step}**: {values['chains']:.0%} of {len(batch.indices):,} rays follow chains, "
            f"{values['map']:.0%} a map, {values['uniform']:.0%} are uniform.  \n"
            f"Effective sample size {values['effective sample size']:.0%}, "
            f"mean weight {values['mean weight']:.2f}, alpha now {values['alpha']:.2f}."
            + (f" {values['restarted chains']:.0%} of the chains started anew." if "restarted chains" in values else "")
        )

    def _show_view(self) -> None:
        run, index = self.sampler.run, int(self.view.value)
        photo, scale = self._photo(index)
        size = photo.shape[1], photo.shape[0]
        figure = _figure(margin={"l": 0, "r": 0, "t": 0, "b": 0})
        figure.add_image(source=_data_url(photo))
        colours = None if run is None else density_colours(run, index)
        if colours is not None:
            figure.add_layout_image(
                source=_data_url(cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST)),
                xref="x",
                yref="y",
                x=-0.5,
                y=-0.5,
                sizex=size[0],
                sizey=size[1],
                sizing="stretch",
                opacity=0.6,
                layer="above",
            )
        indices = torch.cat([*self._drawn])
        pixels = indices[indices[:, 0] == index][-MAX_POINTS:, 1:].cpu().numpy() * scale
        marker = {"size": 3, "color": "#5ee9ff"}
        figure.add_scatter(x=pixels[:, 1], y=pixels[:, 0], mode="markers", marker=marker, hoverinfo="skip")
        figure.update_xaxes(visible=False, range=(-0.5, size[0] - 0.5))
        figure.update_yaxes(visible=False, range=(size[1] - 0.5, -0.5))
        self.picture.aspect = size[1] / size[0]
        self.picture.figure = figure
        legend = "" if colours is None else " Brighter: more rays are expected there."
        self.caption.content = f"Points are the last {len(pixels):,} rays on this view.{legend}"

    def _photo(self, index: int) -> tuple[np.ndarray, float]:
        """Return a training photograph for the panel, and its scale. The last one is kept."""
        if self._shown_photo is None or self._shown_photo[0] != index:
            photo = self.manager.train_dataset[index]["image"].numpy()[..., :3]
            height, width = photo.shape[:2]
            scale = min(1.0, PICTURE_SIDE / max(height, width))
            size = max(1, round(width * scale)), max(1, round(height * scale))
            self._shown_photo = index, cv2.resize(photo, size, interpolation=cv2.INTER_AREA), scale
        return self._shown_photo[1:]

    def _show_quality(self) -> None:
        steps, errors = zip(*self._history, strict=True)
        error, loss = torch.stack(errors, dim=1).clamp_min(1e-10).cpu().numpy()
        width = min(SMOOTHED_STEPS, len(steps))
        for plot, (title, scale), values in zip(
            self.curves, CURVES.items(), (-10 * np.log10(error), loss), strict=True
        ):
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            figure = _figure(title=title, yaxis={"type": scale})
            figure.add_scatter(x=steps[width - 1 :], y=smooth, mode="lines", line={"color": "#ffd369"})
            plot.figure = figure
        total, rays = self._errors.cpu().numpy()
        seen = np.flatnonzero(rays > 0)
        mean = total[seen] / rays[seen]
        worst = np.argsort(-mean)[:NUM_WORST]
        names = [file.name for file in self.manager.train_dataset.image_filenames]
        rows = [f"| {seen[k]} | {names[seen[k]]} | {-10 * np.log10(max(mean[k], 1e-10)):.1f} |" for k in worst]
        self.worst.content = "\n".join(("**Worst views**\n", "| view | file | PSNR |", "| --- | --- | --- |", *rows))
        if self.coloured.value:
            self._colour_cameras(seen, mean)
        elif self._camera_errors is not None:
            self._camera_errors.remove()
            self._camera_errors = None

    def _colour_cameras(self, views: np.ndarray, errors: np.ndarray) -> None:
        """Put a point at each training camera, from green for the smallest error to red for the largest."""
        rank = np.argsort(np.argsort(errors)) / max(1, len(errors) - 1)
        colours = (255 * colormaps["RdYlGn_r"](rank)[:, :3]).astype(np.uint8)
        centres = self.manager.train_dataset.cameras.camera_to_worlds[torch.from_numpy(views), :, 3].cpu().numpy()
        self._camera_errors = self.viewer.viser_server.scene.add_point_cloud(
            "/soft_mining/camera_errors",
            centres * VISER_NERFSTUDIO_SCALE_RATIO,
            colours,
            point_size=0.6 * self.viewer.config.camera_frustum_scale,
            point_shape="circle",
        )


def _figure(**layout: Any) -> go.Figure:
    """Make an empty plot in the viewer's colours."""
    import plotly.graph_objects as go  # slow to import, and only viewers need it

    return go.Figure(layout=PLOT | layout)


def _data_url(colours: np.ndarray) -> str:
    """Encode colours [height, width, 3] in [0, 1] as a picture that a web page can hold."""
    encoded = cv2.imencode(".jpg", np.ascontiguousarray((255 * colours[..., ::-1]).astype(np.uint8)))[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
