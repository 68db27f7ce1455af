"""A small scene that renders itself: known cameras, fine and smooth parts, nothing to download.

Analytic solids are ray cast with numpy and written in the layout of the NeRF synthetic scenes, which nerfstudio reads
as `blender-data`. Lengths are in scene units, the world is right-handed with z up, angles are in radians.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from nerfstudio_softmining.errors import UserError

Array = NDArray[np.float64]
Texture = Callable[[Array], Array]
"""Surface points of one solid, in its own frame [N, 3] -> colours in [0, 1] [N, 3]."""

CAMERA_ANGLE_X = 0.6
"""Horizontal field of view of every view."""
ORBIT_RADIUS = 4.0
"""Distance of every camera from the point that all of them look at, [LOOK_AT][]."""
LOOK_AT = np.array([0.0, 0.0, -0.1])
SUPERSAMPLING = 3
"""Rays per pixel, along each side of the pixel."""
AMBIENT = 0.45
"""Share of the light that comes from everywhere; the rest comes from [LIGHT][]."""
LIGHT = np.array([0.4, -0.5, 0.77]) / np.linalg.norm([0.4, -0.5, 0.77])
"""Unit vector towards the light."""
GROUND_HEIGHT = -0.6
"""Height that everything stands on."""
BRICK_HALF_SIDE = 0.26
SPLITS = ("train", "val", "test")
SHOWN_IN = {"train": "train", "val": "test", "test": "test"}
"""Split -> folder of its images: the held-out views serve both during training and after it."""


# ---------------------------------------------------------------------------------------------------------- textures


def mix(choose: Array, first: tuple[float, ...], second: tuple[float, ...]) -> Array:
    """Blend two colours.

    Args:
        choose: [N], 0 gives `first`, 1 gives `second`.
        first: Colour in [0, 1], 3 numbers.
        second: Colour in [0, 1], 3 numbers.

    Returns:
        Colours, [N, 3].
    """
    return np.asarray(first) + choose[:, None] * (np.asarray(second) - np.asarray(first))


def ground_texture(points: Array) -> Array:
    """A smooth half, a checkered half and a ring of narrow stripes around both: [N, 3] -> [N, 3]."""
    x, y = points[:, 0], points[:, 1]
    radius = np.hypot(x, y)
    smooth = mix(0.5 + 0.6 * x, (0.86, 0.72, 0.50), (0.40, 0.62, 0.62))
    checker = mix(np.mod(np.floor(x / 0.09) + np.floor(y / 0.09), 2), (0.20, 0.25, 0.34), (0.82, 0.78, 0.68))
    stripes = mix(np.mod(np.floor(np.arctan2(y, x) * 48 / math.pi), 2), (0.62, 0.16, 0.14), (0.90, 0.82, 0.62))
    inner = np.where((x + 0.35 * y < 0)[:, None], checker, smooth)
    return np.where((radius > 0.86)[:, None], stripes, inner)


def brick_texture(points: Array) -> Array:
    """Bricks with thin mortar between them, in rows on the sides and along x on the top: [N, 3] -> [N, 3]."""
    x, y, z = points.T
    on_top = z >= BRICK_HALF_SIDE - 1e-9
    across = np.where(on_top, y, z) / 0.07
    row = np.floor(across)
    along = np.where(on_top, x, x + y) / 0.16 + 0.5 * (row % 2)
    mortar = (across - row < 0.2) | (along - np.floor(along) < 0.1)
    tint = 0.5 + 0.5 * np.sin(12.9898 * np.floor(along) + 78.233 * row)
    return np.where(mortar[:, None], (0.82, 0.79, 0.74), mix(tint, (0.55, 0.20, 0.14), (0.74, 0.36, 0.22)))


def gradient_texture(points: Array) -> Array:
    """Colours that turn slowly with the direction from the centre: [N, 3] -> [N, 3]."""
    return 0.5 + 0.42 * points / np.linalg.norm(points, axis=1, keepdims=True)


def veined_texture(points: Array) -> Array:
    """Dense winding veins, as of a zebra or a brain coral: [N, 3] -> [N, 3]."""
    x, y, z = 55.0 * points.T
    veins = np.sin(x + 2.0 * np.sin(0.31 * y)) + np.sin(y + 2.0 * np.sin(0.37 * z)) + np.sin(z + 2.0 * np.sin(0.29 * x))
    return mix(np.clip(0.5 + 1.5 * veins, 0.0, 1.0), (0.10, 0.14, 0.16), (0.93, 0.80, 0.34))


def ringed_texture(points: Array) -> Array:
    """Rings in two colours along z: [N, 3] -> [N, 3]."""
    return mix(np.mod(np.floor(points[:, 2] / 0.06), 2), (0.12, 0.30, 0.58), (0.88, 0.66, 0.16))


# ------------------------------------------------------------------------------------------------------------ solids


class Solid(Protocol):
    """A convex solid that rays can be cast at from a point outside of it."""

    @property
    def centre(self) -> Array:
        """Position in the world, [3]. It is the origin of the solid's own frame, whose axes are the world's."""
        ...

    @property
    def texture(self) -> Texture:
        """What colours its surface."""
        ...

    @property
    def bound(self) -> float:
        """Radius of the ball around the centre that holds the solid."""
        ...

    def depth(self, origin: Array, directions: Array) -> Array:
        """Distance along each ray to the entry into the solid: [3], [N, 3], own frame -> [N], inf where missed."""
        ...

    def normals(self, points: Array) -> Array:
        """Outward unit normals at surface points: [N, 3], own frame -> [N, 3], own frame."""
        ...


def quadratic_entry(a: Array, half_b: Array, c: float) -> Array:
    """First root of a t^2 + 2 half_b t + c = 0: [N], [N], () -> [N], inf where there is none."""
    discriminant = half_b**2 - a * c
    root = (-half_b - np.sqrt(np.maximum(discriminant, 0.0))) / np.maximum(a, 1e-12)
    return np.where(discriminant > 0, root, np.inf)


@dataclass(frozen=True)
class Sphere:
    """A ball."""

    centre: Array
    radius: float
    texture: Texture

    @property
    def bound(self) -> float:
        return self.radius

    def depth(self, origin: Array, directions: Array) -> Array:
        return quadratic_entry(np.ones(len(directions)), directions @ origin, float(origin @ origin) - self.radius**2)

    def normals(self, points: Array) -> Array:
        return points / self.radius


@dataclass(frozen=True)
class Cylinder:
    """A closed upright cylinder."""

    centre: Array
    radius: float
    half_height: float
    texture: Texture

    @property
    def bound(self) -> float:
        return math.hypot(self.radius, self.half_height)

    def depth(self, origin: Array, directions: Array) -> Array:
        flat, flat_origin = directions[:, :2], origin[:2]
        side = quadratic_entry(
            np.sum(flat**2, 1), flat @ flat_origin, float(flat_origin @ flat_origin) - self.radius**2
        )
        side = np.where(np.abs(origin[2] + side * directions[:, 2]) <= self.half_height, side, np.inf)
        cap_height = math.copysign(self.half_height, origin[2])
        cap = (cap_height - origin[2]) / directions[:, 2]
        on_cap = np.sum((flat_origin + cap[:, None] * flat) ** 2, 1) <= self.radius**2
        return np.minimum(side, np.where(on_cap & (cap > 0), cap, np.inf))

    def normals(self, points: Array) -> Array:
        on_cap = np.abs(np.abs(points[:, 2]) - self.half_height) < 1e-9
        side = np.stack([points[:, 0], points[:, 1], np.zeros(len(points))], 1) / self.radius
        cap = np.stack([np.zeros(len(points)), np.zeros(len(points)), np.sign(points[:, 2])], 1)
        return np.where(on_cap[:, None], cap, side)


@dataclass(frozen=True)
class Cube:
    """A cube with its sides along the world's axes."""

    centre: Array
    half_side: float
    texture: Texture

    @property
    def bound(self) -> float:
        return math.sqrt(3.0) * self.half_side

    def depth(self, origin: Array, directions: Array) -> Array:
        first, second = (-self.half_side - origin) / directions, (self.half_side - origin) / directions
        enter, leave = np.minimum(first, second).max(1), np.maximum(first, second).min(1)
        return np.where((enter < leave) & (enter > 0), enter, np.inf)

    def normals(self, points: Array) -> Array:
        face = np.abs(points).argmax(1)
        return np.sign(points) * np.eye(3)[face]


