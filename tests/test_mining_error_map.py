"""Laws of the coarse error map, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_softmining.mining import error_map

LAW = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
PLACES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)


def shares(place: float, cells: int) -> dict[int, float]:
    """Share of each cell along one axis: linear between the centres of cells, all to the last one beyond those."""
    centres = [(i + 0.5) / cells for i in range(cells)]
    held = min(max(place, centres[0]), centres[-1])
    return {i: max(0.0, 1 - abs(held - centre) * cells) for i, centre in enumerate(centres)}


@st.composite
def samples(draw) -> tuple[tuple[int, int, int], torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = draw(SHAPES)
    rows = draw(st.lists(st.tuples(st.integers(0, shape[0] - 1), PLACES, PLACES, st.floats(0, 10)), max_size=12))
    image = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    position = torch.tensor([row[1:3] for row in rows]).view(-1, 2)
    return shape, image, position, torch.tensor([row[3] for row in rows])


@st.composite
def errors(draw) -> torch.Tensor:
    """Of very different sizes, with zeros: single cells, whole rows, whole images."""
    shape, seed = draw(SHAPES), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(shape, generator=generator) * 10 ** draw(st.floats(-6, 6))
    for part in (shape, (*shape[:2], 1), (shape[0], 1, 1)):
        error = error * (torch.rand(part, generator=generator) < draw(st.sampled_from([1.0, 0.7])))
    return error


@LAW
@given(samples())
def test_deposits_are_the_bilinear_splat(case):
    shape, image, position, value = case
    start = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    error = start.clone()
    error_map.deposit(error, image, position, value)
    expected = start.double()
    for k, (row, column), v in zip(image.tolist(), position.tolist(), value.tolist(), strict=True):
        for i, down in shares(row, shape[1]).items():
            for j, across in shares(column, shape[2]).items():
                expected[k, i, j] += down * across * v
    torch.testing.assert_close(error, expected.float(), atol=1e-4, rtol=1e-5)


@LAW
@given(samples())
def test_deposits_keep_the_total_of_each_image(case):
    shape, image, position, value = case
    error = torch.zeros(shape)
    error_map.deposit(error, image, position, value)
    expected = torch.zeros(shape[0]).index_add_(0, image, value)
    torch.testing.assert_close(error.sum(dim=(1, 2)), expected, atol=1e-5, rtol=1e-5)
    assert (error >= 0).all()


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 5), (4, 1), (3, 4)])
def test_a_deposit_at_a_centre_is_that_cells_alone_and_corners_belong_to_the_last_cells(rows, columns):
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack(((row + 0.5) / rows, (column + 0.5) / columns), dim=-1).view(-1, 2)
    value = torch.arange(1.0, rows * columns + 1)
    error = torch.zeros(1, rows, columns)
    error_map.deposit(error, torch.zeros(rows * columns, dtype=torch.int64), places, value)
    torch.testing.assert_close(error.flatten(), value, atol=1e-5, rtol=1e-5)
    for corner, cell in (((0.0, 0.0), (0, 0)), ((0.0, 1.0), (0, -1)), ((1.0, 0.0), (-1, 0)), ((1.0, 1.0), (-1, -1))):
        error = torch.zeros(1, rows, columns)
        error_map.deposit(error, torch.tensor([0]), torch.tensor([corner]), torch.tensor([3.0]))
        assert error[0][cell] == 3 and error.sum() == 3


@LAW
@given(errors())
def test_probabilities_are_the_triple_loop(error):
    """A image, then a row of it, then a column of that row, each in proportion to the error or, by the floor, not."""
    images, rows, columns = error.shape
    values = error.double()
    expected = torch.zeros(error.shape, dtype=torch.float64)
    everything = values.sum().item()
    for k in range(images):
        of_image = values[k].sum().item()
        image = 0.9 * (of_image / everything if everything else 1 / images) + 0.1 / images
        for i in range(rows):
            of_row = values[k, i].sum().item()
            row = 0.99 * (of_row / of_image if of_image else 1 / rows) + 0.01 / rows
            for j in range(columns):
                share = values[k, i, j].item() / of_row if of_row else 1 / columns
                expected[k, i, j] = image * row * (0.99 * share + 0.01 / columns)
    torch.testing.assert_close(error_map.probabilities(error), expected.float(), atol=1e-7, rtol=1e-4)


@LAW
@given(errors())
def test_probabilities_sum_to_one_and_keep_their_floors(error):
    p = error_map.probabilities(error).double()
    images, rows, columns = error.shape
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    of_image, of_row = p.sum(dim=(1, 2)), p.sum(dim=2)
    least = 1 - 1e-4
    assert (of_image >= least * error_map.IMAGE_FLOOR / images).all()
    assert (of_row >= least * error_map.CELL_FLOOR / rows * of_image[:, None]).all()
    assert (p >= least * error_map.CELL_FLOOR / columns * of_row[:, :, None]).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 4), (5, 2, 7)])
def test_without_any_error_draws_are_uniform(shape):
    p = error_map.probabilities(torch.zeros(shape))
    torch.testing.assert_close(p, torch.full(shape, 1 / math.prod(shape)))


@LAW
@given(errors(), st.floats(0.01, 100))
def test_probabilities_ignore_the_scale_of_the_error(error, factor):
    torch.testing.assert_close(
        error_map.probabilities(factor * error), error_map.probabilities(error), atol=1e-7, rtol=1e-4
    )


@LAW
@given(st.floats(0, 1e8))
def test_a_map_has_cells_for_its_samples(samples):
    side = error_map.resolution(samples)
    assert isinstance(side, int) and side >= 1
    assert error_map.resolution(2 * samples) >= side
    if side > 1:
        assert side**4 <= 3.5**4 * samples * (1 + 1e-9)
    assert (side + 1) ** 4 > 3.5**4 * samples * (1 - 1e-9)
