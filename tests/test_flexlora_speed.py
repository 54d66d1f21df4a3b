"""The benchmark of FlexLoRA's merge measures the method, and finds out a yardstick that does something else."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout

SERVER = Path(__file__).resolve().parent.parent / "benchmarks" / "server"
SMALL = {"width": 48, "clients": 3, "rank": 2, "modules": 2, "pairs": 2}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVER))
        yield importlib.import_module("flexlora")


def test_a_row_has_both_sides_of_every_pair(script: ModuleType) -> None:
    row = script.measure_merge(**SMALL)
    assert {key: row[key] for key in ("width", "clients", "rank", "modules")} == {
        key: value for key, value in SMALL.items() if key != "pairs"
    }
    assert len(row["ratio"]) == 2
    assert min(row["ours_s"], row["dense_s"], *row["ratio"]) > 0
    assert row["difference"] < 1e-4


def test_the_yardstick_is_the_papers_formula(script: ModuleType) -> None:
    """Examples 1 and 3, scale 16: 16 (1/4 [[1, 0], [0, 0]] + 3/4 [[0, 0], [0, 1]]), whose largest direction is 12."""
    layout = lora_layout([("m", 2, 2)], 1)
    rows = torch.zeros(2, layout.size)
    rows[0, :4] = torch.tensor([1.0, 0, 1, 0])  # A = [1, 0], B = [1, 0]
    rows[1, :4] = torch.tensor([0.0, 1, 0, 1])
    uploads = Adapters(layout, rows, torch.tensor([1, 1]), torch.tensor([16.0, 16.0]))
    row = script.dense_merged(uploads, torch.tensor([1.0, 3.0]))()
    found = Adapters(layout, row, torch.tensor([1]), torch.tensor([16.0])).product("m")[0]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.0, 12.0]]))


def test_a_yardstick_that_weighs_clients_otherwise_is_found_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Callable[[Adapters, Tensor], Callable[[], Tensor]] = script.dense_merged
    monkeypatch.setattr(script, "dense_merged", lambda uploads, examples: plain(uploads, torch.ones_like(examples)))
    with pytest.raises(AssertionError, match="products differ by"):
        script.measure_merge(**SMALL)


def test_every_module_is_compared(script: ModuleType) -> None:
    """B A of the first module is 1 on both sides; of the second 1 and 2."""
    layout = lora_layout([("m", 1, 1), ("n", 1, 1)], 1)
    one, other = torch.zeros(1, layout.size), torch.zeros(1, layout.size)
    one[0, :4] = torch.tensor([1.0, 1, 1, 1])
    other[0, :4] = torch.tensor([-1.0, -1, 2, 1])  # other signs, the same product
    assert script.apart(one, other, layout) == 0.5
