"""Parquet and saved data sets: values survive, bad rows are found with their place, nothing is written or run."""

import datetime
import decimal
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tests.data.bad_rows import PAIR, SECRET, fault, records, skipping

from fedmira.data.rows import Fault, Place
from fedmira.data.sources import read_file
from fedmira.data.tables import read_saved

START = Place("set", "set", 1, False)


# ---------------------------------------------------------------- Parquet


def parquet(path: Path, rows: list[dict[str, object]] | pyarrow.Table, **options: object) -> Path:
    whole = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(whole, path, **options)
    return path


def unchecked(values: list[bytes]) -> pyarrow.Array:
    """A column of texts that nobody checked to be UTF-8."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers())


def test_parquet_rows_have_the_number_of_the_row_as_their_place(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{**PAIR, "n": number} for number in range(2500)], row_group_size=700)
    found = records(path)
    assert [record.columns["n"] for record in found] == [str(number) for number in range(2500)]
    assert (found[0].source, found[2499].source) == ("a.parquet, row 1", "a.parquet, row 2500")


def test_parquet_values_become_what_json_would_have_held(tmp_path: Path) -> None:
    row = {
        **PAIR,
        "day": datetime.date(2026, 1, 2),
        "price": decimal.Decimal("1.50"),
        "half": 0.5,
        "missing": None,
        "gap": float("nan"),
        "raw": b"x",
        "flag": True,
    }
    [record] = records(parquet(tmp_path / "a.parquet", [row]))
    extra = {"day": "2026-01-02", "price": "1.50", "half": "0.5", "flag": "true"}
    assert record.columns == {**PAIR, **extra}


def test_natural_instructions_can_be_a_parquet_file(tmp_path: Path) -> None:
    task = {"task": "t", "definition": ["d"], "instances": [{"id": "i-1", "input": "x", "output": ["y", "z"]}]}
    [record] = records(parquet(tmp_path / "a.parquet", [task]))
    assert (record.instruction, record.answers, record.source) == ("d", ("y", "z"), "a.parquet#i-1")


def test_a_bad_row_of_a_parquet_file_is_found_and_skipped(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [PAIR, {"prompt": SECRET, "completion": None}, PAIR])
    message = fault(path)
    assert "1 fault:\n  - a.parquet, row 2: 'completion' is null, not text" in message
    assert SECRET not in message
    reading = skipping(path)
    assert (len(reading.records), [skipped.where for skipped in reading.skipped]) == (2, ["a.parquet, row 2"])


def test_bytes_are_not_text(tmp_path: Path) -> None:
    assert "'completion' is bytes, not text" in fault(
        parquet(tmp_path / "a.parquet", [{"prompt": "p", "completion": SECRET.encode()}])
    )


def test_a_parquet_text_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    texts = unchecked([b"a", SECRET.encode() + b"\xff", b"c"])
    path = parquet(tmp_path / "a.parquet", pyarrow.table({"text": texts}))
    assert "1 fault:\n  - a.parquet, row 2: a text is not UTF-8" in fault(path)
    assert [record.answers for record in skipping(path).records] == [("a",), ("c",)]


def test_a_value_that_python_cannot_represent_is_one_bad_row(tmp_path: Path) -> None:
    far = pyarrow.array([0, 2**60, 0], pyarrow.timestamp("ms"))
    path = parquet(tmp_path / "a.parquet", pyarrow.table({"text": ["a", SECRET, "c"], "when": far}))
    message = fault(path)
    assert "1 fault:\n  - a.parquet, row 2: a value that Python cannot represent" in message
    assert SECRET not in message


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    assert "a.parquet: two columns have the same name" in fault(parquet(tmp_path / "a.parquet", twice))


@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header", "page"])
def test_a_damaged_parquet_file_is_a_fault_that_cannot_be_skipped(tmp_path: Path, damage: str, mode: str) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        [{"text": f"{SECRET} {number}"} for number in range(3000)],
        row_group_size=1500,
        write_page_checksum=True,
    )
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "empty": b"",
            "text": b"text\nhello\n",
            "cut": data[:-20],
            "header": data[:-100] + b"\xff" * 60 + data[-40:],
            "page": data[:middle] + bytes(byte ^ 1 for byte in data[middle : middle + 4]) + data[middle + 4 :],
        }[damage]
    )
    message = fault(path, on_bad_row=mode)
    assert "a.parquet: damaged, or not a Parquet file" in message
    assert SECRET not in message


# ---------------------------------------------------------------- folders saved by `datasets`


def save(folder: Path, rows: list[dict[str, object]], **options: object) -> Path:
    import datasets

    datasets.Dataset.from_list(rows, **options).save_to_disk(folder)
    return folder


def test_a_saved_data_set_is_read_in_its_order(tmp_path: Path) -> None:
    import datasets

    rows = [{**PAIR, "n": number} for number in range(2500)]
    datasets.Dataset.from_list(rows).select([7, 3, 2400]).save_to_disk(tmp_path / "set")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "parts", num_shards=3)
    assert [record.columns["n"] for record in records(tmp_path / "set")] == ["7", "3", "2400"]
    found = records(tmp_path / "parts")
    assert [record.columns["n"] for record in found] == [str(number) for number in range(2500)]
    assert (found[0].source, found[-1].source) == ("parts, row 1", "parts, row 2500")


def test_the_splits_of_a_saved_data_set_become_the_column_split(tmp_path: Path) -> None:
    import datasets

    own = [{**PAIR, "split": "mine"}]
    parts = {"train": [PAIR, PAIR], "test": own}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(
        tmp_path / "set"
    )
    found = records(tmp_path / "set")
    assert [record.columns["split"] for record in found] == ["train", "train", "mine"]
    assert [record.source for record in found] == ["set/train, row 1", "set/train, row 2", "set/test, row 1"]


def test_columns_of_mixed_kinds_are_read_as_what_they_were(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'say "hi"', "extra": 1}, {"role": "assistant", "content": "hi", "extra": "x"}]
    folder = save(
        tmp_path / "set",
        [{"messages": turns, "other": [1]}, {"messages": turns, "other": "a"}],
        on_mixed_types="use_json",
    )
    record = records(folder)[0]
    assert [(turn.role, turn.text) for turn in record.turns] == [("user", 'say "hi"')]
    assert record.answers == ("hi",)


def test_a_mixed_column_without_json_is_one_bad_row(tmp_path: Path) -> None:
    texts = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['"a"', SECRET, None]))
    path = parquet(tmp_path / "a.parquet", pyarrow.table({"text": ["a", "b", "c"], "mixed": texts}))
    message = fault(path)
    assert "1 fault:\n  - a.parquet, row 2: a column of JSON: not JSON" in message
    assert SECRET not in message


def test_a_bad_row_of_a_saved_data_set_is_found_and_skipped(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", [PAIR, {"prompt": SECRET, "completion": " "}])
    assert "1 fault:\n  - set, row 2: 'completion' is empty" in fault(folder)
    assert [skipped.where for skipped in skipping(folder).skipped] == ["set, row 2"]


@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("cut", "set: damaged, or incomplete"),
        ("no arrow file", "set: damaged, or incomplete"),
        ("no JSON", "set: 'state.json' is missing or damaged"),
        ("no names", "set: 'state.json' is missing or damaged"),
        ("outside", "set: 'state.json' names a file outside its folder"),
        ("above", "set: 'state.json' names a file outside its folder"),
    ],
)
def test_a_damaged_saved_data_set_is_a_fault_that_cannot_be_skipped(
    tmp_path: Path, damage: str, expected: str, mode: str
) -> None:
    folder = save(tmp_path / "set", [{"text": SECRET}] * 10)
    [arrow] = folder.glob("*.arrow")
    state = folder / "state.json"
    if damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:400])
    elif damage == "no arrow file":
        arrow.unlink()
    else:
        names = {"outside": "../other.arrow", "above": ".."}
        text = {"no JSON": "{", "no names": json.dumps({"_data_files": [1]})}
        state.write_text(text.get(damage) or json.dumps({"_data_files": [{"filename": names[damage]}]}))
    message = fault(folder, on_bad_row=mode)
    assert expected in message
    assert SECRET not in message


@pytest.mark.parametrize("kind", ["Parquet", "saved"])
def test_any_flipped_byte_gives_rows_and_faults_only(tmp_path: Path, kind: str) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{number}"}], "text": "x" * number} for number in range(40)]
    path = parquet(tmp_path / "a.parquet", rows) if kind == "Parquet" else save(tmp_path / "set", rows)
    [file] = [path] if kind == "Parquet" else path.glob("*.arrow")
    data = file.read_bytes()
    random = np.random.default_rng(0)
    ends = Counter()
    for _ in range(400):
        spoilt = bytearray(data)
        spoilt[random.integers(len(data))] ^= 1 << int(random.integers(8))
        file.write_bytes(spoilt)
        found = list(read_file(path) if kind == "Parquet" else read_saved(path, START))
        ends[any(isinstance(item, Fault) for item in found)] += 1
    assert min(ends[True], ends[False]) > 20


def test_a_damaged_list_of_splits_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../train"]}')
    assert "'dataset_dict.json' names a file outside its folder" in fault(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("[]")
    assert "'dataset_dict.json' is missing or damaged" in fault(tmp_path)


def test_a_missing_split_is_a_separate_fault(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert f"{tmp_path.name}/train: 'state.json' is missing or damaged" in fault(tmp_path)


# ---------------------------------------------------------------- nothing is written, nothing is run


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_reading_writes_nothing_and_does_not_even_load_datasets(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    data = tmp_path / "data"
    data.mkdir()
    paths = [
        data / "a.csv",
        parquet(data / "a.parquet", [{"text": "a"}]),
        save(data / "set", [{"text": "a"}]),
    ]
    paths[0].write_text("text\na\n")
    before = everything(data)
    program = (
        "import sys\nfrom fedmira.data.formats import read_records\n"
        "print([len(read_records(path).records) for path in sys.argv[1:]], 'datasets' in sys.modules)"
    )
    own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "c"), "TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[1, 1, 1] False\n"
    assert everything(data) == before
    assert everything(home) == {}


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


def trapped(marker: Path) -> pyarrow.Table:
    """A table of one text whose type asks to be unpickled, as pyarrow's own types once did."""
    trap = pickle.dumps(Trap(marker))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": trap}
    kind = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    return pyarrow.table({"text": ["a"]}, schema=pyarrow.schema([kind]))


@pytest.mark.filterwarnings("ignore")
def test_no_pickle_in_a_parquet_file_is_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Trap(marker)))  # noqa: S301  the trap works
    marker.unlink()
    records(parquet(tmp_path / "a.parquet", trapped(marker)))
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_no_pickle_in_a_saved_data_set_is_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = save(tmp_path / "set", [{"text": "a"}])
    [arrow] = folder.glob("*.arrow")
    with pyarrow.OSFile(str(arrow), "wb") as sink, pyarrow.ipc.new_stream(sink, trapped(marker).schema) as writer:
        writer.write_table(trapped(marker))
    assert [record.answers for record in records(folder)] == [("a",)]
    assert not marker.exists()
