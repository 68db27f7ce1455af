"""A coarse map of the error of each chart, as instant-ngp keeps it for each training image.

Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", SIGGRAPH 2022; the constants
are those of its released code.
"""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

CELLS_PER_ROOT = 3.5
"""Rows and columns of a map are this many times the fourth root of the samples that it is made from."""
FLOOR = 0.01
"""Share of the draws within a chart that is uniform over its rows, and within a row over its columns."""
SMALLEST = 1e-30
"""Added to all errors, so that what has none at all is uniform; no denormal number, which may be flushed to zero."""
CHART_FLOOR = 0.1
"""Share of the draws that is uniform over the charts."""


def resolution(samples: float) -> int:
    """Rows and columns of a map that the given number of samples of each chart is to fill.

    >>> resolution(128 * 4096 / 100)
    29
    """
    return max(1, int(samples**0.25 * CELLS_PER_ROOT))


def deposit(
    error: Float[Tensor, "charts rows columns"],
    chart: Int64[Tensor, " n"],
    position: Float[Tensor, "n 2"],
    value: Float[Tensor, " n"],
) -> None:
    """Add values to the map in place, each to the four cells whose centres are around its place, bilinearly.

    Args:
        error: the map.
        chart: chart of each sample.
        position: place of each sample there, (row, column) in [0, 1].
        value: error of each sample divided by the density it was drawn with.

    >>> import torch
    >>> error = torch.zeros(1, 1, 2)
    >>> deposit(error, torch.tensor([0]), torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]))
    >>> error
    tensor([[[0.5000, 0.5000]]])
    """
    _, rows, columns = error.shape
    place = [(position[:, axis] * size - 0.5).clamp(0, size - 1) for axis, size in enumerate((rows, columns))]
    row, column = (along.long() for along in place)
    down, across = place[0] - row, place[1] - column
    for row_step, row_share in ((0, 1 - down), (1, down)):
        for column_step, column_share in ((0, 1 - across), (1, across)):
            # past the last row or column the share is 0
            index = (chart, (row + row_step).clamp_max(rows - 1), (column + column_step).clamp_max(columns - 1))
            error.index_put_(index, row_share * column_share * value, accumulate=True)


def probabilities(error: Float[Tensor, "charts rows columns"]) -> Float[Tensor, "charts rows columns"]:
    """Probability of drawing each cell: in proportion to the error, with the floors of charts, rows and columns.

    >>> import torch
    >>> probabilities(torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]))
    tensor([[[0.0025, 0.4975]],
    <BLANKLINE>
            [[0.4975, 0.0025]]])
    """
    error = error + SMALLEST
    of_row, of_chart = error.sum(dim=2), error.sum(dim=(1, 2))
    charts, rows, columns = error.shape
    chart = (1 - CHART_FLOOR) * of_chart / of_chart.sum() + CHART_FLOOR / charts
    row = (1 - FLOOR) * of_row / of_chart[:, None] + FLOOR / rows
    column = (1 - FLOOR) * error / of_row[:, :, None] + FLOOR / columns
    return chart[:, None, None] * row[:, :, None] * column