def pole(x: float, y: float, top: float) -> list[Solid]:
    """A thin ringed pole that stands on the ground at (x, y), with a small ball on its top at height `top`."""
    half_height = (top - GROUND_HEIGHT) / 2
    stem = Cylinder(np.array([x, y, GROUND_HEIGHT + half_height]), 0.018, half_height, ringed_texture)
    return [stem, Sphere(np.array([x, y, top]), 0.05, gradient_texture)]


SMOOTH_BALL = Sphere(np.array([0.42, 0.32, GROUND_HEIGHT + 0.3]), 0.3, gradient_texture)
VEINED_BALL = Sphere(np.array([0.1, -0.5, GROUND_HEIGHT + 0.26]), 0.26, veined_texture)
BRICK_CUBE = Cube(np.array([-0.36, 0.3, GROUND_HEIGHT + BRICK_HALF_SIDE]), BRICK_HALF_SIDE, brick_texture)
SCENE: list[Solid] = [
    Cylinder(np.array([0.0, 0.0, GROUND_HEIGHT - 0.05]), 1.0, 0.05, ground_texture),
    SMOOTH_BALL,
    VEINED_BALL,
    BRICK_CUBE,
    *pole(-0.62, -0.28, 0.35),
    *pole(-0.38, -0.52, 0.10),
    *pole(0.05, 0.02, 0.62),
    *pole(0.66, -0.22, 0.25),
    *pole(0.08, 0.72, 0.40),
]
"""All of it, inside the cube of side 2 around the origin."""


