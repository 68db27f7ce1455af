"""A small scene that renders itself: known cameras, fine and smooth parts, nothing to download.

Balls and cylinders are ray cast with numpy and written in the layout of the NeRF synthetic scenes, which nerfstudio
reads as `blender-data`. Lengths are in scene units, the world is right-handed with z up, angles are in radians.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from rich.progress import track

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import naming_file

Array = NDArray[np.float64]
Texture = Callable[[Array], Array]
"""Surface points in the frame of their solid [N, 3] -> colours in [0, 1] [N, 3]."""

CAMERA_ANGLE_X = 0.6
"""Horizontal field of view of every view."""
LOOK_AT, ORBIT_RADIUS = np.array([0.0, 0.0, -0.1]), 4.0
"""The point that every camera looks at, and its distance from there."""
SUPERSAMPLING = 3
"""Rays per pixel, along each side of the pixel."""
AMBIENT, LIGHT = 0.45, np.array([0.4, -0.5, 0.77]) / np.linalg.norm([0.4, -0.5, 0.77])
"""Share of the light that comes from everywhere, and the unit vector towards where the rest comes from."""
SPLITS = {"train": "train", "val": "test", "test": "test"}
"""Split -> folder of its images: the held-out views serve both during training and after it."""


def blend(share: Array, first: ArrayLike, second: ArrayLike) -> Array:
    """Return `first` where the share [N] is 0, `second` where it is 1, and mixtures between; colours are [3]."""
    return np.asarray(first) + share[:, None] * (np.asarray(second) - np.asarray(first))


def ground(points: Array) -> Array:
    """Return a smooth half, a checkered half and a ring of narrow stripes around both."""
    x, y, _ = points.T
    smooth = blend(0.5 + 0.6 * x, (0.86, 0.72, 0.50), (0.40, 0.62, 0.62))
    checker = blend((x // 0.09 + y // 0.09) % 2, (0.20, 0.25, 0.34), (0.82, 0.78, 0.68))
    stripes = blend(np.arctan2(y, x) * 48 / math.pi // 1 % 2, (0.62, 0.16, 0.14), (0.90, 0.82, 0.62))
    inner = np.where((x + 0.35 * y < 0)[:, None], checker, smooth)
    return np.where((np.hypot(x, y) > 0.86)[:, None], stripes, inner)


def bricks(points: Array) -> Array:
    """Return bricks with thin mortar between them, in rows around the side and in rings on the top."""
    x, y, z = points.T
    across = (z - np.hypot(x, y)) / 0.07  # the height on the side, the distance from the axis on the top
    row = across // 1
    along = np.arctan2(y, x) * 11 / (2 * math.pi) + 0.5 * (row % 2)
    mortar = (across - row < 0.2) | (along % 1 < 0.1)
    tint = 0.5 + 0.5 * np.sin(12.9898 * (along // 1 % 11) + 78.233 * row)
    return np.where(mortar[:, None], (0.82, 0.79, 0.74), blend(tint, (0.55, 0.20, 0.14), (0.74, 0.36, 0.22)))


def gradient(points: Array) -> Array:
    """Return colours that turn slowly with the direction from the centre."""
    return 0.5 + 0.42 * points / np.linalg.norm(points, axis=1, keepdims=True)


def veins(points: Array) -> Array:
    """Return dense winding veins, as of a zebra or a brain coral."""
    x, y, z = 55.0 * points.T
    waves = np.sin(x + 2.0 * np.sin(0.31 * y)) + np.sin(y + 2.0 * np.sin(0.37 * z)) + np.sin(z + 2.0 * np.sin(0.29 * x))
    return blend(np.clip(0.5 + 1.5 * waves, 0.0, 1.0), (0.10, 0.14, 0.16), (0.93, 0.80, 0.34))


def rings(points: Array) -> Array:
    """Return rings in two colours along z."""
    return blend(points[:, 2] // 0.06 % 2, (0.12, 0.30, 0.58), (0.88, 0.66, 0.16))


BALL, CYLINDER = np.ones(3), np.array([1.0, 1.0, 0.0])


@dataclass(frozen=True)
class Solid:
    """The points p for which shape . p^2 <= radius^2 and |p_z| <= half_height, relative to the centre."""

    shape: Array
    """[BALL][] or [CYLINDER][], which stands upright and is closed."""
    centre: tuple[float, float, float]
    """Position in the world. It is the origin of the solid's own frame, whose axes are the world's."""
    radius: float
    half_height: float
    """Of a ball, its radius."""
    texture: Texture

    def depth(self, origin: Array, directions: Array) -> Array:
        """Return how far each ray goes before it enters: [3], [N, 3], own frame -> [N], inf where it passes by."""
        # the rays are within the curved side between two roots, and between the flat ends between two others
        a = np.maximum(directions**2 @ self.shape, 1e-12)
        b = directions @ (self.shape * origin)
        root = np.sqrt(np.maximum(b**2 - a * (self.shape @ origin**2 - self.radius**2), 0.0))
        ends = (np.array([[-self.half_height], [self.half_height]]) - origin[2]) / directions[:, 2]
        enter, leave = np.maximum((-b - root) / a, ends.min(0)), np.minimum((-b + root) / a, ends.max(0))
        return np.where((enter > 0) & (enter < leave), enter, np.inf)

    def colours(self, points: Array) -> Array:
        """Return the lit colours of surface points: [N, 3] in the solid's own frame -> [N, 3]."""
        at_end = np.abs(points[:, 2:]) > self.half_height - 1e-9
        normals = np.where(at_end, np.sign(points) * (0.0, 0.0, 1.0), self.shape * points / self.radius)
        return self.texture(points) * (AMBIENT + (1.0 - AMBIENT) * np.clip(normals @ LIGHT, 0.0, 1.0))[:, None]


