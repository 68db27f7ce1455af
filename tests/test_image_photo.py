"""Laws of photographs: what is read is what is in the file, between pixels as at them, and back."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import make_photo, photo_of, picture
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.photo import Encoding

LAW = settings(max_examples=40, deadline=None, derandomize=True)
LIMITS = {"uint8": 255, "uint16": 65535}
DATA = os.environ.get("SOFTMINING_DATA")


def save(values: NDArray, path: Path) -> Path:
    """Write values in the order RGBA."""
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[values.shape[2]]
    options = [cv2.IMWRITE_TIFF_COMPRESSION, 1] if path.suffix == ".tiff" else []  # else light is written with loss
    assert cv2.imwrite(str(path), np.ascontiguousarray(values[..., order]), options)
    return path


def integers(dtype: str, channels: int, seed: int = 0) -> NDArray:
    random = np.random.default_rng(seed)
    values = random.integers(0, LIMITS[dtype] + 1, (7, 9, channels)).astype(dtype)
    if channels == 4:
        values[0, :3, 3], values[1, :3, 3] = 0, 1
    return values


def lights(channels: int, negative: bool = True, size: tuple[int, int] = (7, 9), seed: int = 0) -> NDArray[np.float32]:
    """Values over ten powers of ten, some below zero."""
    random = np.random.default_rng(seed)
    values = 10 ** random.uniform(-5, 5, (*size, channels))
    if negative:
        values *= random.choice([1, 1, 1, -1], values.shape)
    if channels == 4:
        values[..., 3] = random.uniform(0, 1, size)
        values[0, :3, 3] = 0
    return values.astype(np.float32)


def expected_values(values: NDArray) -> torch.Tensor:
    """Integers as shares of their limit, colours times alpha."""
    shares = torch.from_numpy(values / LIMITS[values.dtype.name])
    if values.shape[2] == 4:
        shares[..., :3] *= shares[..., 3:]
    return shares.float()


def visible(values: NDArray) -> NDArray:
    """The values with black where nothing can be seen."""
    if values.shape[2] < 4:
        return values
    seen = values.copy()
    seen[..., :3][values[..., 3] == 0] = 0
    return seen


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", LIMITS)
def test_integers_are_read_as_shares_of_their_limit(dtype, channels, suffix, tmp_path):
    values = integers(dtype, channels)
    photo = photos.read(save(values, tmp_path / f"a{suffix}"))
    assert (photo.encoding.dtype, photo.encoding.channels, photo.size) == (dtype, channels, (7, 9))
    torch.testing.assert_close(photo.values, expected_values(values), rtol=0, atol=2e-7)


MODES = {
    ".png": ("L", "RGB", "RGBA", "P", "LA", "1"),
    ".tiff": ("L", "RGB", "P"),
    ".jpg": ("L", "RGB"),
    ".bmp": ("RGB",),
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_colours_are_those_that_another_program_wrote(suffix, mode, tmp_path):
    flags = np.zeros((32, 48, 4), np.uint8)
    flags[:, :16, 0], flags[:, 16:32, 1], flags[:16, 32:, 2], flags[..., 3] = 250, 200, 150, 255
    flags[16:, :, 3] = 100
    image = Image.fromarray(flags if "A" in mode else flags[..., :3]).convert(mode)
    image.save(tmp_path / f"a{suffix}")
    photo = photos.read(tmp_path / f"a{suffix}")
    shown = np.asarray(image.convert({"LA": "RGBA", "P": "RGB", "1": "L"}.get(mode, mode))).reshape(32, 48, -1)
    assert photo.encoding.channels == shown.shape[2]
    assert (photo.values - expected_values(shown)).abs().mean() < (0.02 if suffix == ".jpg" else 1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff"])
def test_photographs_are_turned_as_their_exif_says(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture(16, 40)).save(path, exif=exif, **({"quality": 98} if suffix == ".jpg" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    photo = photos.read(path)
    assert photo.size == expected.shape[:2]
    assert (photo.values - expected_values(expected)).abs().max() < 0.05


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", [".exr", ".hdr", ".tiff"])
def test_high_dynamic_range_can_be_read_and_got_back(channels, suffix, tmp_path):
    if suffix == ".hdr" and channels != 3:
        pytest.skip("the format has three channels")
    values = lights(channels, negative=suffix != ".hdr")
    photo = photos.read(save(values, tmp_path / f"a{suffix}"))
    assert photo.encoding.dtype == "float32" and photo.values.dtype == torch.float32
    assert photo.values.isfinite().all() and photo.encoding.channels == channels
    if channels < 4:  # else colours are multiplied by alpha
        assert photo.values.min() == 0 and abs(photo.values.max() - 1) < 1e-6
    expected = visible(values)
    error = np.abs(photo.encoding.decode(photo.values) - expected)
    unit = np.median(np.abs(values[..., :3]))
    shared_exponent = np.abs(values).max(axis=2, keepdims=True) / 100 if suffix == ".hdr" else 0
    alpha = values[..., 3:] if channels == 4 else 1  # what is faint is known less well
    assert (error * alpha <= 2e-5 * (unit + np.abs(expected)) + shared_exponent).all()


def test_high_dynamic_range_is_compressed_by_its_sign_and_logarithm(tmp_path):
    values = lights(3)
    photo = photos.read(save(values, tmp_path / "a.exr"))
    colours = torch.from_numpy(values).double().flatten()
    unit = float(colours.abs().median())
    assert abs(photo.encoding.unit / unit - 1) < 1e-5
    compressed = colours.sign() * (1 + colours.abs() / unit).log()
    stretched = (compressed - compressed.min()) / (compressed.max() - compressed.min())
    torch.testing.assert_close(photo.values.flatten(), stretched.float(), rtol=0, atol=1e-6)


@LAW
@given(
    st.sampled_from(["uint8", "uint16"]), st.sampled_from([1, 3, 4]), st.integers(1, 6), st.integers(1, 6), st.data()
)
def test_integers_come_back_exactly(dtype, channels, height, width, data):
    numbers = st.sampled_from([0, 1, 2, LIMITS[dtype] - 1, LIMITS[dtype]]) | st.integers(0, LIMITS[dtype])
    count = height * width * channels
    values = np.array(data.draw(st.lists(numbers, min_size=count, max_size=count)), dtype)
    values = values.reshape(height, width, channels)
    encoding = Encoding(dtype, channels)
    encoded = encoding.encode(values)
    assert encoded.min() >= 0 and encoded.max() <= 1
    decoded = encoding.decode(encoded)
    assert decoded.dtype == values.dtype and np.array_equal(decoded, visible(values))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_what_is_written_is_read_again(dtype, channels, tmp_path):
    values = visible(lights(channels) if dtype == "float32" else integers(dtype, channels))
    path = photos.write(values, tmp_path / "deeper" / "name.txt")
    assert path == tmp_path / "deeper" / ("name.exr" if dtype == "float32" else "name.png")
    photo = photos.read(path)
    assert (photo.encoding.dtype, photo.encoding.channels) == (dtype, channels)
    unchanged = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).reshape(values.shape)
    assert np.array_equal(unchanged, values[..., {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_predictions_out_of_range_are_written_as_the_ends(dtype):
    encoding = Encoding(dtype, 4)
    decoded = encoding.decode(torch.tensor([[[2.0, -1.0, 0.5, 2.0], [0.5, 0.5, 0.5, -1.0]]]))
    assert np.isfinite(decoded).all()
    limit = LIMITS.get(dtype, 1)
    assert decoded[0, 0, 3] == limit and (decoded[0, 1] == 0).all()
    if dtype != "float32":
        assert decoded[0, 0, :2].tolist() == [limit, 0]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-6, 1e30])
def test_a_constant_light_can_be_read_and_got_back(value, tmp_path):
    photo = photos.read(save(np.full((3, 4, 3), value, np.float32), tmp_path / "flat.exr"))
    assert photo.values.isfinite().all() and (photo.values == photo.values[0, 0, 0]).all()
    np.testing.assert_allclose(photo.encoding.decode(photo.values), value, rtol=1e-5)


def test_pictures_show_grey_as_three_and_leave_alpha_out():
    grey = photos.to_rgb(make_photo(channels=1).values)
    assert grey.shape == (24, 40, 3) and (grey == grey[..., :1]).all()
    colours = make_photo(channels=4).values
    assert np.array_equal(photos.to_rgb(colours), colours[..., :3].numpy())
    assert photos.to_rgb(torch.tensor([[[2.0, -1.0, 0.5]]])).tolist() == [[[1, 0, 0.5]]]


def spoilt(value: float) -> NDArray[np.float32]:
    values = lights(3)
    values[4, 2, 1] = values[5, 1, 0] = value
    return values


BAD = {
    "text": (lambda path: path.with_suffix(".png").write_text("no picture"), ".png", "Convert"),
    "empty": (lambda path: path.with_suffix(".jpg").write_bytes(b""), ".jpg", "Convert"),
    "folder": (lambda path: path.mkdir(), "", "Name a photograph"),
    "missing": (lambda path: None, ".png", "Name a photograph"),
    "nan": (lambda path: save(spoilt(np.nan), path.with_suffix(".exr")), ".exr", r"row 4, column 2.* Repair"),
    "inf": (lambda path: save(spoilt(-np.inf), path.with_suffix(".exr")), ".exr", r"row 4, column 2.* Repair"),
    "long integers": (
        lambda path: save(np.ones((3, 4, 1), np.int32), path.with_suffix(".tiff")),
        ".tiff",
        "int32.* Convert",
    ),
    "two channels": (
        lambda path: path.with_suffix(".pam").write_bytes(
            b"P7\nWIDTH 4\nHEIGHT 3\nDEPTH 2\nMAXVAL 255\nTUPLTYPE GRAYSCALE_ALPHA\nENDHDR\n" + bytes(24)
        ),
        ".pam",
        "2 channels.* Convert",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_can_not_be_used_is_named_with_the_fix(name, tmp_path):
    make, suffix, fix = BAD[name]
    make(tmp_path / "picture")
    with pytest.raises(UserError, match=f"picture{suffix}.*{fix}"):
        photos.read(tmp_path / f"picture{suffix}")


def test_a_photo_moves_as_a_whole():
    photo = photo_of(integers("uint16", 4))
    moved = photo.to("cpu")
    assert torch.equal(moved.values, photo.values) and moved.encoding == photo.encoding and moved.size == photo.size


@pytest.mark.skipif(not DATA, reason="SOFTMINING_DATA is not set: the folder of real photographs")
@pytest.mark.parametrize("name", ["images/albert.jpg", "nerf_llff_data/fern/images_4/image000.png"])
def test_real_photographs_are_read_as_another_program_reads_them(name):
    path = Path(DATA or "") / name
    photo = photos.read(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    expected = expected.reshape(*expected.shape[:2], -1)
    assert tuple(photo.values.shape) == expected.shape
    difference = photo.encoding.decode(photo.values).astype(np.int16) - expected
    assert np.abs(difference).max() <= (3 if path.suffix == ".jpg" else 0)