# ----------------------------------------------------------------------------------------------------------- cameras


def look_at(position: Array, target: Array) -> Array:
    """Camera at `position` that sees `target` in the middle, upright.

    Args:
        position: World position of the camera, [3].
        target: World position to look at, [3], not straight above or below.

    Returns:
        Camera-to-world matrix, [4, 4], OpenGL axes (x right, y up, looking along -z).
    """
    back = (position - target) / np.linalg.norm(position - target)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, position], 1)
    return pose


def orbit(num_views: int, first_azimuth: float = 0.0) -> list[Array]:
    """Cameras spread evenly over the part of the hemisphere from 10 to 70 degrees above the horizon.

    Args:
        num_views: How many.
        first_azimuth: Turns the whole set about the vertical.

    Returns:
        Camera-to-world matrices, `num_views` times [4, 4], from the lowest camera to the highest.
    """
    golden_angle = math.pi * (3.0 - math.sqrt(5.0))
    low, high = math.sin(math.radians(10.0)), math.sin(math.radians(70.0))
    poses = []
    for view in range(num_views):
        height = low + (high - low) * (view + 0.5) / num_views
        azimuth = first_azimuth + golden_angle * view
        flat = math.sqrt(1.0 - height**2)
        offset = np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), height])
        poses.append(look_at(LOOK_AT + ORBIT_RADIUS * offset, LOOK_AT))
    return poses