POLES = ((-0.62, -0.28, 0.35), (-0.38, -0.52, 0.10), (0.05, 0.02, 0.62), (0.66, -0.22, 0.25), (0.08, 0.72, 0.40))
"""Tops of thin poles that stand on the ground, each with a small ball on it."""
SCENE = [
    Solid(CYLINDER, (0.0, 0.0, -0.65), 1.0, 0.05, ground),
    Solid(CYLINDER, (-0.38, 0.30, -0.34), 0.29, 0.26, bricks),
    Solid(BALL, (0.42, 0.32, -0.30), 0.30, 0.30, gradient),
    Solid(BALL, (0.10, -0.50, -0.34), 0.26, 0.26, veins),
    *(Solid(CYLINDER, (x, y, (top - 0.6) / 2), 0.018, (top + 0.6) / 2, rings) for x, y, top in POLES),
    *(Solid(BALL, top, 0.05, 0.05, gradient) for top in POLES),
]
"""All of it, inside the cube of side 2 around the origin."""


def orbit(num_views: int, first_azimuth: float = 0.0) -> list[Array]:
    """Spread cameras evenly over the part of the hemisphere from 10 to 70 degrees above the horizon.

    Args:
        num_views: How many.
        first_azimuth: Turns the whole set about the vertical.

    Returns:
        Camera-to-world matrices, `num_views` times [4, 4], from the lowest camera to the highest, in OpenGL's axes:
        x right, y up, looking along -z.
    """
    golden_angle = math.pi * (3.0 - math.sqrt(5.0))
    low, high = np.sin(np.radians([10.0, 70.0]))
    poses = []
    for view, height in enumerate(np.linspace(low, high, 2 * num_views + 1)[1::2]):
        azimuth = first_azimuth + golden_angle * view
        flat = math.sqrt(1.0 - height**2)
        back = np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), height])
        right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(back, right), back, LOOK_AT + ORBIT_RADIUS * back], 1)
        poses.append(pose)
    return poses


