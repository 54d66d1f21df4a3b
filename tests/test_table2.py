"""MIRA's Table II comes out of model configs and FedMira's own code, without a weight; its page is the script's."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmira.adapters import lora_layout

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {  # (model, method) -> parameters, MiB, how they are counted, MiB down and up as FedMira sends them
    ("Data-Juicer LLaMA-1.3B", "MIRA, FedIT"): ("1,572,864", 12.000, "fp32 both ways", 6.0),
    ("Data-Juicer LLaMA-1.3B", "FedPTuning"): ("583,936", 2.2275, "fp32 one way or fp16 both ways", 2.2275390625),
    ("GPT2-large", "MIRA, FedIT"): ("4,055,040", 7.734, "fp16 one way", 15.46875),
    ("GPT2-large", "FedPTuning"): ("371,200", 0.708, "fp16 one way", 1.416015625),
}


class Largest(TorchDispatchMode):
    """Watch how many numbers the largest tensor has that an operation makes in real memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        real = [one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor) and one.device.type != "meta"]
        self.numbers = max([self.numbers, *real])
        return out


@pytest.fixture(scope="module")
def table2() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "paper"))
        yield importlib.import_module("table2")


@pytest.fixture(scope="module")
def made(table2: ModuleType) -> tuple[str, int]:
    """The page, and the size of the largest real tensor that making it took."""
    for remembered in (table2.weights, table2.adapted, table2.make):
        remembered.cache_clear()  # so that everything is made under the watch
    with Largest() as seen:
        text = table2.page()
    return text, seen.numbers


def lines(page: str, title: str) -> list[dict[str, str]]:
    """The first table of a section, by the names of its columns."""
    block = re.search(r"(?:^\|.*\n)+", page.split(f"## {title}\n")[1], flags=re.MULTILINE)
    assert block is not None
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[0].strip().split("\n")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_page_in_docs_is_what_the_script_writes(made: tuple[str, int]) -> None:
    kept = (ROOT / "docs" / "results" / "table2.md").read_text(encoding="utf-8")
    assert kept == made[0], "write it again: python benchmarks/paper/table2.py"


def test_the_four_figures_of_communication_come_out_with_their_conventions(made: tuple[str, int]) -> None:
    rows = {(row["model"], row["method"]): row for row in lines(made[0], "Communication of a client in a round")}
    assert list(rows) == list(FIGURES)
    for key, (parameters, mib, counted, each_way) in FIGURES.items():
        row = rows[key]
        assert row["parameters"] == parameters
        assert float(row["found"].removesuffix(" MiB")) == pytest.approx(mib, abs=5e-4)
        assert row["counted as"] == counted
        assert row["FedMira sends"] == f"{each_way:.4f} + {each_way:.4f} = {2 * each_way:.4f} MiB"
        assert row["padding"] == "0"  # these four happen to end on a cache line


def test_what_is_sent_are_the_bytes_of_the_messages(table2: ModuleType) -> None:
    """4 bytes a number, each way; a row with padding sends it, and the paper's count leaves it out."""
    layout = lora_layout([("m", 3, 2)], 1)  # A [1, 3], B [2, 1]: 5 numbers in a row of 16
    assert (layout.parameters, table2.padding(layout)) == (5, 11)
    assert table2.sent("mira", layout) == table2.sent("fedit", layout) == (64, 64)
    assert table2.size(layout, "fp16", "both ways") * 2**20 == 5 * 2 * 2


def test_the_prompt_encoder_is_the_one_that_fedptuning_trains(table2: ModuleType) -> None:
    """n d + 2 d h + h^2 + 2 h + d with n = 20, h = 128 and d = 2048 or 1280."""
    for base, width in ((table2.LLAMA, 2048), (table2.GPT2, 1280)):
        layout = table2.encoder(base)
        assert layout.parameters == 20 * width + 2 * width * 128 + 128**2 + 2 * 128 + width
        assert layout.virtual_tokens == 20


def test_no_weight_has_memory(table2: ModuleType, made: tuple[str, int]) -> None:
    """The largest base has 1.3e9 numbers; whatever is made in real memory for the page is small."""
    assert made[1] < 100_000
    for base, parameters in ((table2.LLAMA, 1_345_423_360), (table2.GPT2, 774_030_080)):
        model = table2.empty(base)
        assert {one.device.type for one in (*model.parameters(), *model.buffers())} == {"meta"}
        assert table2.weights(base) == parameters


def test_the_watch_sees_a_tensor_that_is_real() -> None:
    with Largest() as seen:
        torch.empty(7, device="meta")
        assert seen.numbers == 0
        torch.zeros(5)
    assert seen.numbers == 5


def test_memory_is_base_row_and_two_moments(made: tuple[str, int]) -> None:
    rows = {(row["model"], row["method"]): row for row in lines(made[0], "Memory of a client")}
    llama, gpt2 = (rows[model, "MIRA, FedIT"] for model in ("Data-Juicer LLaMA-1.3B", "GPT2-large"))
    assert (llama["base, fp16"], gpt2["base, fp16"]) == ("2.506 GiB", "1.442 GiB")
    assert llama["row and moments, fp32"] == "18.00 MiB"  # 3 x 6 MiB
    assert (llama["sum"], llama["paper"]) == ("2.524 GiB", "2.60 GB")  # 2.506 + 18 / 1024


def test_a_figure_that_nothing_gives_is_not_said_to_be_found(table2: ModuleType) -> None:
    layout = table2.public(table2.GPT2, table2.LORA)[1]
    assert table2.fits(layout, 7.74) == [("fp16", "one way")]
    assert table2.fits(layout, 7.75) == []  # 7.734 is off by more than a unit of the last digit
    printed = table2.Printed(table2.GPT2, table2.LORA, 7.75, 1.51)
    assert "not found" in table2.traffic_row(printed)


def test_other_adapters_that_give_a_figure_are_listed(made: tuple[str, int]) -> None:
    """Rank 16 on q and v has twice the numbers of rank 16 on q: half the bytes each gives the same."""
    text = made[0].split("Other adapters give the same figures:")[1]
    assert (
        "| Data-Juicer LLaMA-1.3B | 12 MB | q_proj + v_proj, r 16 | 3,145,728 | fp32 one way or fp16 both ways |"
        in text
    )
    assert "| GPT2-large | 7.74 MB | c_attn + c_proj, r 4 | 2,027,520 | fp32 one way or fp16 both ways |" in text