def ray_directions(pose: Array, size: int) -> Array:
    """Unit directions through a regular grid of points in each pixel.

    Args:
        pose: Camera-to-world matrix, [4, 4].
        size: Width and height of the image in pixels.

    Returns:
        World directions, [(size * SUPERSAMPLING)^2, 3], row by row.
    """
    focal = 0.5 * size / math.tan(0.5 * CAMERA_ANGLE_X)
    ticks = (np.arange(size * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - size / 2
    x, y = np.meshgrid(ticks / focal, -ticks / focal)
    directions = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True) @ pose[:3, :3].T


# --------------------------------------------------------------------------------------------------------- rendering


def may_hit(solid: Solid, origin: Array, directions: Array) -> NDArray[np.intp]:
    """Rays that pass through the ball around a solid: [3], [N, 3] -> their indices."""
    towards = solid.centre - origin
    reach = math.sqrt(towards @ towards - solid.bound**2)
    return np.nonzero(directions @ towards > reach)[0]


def first_hits(origin: Array, directions: Array) -> tuple[Array, NDArray[np.int64]]:
    """What each ray meets first.

    Args:
        origin: Start of all rays, outside of every solid's bounding ball, [3].
        directions: Unit directions, [N, 3].

    Returns:
        Distance, [N], inf where nothing is met, and index into [SCENE][], [N], -1 where nothing is met.
    """
    depth = np.full(len(directions), np.inf)
    owner = np.full(len(directions), -1)
    for index, solid in enumerate(SCENE):
        rays = may_hit(solid, origin, directions)
        found = solid.depth(origin - solid.centre, directions[rays])
        nearer = found < depth[rays]
        depth[rays[nearer]] = found[nearer]
        owner[rays[nearer]] = index
    return depth, owner


def shade(solid: Solid, points: Array) -> Array:
    """Colours of lit surface points: [N, 3] in the solid's own frame -> [N, 3]."""
    lambert = np.clip(solid.normals(points) @ LIGHT, 0.0, 1.0)
    return solid.texture(points) * (AMBIENT + (1.0 - AMBIENT) * lambert)[:, None]


def render_view(pose: Array, size: int) -> NDArray[np.uint8]:
    """Image of the scene.

    Args:
        pose: Camera-to-world matrix, [4, 4].
        size: Width and height in pixels.

    Returns:
        Red, green, blue and opacity, [size, size, 4]; the colour is not multiplied by the opacity.
    """
    origin, directions = pose[:3, 3], ray_directions(pose, size)
    depth, owner = first_hits(origin, directions)
    colour = np.zeros_like(directions)
    for index, solid in enumerate(SCENE):
        rays = np.nonzero(owner == index)[0]
        points = origin - solid.centre + depth[rays, None] * directions[rays]
        colour[rays] = shade(solid, points)
    samples = np.concatenate([colour, (owner >= 0)[:, None]], 1)
    pixels = samples.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 4).mean((1, 3))
    pixels[..., :3] /= np.maximum(pixels[..., 3:], 1e-9)
    return np.round(255.0 * np.clip(pixels, 0.0, 1.0)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- files


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
    poses = {"train": orbit(num_train), "test": orbit(num_eval, first_azimuth=1.0)}
    todo = [(name, view, pose) for name in poses for view, pose in enumerate(poses[name])]
    for name in poses:
        (partial / name).mkdir(parents=True, exist_ok=True)
    for name, view, pose in track(todo, description="Rendering the scene", transient=True):
        Image.fromarray(render_view(pose, size)).save(partial / name / f"r_{view}.png")
    for split in SPLITS:
        text = json.dumps(transforms(SHOWN_IN[split], poses[SHOWN_IN[split]]), indent=1)
        (partial / f"transforms_{split}.json").write_text(text, encoding="utf-8")
    os.rename(partial, folder)


def transforms(name: str, poses: list[Array]) -> dict[str, Any]:
    """Content of a transforms file.

    Args:
        name: Folder of the images.
        poses: Camera-to-world matrix of each image, [4, 4].

    Returns:
        Cameras and image names as the NeRF synthetic scenes give them.
    """
    frames = [{"file_path": f"./{name}/r_{view}", "transform_matrix": p.tolist()} for view, p in enumerate(poses)]
    return {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}


def image_files(folder: Path, split: str) -> list[Path]:
    """Images of one split, in the order of their indices."""
    meta = json.loads((folder / f"transforms_{split}.json").read_text(encoding="utf-8"))
    return [folder / (frame["file_path"] + ".png") for frame in meta["frames"]]


def is_complete(folder: Path) -> bool:
    """Whether the folder holds every file of a scene."""
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