def ray_directions(pose: Array, size: int) -> Array:
    """Return unit directions in the world through each pixel, row by row: [4, 4] -> [(size * SUPERSAMPLING)^2, 3]."""
    focal = 0.5 * size / math.tan(0.5 * CAMERA_ANGLE_X)
    ticks = ((np.arange(size * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - size / 2) / focal
    x, y = np.meshgrid(ticks, -ticks)
    directions = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True) @ pose[:3, :3].T


def cast(origin: Array, directions: Array) -> tuple[Array, Array]:
    """Find what each ray meets first.

    Args:
        origin: Start of all rays, outside of the scene, [3].
        directions: Unit directions, [N, 3].

    Returns:
        Colours, [N, 3], and distances, [N]; 0 and inf where nothing is met.
    """
    colours, depth = np.zeros_like(directions), np.full(len(directions), np.inf)
    for solid in SCENE:
        start = origin - solid.centre
        found = solid.depth(start, directions)
        nearer = found < depth
        depth[nearer] = found[nearer]
        colours[nearer] = solid.colours(start + found[nearer, None] * directions[nearer])
    return colours, depth


def render_view(pose: Array, size: int) -> NDArray[np.uint8]:
    """Render the scene.

    Args:
        pose: Camera-to-world matrix, [4, 4].
        size: Width and height in pixels.

    Returns:
        Red, green, blue and opacity, [size, size, 4]; the colour is not multiplied by the opacity.
    """
    colours, depth = cast(pose[:3, 3], ray_directions(pose, size))
    samples = np.concatenate([colours, np.isfinite(depth)[:, None]], 1)
    pixels = samples.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 4).mean((1, 3))
    pixels[..., :3] /= np.maximum(pixels[..., 3:], 1e-9)
    return np.round(255.0 * np.clip(pixels, 0.0, 1.0)).astype(np.uint8)


def write_scene(folder: Path, num_train: int = 60, num_eval: int = 8, size: int = 200) -> None:
    """Render the scene into a new folder, in the layout that `blender-data` reads.

    The folder appears under its name only when all of it is written.

    Args:
        folder: Where to; must not exist.
        num_train: Number of training views.
        num_eval: Number of held-out views.
        size: Width and height of each view in pixels.
    """
    partial = folder.with_name(folder.name + ".partial")
    frames = {
        name: [{"file_path": f"./{name}/r_{view}", "transform_matrix": p.tolist()} for view, p in enumerate(poses)]
        for name, poses in (("train", orbit(num_train)), ("test", orbit(num_eval, first_azimuth=1.0)))
    }
    for frame in track([*frames["train"], *frames["test"]], description="Rendering the scene", transient=True):
        file = partial / (frame["file_path"] + ".png")
        with naming_file(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render_view(np.array(frame["transform_matrix"]), size)).save(file)
    for split, name in SPLITS.items():
        text = json.dumps({"camera_angle_x": CAMERA_ANGLE_X, "frames": frames[name]}, indent=1)
        with naming_file(partial / f"transforms_{split}.json"):
            (partial / f"transforms_{split}.json").write_text(text, encoding="utf-8")
    os.rename(partial, folder)


def image_files(folder: Path, split: str) -> list[Path]:
    """Return the images of one split, in the order of their indices."""
    meta = json.loads((folder / f"transforms_{split}.json").read_text(encoding="utf-8"))
    return [folder / (frame["file_path"] + ".png") for frame in meta["frames"]]


def is_complete(folder: Path) -> bool:
    """Tell whether the folder holds every file of a scene."""
    try:
        return all(path.is_file() for split in SPLITS for path in image_files(folder, split))
    except FileNotFoundError:
        return False


def ensure_scene(folder: Path) -> None:
    """Render the scene into the folder, or use what an earlier call has rendered there."""
    if not folder.exists():
        write_scene(folder)
    elif not is_complete(folder):
        raise UserError(f"{folder} exists but holds no complete demo scene. Move it away, or name another --output.")
