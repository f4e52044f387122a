"""The simulated clicks of the benchmark of corrections."""

import numpy as np
import pytest

from benchmarks.clicks import correct_click


def box(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((30, 40), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize(
    ("pred", "truth", "point", "label"),
    [
        (box(0, 0, 0, 0), box(10, 17, 20, 27), (23, 13), 1),  # all is missing
        (box(0, 29, 0, 9), box(0, 0, 0, 0), None, 0),  # all is too much
        (box(5, 10, 5, 10), box(5, 10, 5, 10) | box(20, 25, 30, 35), (32, 22), 1),
        (box(5, 10, 5, 10) | box(20, 29, 0, 9), box(5, 10, 5, 10) | box(0, 3, 30, 33), (4, 24), 0),  # the larger one
    ],
)
def test_a_click_in_the_middle_of_the_largest_error(
    pred: np.ndarray, truth: np.ndarray, point: tuple[int, int] | None, label: int
) -> None:
    (x, y), found = correct_click(pred, truth)
    assert found == label
    assert (pred != truth)[int(y), int(x)]
    if point is not None:
        assert (x, y) == point
