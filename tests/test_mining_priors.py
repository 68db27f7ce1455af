"""Laws of the edge strength and of the local contrast."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_softmining.mining import priors
from nerfstudio_softmining.mining.priors import laplacian, local_deviation, sobel

LAW = settings(max_examples=25, deadline=None, derandomize=True)
KERNEL = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))


@st.composite
def images(draw) -> torch.Tensor:
    """A random image [h, w, c], of grey levels or of black and white."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    image = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return image.round() if draw(st.booleans()) else image


def brute_force(image: torch.Tensor) -> torch.Tensor:
    height, width, channels = image.shape
    values = image.tolist()
    result = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            total = 0.0
            for channel in range(channels):
                down = right = 0.0
                for i in range(3):
                    for j in range(3):
                        near = min(max(row + i - 1, 0), height - 1), min(max(column + j - 1, 0), width - 1)
                        value = values[near[0]][near[1]][channel]
                        right += KERNEL[i][j] / 4 * value
                        down += KERNEL[j][i] / 4 * value
                total += down**2 + right**2
            result[row, column] = math.sqrt(total / (2 * channels))
    return result


@LAW
@given(images())
def test_sobel_is_the_double_loop(image):
    torch.testing.assert_close(sobel(image), brute_force(image), atol=1e-6, rtol=1e-5)


@LAW
@given(images())
def test_edge_strength_lies_between_zero_and_one(image):
    assert (sobel(image) >= 0).all() and (sobel(image) <= 1).all()


@LAW
@given(images(), st.integers(1, 3))
def test_edges_turn_and_mirror_with_the_image(image, turns):
    torch.testing.assert_close(sobel(image.rot90(turns)), sobel(image).rot90(turns), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sobel(image.flip(0)), sobel(image).flip(0), atol=1e-6, rtol=1e-5)


@LAW
@given(images(), st.floats(0.1, 1))
def test_edge_strength_is_proportional_to_contrast_and_ignores_brightness(image, contrast):
    torch.testing.assert_close(sobel(contrast * image + 0.3), contrast * sobel(image), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 7), (64, 96), (211, 173)])
def test_constant_images_have_no_edge_at_all(shape, channels):
    """Exactly none, borders included: every positive weight is rounded to at least the smallest byte."""
    for colour in torch.rand(8, channels, generator=torch.Generator().manual_seed(0)):
        assert (sobel(colour.expand(*shape, channels)) == 0).all()


def brute_force_deviation(image: torch.Tensor) -> torch.Tensor:
    """Root of the mean over channels of the variance of nine values, those beyond the border being the nearest ones."""
    height, width, channels = image.shape
    values = image.tolist()
    result = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            variances = []
            for channel in range(channels):
                near = [
                    values[min(max(row + i, 0), height - 1)][min(max(column + j, 0), width - 1)][channel]
                    for i in (-1, 0, 1)
                    for j in (-1, 0, 1)
                ]
                variances.append(statistics.pvariance(near))
            result[row, column] = math.sqrt(statistics.mean(variances))
    return result


@LAW
@given(images())
def test_local_deviation_is_that_of_the_nine_pixels_around(image):
    deviation = local_deviation(image)
    assert deviation.shape == image.shape[:2] and deviation.dtype == image.dtype
    torch.testing.assert_close(deviation, brute_force_deviation(image), atol=1e-6, rtol=1e-4)
    assert (deviation >= 0).all() and (deviation <= 0.5).all()


@LAW
@given(images(), st.integers(1, 3))
def test_local_deviation_turns_and_mirrors_with_the_image(image, turns):
    torch.testing.assert_close(local_deviation(image.rot90(turns)), local_deviation(image).rot90(turns))
    torch.testing.assert_close(local_deviation(image.flip(0)), local_deviation(image).flip(0))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 7), (64, 96), (211, 173)])
def test_constant_images_have_no_contrast_at_all(shape, channels):
    """Exactly none, as every positive weight is rounded to at least the smallest byte."""
    for colour in torch.rand(8, channels, generator=torch.Generator().manual_seed(0)):
        assert (local_deviation(colour.expand(*shape, channels)) == 0).all()


def brute_force_laplacian(image: torch.Tensor) -> torch.Tensor:
    height, width, channels = image.shape
    values = image.tolist()
    result = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                around = [
                    values[min(max(row + i, 0), height - 1)][min(max(column + j, 0), width - 1)][channel]
                    for i in (-1, 0, 1)
                    for j in (-1, 0, 1)
                ]
                result[row, column] += abs(values[row][column][channel] - statistics.fmean(around)) / channels
    return result


@LAW
@given(images())
def test_detail_is_the_difference_from_the_mean_of_the_surroundings(image):
    torch.testing.assert_close(laplacian(image), brute_force_laplacian(image), atol=1e-6, rtol=1e-5)
    assert (laplacian(image) >= 0).all() and (laplacian(image) < 8 / 9 + 1e-6).all()


@LAW
@given(images())
def test_bytes_have_the_detail_of_the_colours_that_they_stand_for(image):
    values = (255 * image).round().to(torch.uint8)
    torch.testing.assert_close(laplacian(values), laplacian(values.float() / 255), atol=1e-6, rtol=1e-5)
    extremes = torch.zeros_like(values)
    extremes[::2, ::2] = 255
    torch.testing.assert_close(laplacian(extremes), laplacian(extremes.float() / 255), atol=1e-6, rtol=1e-5)


def test_a_slope_has_no_detail_within():
    slope = torch.arange(12.0)[:, None, None] / 12 + torch.arange(9.0)[None, :, None] / 20
    assert laplacian(slope)[1:-1, 1:-1].max() < 1e-6 < 0.01 < laplacian(slope)[0].min()


@pytest.mark.parametrize("function", [sobel, local_deviation, laplacian])
@pytest.mark.parametrize("band", [1, 17, 34, 60])
def test_images_that_are_looked_at_in_parts_give_the_same(function, band, monkeypatch):
    image = torch.rand(11, 17, 3, generator=torch.Generator().manual_seed(0))
    whole = function(image)
    monkeypatch.setattr(priors, "BAND", band)
    assert torch.equal(function(image), whole)
