"""Invalid conditions and generators are rejected; the message names the invalid row."""

import pytest
import torch

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.models.generators.protocol import (
    check_condition,
    check_finite,
    check_labels,
    check_rng,
)


def test_rows_of_a_wide_float32_softmax_are_accepted():
    rng = torch.Generator().manual_seed(0)
    check_condition(torch.randn(64, 1000, generator=rng).mul(5).softmax(dim=1), 1000)


def test_no_rows_are_accepted():
    check_condition(torch.empty(0, 3), 3)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.ones(3), r"shape \(N, 3\), got \(3,\)"),
        (torch.eye(4), r"shape \(N, 3\), got \(4, 4\)"),
        (torch.eye(3, dtype=torch.float64), "expected float32, got torch.float64"),
        (torch.eye(3, dtype=torch.int64), "expected float32, got torch.int64"),
        (torch.tensor([[1.0, 0.0, 0.0], [1.2, -0.2, 0.0]]), "row 1 of 2 contains a negative"),
        (torch.tensor([[0.5, 0.5, 0.001]]), "row 0 of 1 does not sum to 1"),
        (torch.zeros(1, 3), "row 0 of 1 does not sum to 1"),
        (
            torch.tensor([[1.0, 0.0, float("nan")]]),
            "row 0 of 1 contains a value that is not finite",
        ),
        (
            torch.tensor([[float("inf"), 0.0, 0.0]]),
            "row 0 of 1 contains a value that is not finite",
        ),
    ],
)
def test_rows_that_are_not_probability_vectors_are_rejected(condition, message):
    with pytest.raises(ConfigError, match=message):
        check_condition(condition, 3)


def test_every_row_needs_a_generator():
    rng = torch.Generator()
    check_rng([rng, rng], 2)
    with pytest.raises(ValueError, match="each of 2 rows, got 1"):
        check_rng([rng], 2)
    with pytest.raises(ValueError, match="each of 1 rows, got a single generator"):
        check_rng(rng, 1)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3]), torch.tensor([-1]), torch.zeros(2, 1).long(), torch.zeros(2)]
)
def test_labels_out_of_range_are_rejected(labels):
    with pytest.raises(ValueError, match="labels: expected"):
        check_labels(labels, 3)


def test_the_first_row_that_is_not_finite_is_named():
    check_finite(torch.tensor([True, True]))
    with pytest.raises(NumericsError, match="row 1 of 3"):
        check_finite(torch.tensor([True, False, False]))
