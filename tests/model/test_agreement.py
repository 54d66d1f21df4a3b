"""Two results of a trial are the same within the rounding of their type, and never where they are not numbers."""

import pytest
import torch

from fedmira.model.agreement import agree


@pytest.mark.parametrize(
    ("dtype", "off", "same"),
    [
        (torch.float32, 0.9e-4, True),
        (torch.float32, 1.1e-4, False),
        (torch.float64, 1.1e-4, False),
        (torch.bfloat16, 0.03, True),
        (torch.bfloat16, 0.07, False),
    ],
)
def test_the_tolerance_follows_the_type(dtype: torch.dtype, off: float, same: bool) -> None:
    assert agree(torch.tensor([1.0 + off]).to(dtype), torch.ones(1, dtype=dtype)) == same


def test_the_tolerance_grows_with_the_largest_number_and_not_below_one() -> None:
    assert agree(torch.tensor([1000.0, 0.09]), torch.tensor([1000.0, 0.0]))
    assert agree(torch.tensor([0.9e-4]), torch.tensor([0.0]))
    assert not agree(torch.tensor([1.0, 0.09]), torch.tensor([1.0, 0.0]))


def test_numbers_of_a_wider_type_are_judged_by_the_type_they_were_computed_in() -> None:
    assert agree(torch.tensor([1.03]), torch.tensor([1.0]), dtype=torch.bfloat16)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_values_that_are_not_numbers_do_not_agree(broken: float) -> None:
    assert not agree(torch.tensor([broken]), torch.tensor([1.0]))
    assert not agree(torch.tensor([1.0]), torch.tensor([broken]))


def test_other_shapes_do_not_agree() -> None:
    assert not agree(torch.zeros(2), torch.zeros(1, 2))
