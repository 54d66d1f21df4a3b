"""One client written in two ways: numbers of two types are one name, other spellings are reported with both."""

import decimal
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import small_study
from tests.small_study import command

from fedmira.data.formats import read_records
from fedmira.data.records import EXACT, scalars


@given(st.integers(-EXACT + 1, EXACT - 1))
def test_a_whole_number_has_one_name_whatever_its_type(number: int) -> None:
    for value in (
        number,
        float(number),
        decimal.Decimal(number),
        decimal.Decimal(number).scaleb(0) + decimal.Decimal("0.00"),
    ):
        assert scalars({"site": value}) == {"site": str(number)}


@given(st.floats(allow_nan=False).filter(lambda value: not value.is_integer() or abs(value) >= EXACT))
def test_any_other_number_is_written_so_that_it_reads_back(value: float) -> None:
    (text,) = scalars({"site": value}).values()
    assert json.loads(text) == value


@pytest.mark.parametrize("value", [None, math.nan, decimal.Decimal("NaN")])
def test_what_is_no_number_is_no_value(value: object) -> None:
    assert scalars({"site": value}) == {}


@pytest.mark.parametrize("text", ["1.0", "007", "no", "1e3", " 1"])
def test_text_stays_as_it_is(text: str) -> None:
    assert scalars({"site": text}) == {"site": text}


def test_files_with_whole_numbers_of_two_types_have_the_same_clients(tmp_path: Path) -> None:
    for name, kind, values in (("a", pyarrow.int64(), [1, 2]), ("b", pyarrow.float64(), [1.0, 2.0])):
        table = pyarrow.table(
            {"prompt": ["p", "q"], "completion": ["c", "c"], "site": pyarrow.array(values, type=kind)}
        )
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert {record.columns["site"] for record in read_records(tmp_path).records} == {"1", "2"}


PAIRS = [
    ("Charité", unicodedata.normalize("NFD", "Charité")),
    ("ada", "Ada"),
    ("St Mary", "St  Mary"),
    ("7", "007"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_study.save_base(tmp_path_factory.mktemp("base") / "base")


def warnings(base: Path, folder: Path, rows: list[tuple[Any, Any]], **data: Any) -> list[str]:
    """What --show-example warns of for rows (client, group)."""
    lines = [{"prompt": "w2", "completion": "w3", "client": client, "group": group} for client, group in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *lines]))
    clients = {"by": "client", **data}
    raw = small_study.settings(base, folder / "rows.jsonl", folder / "study", data={"clients": clients})
    ended = command("run", small_study.save_config(folder / "config.yaml", raw), "--show-example")
    assert ended.code == 0, ended.err
    return [line for line in ended.err.splitlines() if "several spellings" in line]


def test_names_that_differ_in_spelling_only_are_reported_once_with_both(base: Path, tmp_path: Path) -> None:
    (line,) = warnings(base, tmp_path, [(name, "g") for pair in PAIRS for name in pair])
    assert line.startswith("warning: 4 values of 'client' in several spellings, of which each counts as another: ")
    assert r"'Charit\xe9' and 'Charite\u0301'" in line
    for pair in PAIRS[1:]:
        assert f"'{pair[0]}' and '{pair[1]}'" in line


def test_groups_are_compared_too_and_parts_of_a_partitioner_are_not(base: Path, tmp_path: Path) -> None:
    rows = [("ada", "North"), ("eve", "north"), ("Ada ", "south")]
    assert [line.split("'")[1] for line in warnings(base, tmp_path, rows, groups="group")] == ["client", "group"]
    assert warnings(base, tmp_path, rows[:2]) == []
    parts = {"by": "task", "partitioner": {"name": "iid", "num_partitions": 2}}
    assert warnings(base, tmp_path, rows, **parts) == []


def test_a_partitioner_that_mixes_what_a_column_separates_is_reported(base: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"w{row % 9 + 2}", "completion": "w3", "hospital": f"h{row % 6}"} for row in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for partitioner, mixes in (
        ({"name": "iid", "num_partitions": 3}, True),
        (
            {"name": "pathological", "num_partitions": 3, "num_classes_per_partition": 2, "partition_by": "hospital"},
            False,
        ),
        ({"name": "natural_id", "partition_by": "hospital"}, False),
    ):
        clients = {"partitioner": partitioner}
        raw = small_study.settings(base, tmp_path / "rows.jsonl", tmp_path / "study", data={"clients": clients})
        ended = command("run", small_study.save_config(tmp_path / "config.yaml", raw), "--show-example")
        assert ended.code == 0, ended.err
        note = "note: the partitioner mixes what 'hospital' (6 values) separates; for a client per value: "
        assert (f"{note}data.clients.by=hospital data.clients.partitioner=null" in ended.err) == mixes
