"""A data set's own splits are found in every usual spelling, and are never mixed without a word."""

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.data.formats import Record, read_records
from fedmira.data.owners import find_owners
from fedmira.data.partition import form_clients
from fedmira.data.splits import SPLITS, WORDS, file_words, find_splits, read_splits, split_word, without_split
from fedmira.errors import DataError

TRAIN, VALIDATION, TEST = (sorted(word for word, split in WORDS.items() if split == name) for name in SPLITS)


def spellings(word: str) -> list[str]:
    return [
        word,
        word.upper(),
        word.title(),
        f" {word} ",
        f"{word}_set",
        f"{word}set",
        f"{word}-00000-of-00012",
        f"{word}2",
    ]


@pytest.mark.parametrize("word", sorted(WORDS))
def test_a_split_is_read_in_every_spelling(word: str) -> None:
    for value in spellings(word):
        assert read_splits([value]) == {value: WORDS[word]}, value


@pytest.mark.parametrize(
    "value", ["", "A", "pretrain", "pre-train", "trains", "not test", "train/test", "0", "trainer"]
)
def test_what_is_no_split_names_none(value: str) -> None:
    assert split_word(value) is None


def test_eval_is_the_test_but_beside_a_test_it_is_unclear() -> None:
    assert read_splits(["train", "eval"]) == {"train": "train", "eval": "test"}
    assert read_splits(["train", "eval", "Test"]) == {"train": "train", "Test": "test"}
    records = [Record("p", "", ("c",), {"task": "a", "split": split}, "f:1") for split in ("train", "eval", "test")]
    with pytest.raises(DataError, match=r"'eval' beside a test may be the validation; rename it"):
        form_clients(records, split_column="split")


@given(st.sampled_from(TRAIN), st.sampled_from(VALIDATION), st.sampled_from(["test", "testing"]), st.randoms())
def test_a_split_column_deals_every_record_to_the_split_that_it_names(
    train: str, validation: str, test: str, dice: object
) -> None:
    words = {split: spellings(word) for split, word in zip(SPLITS, (train, validation, test), strict=True)}
    records = [
        Record(f"{split} {number}", "", ("c",), {"task": "a", "part": value}, "f:1")
        for split, values in words.items()
        for number, value in enumerate(values)
    ]
    dice.shuffle(records)  # type: ignore[attr-defined]
    (client,) = form_clients(records, split_column="part")
    for split in SPLITS:
        assert {record.instruction.split()[0] for record in getattr(client, split)} == {split}
        assert len(getattr(client, split)) == len(words[split])


# ---------------------------------------------------------------- folders

LAYOUTS = {
    "plain": ("train.jsonl", "test.jsonl"),
    "hub": ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"),
    "mixed endings": ("train.json", "dev.jsonl.gz", "TEST.JSONL"),
    "prefixed": ("gsm8k-train.jsonl", "gsm8k_dev.jsonl", "gsm8k.test.jsonl"),
    "in the middle": ("mnli-train-x.jsonl", "mnli-validation-matched.jsonl"),
    "in data": ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
    "folders": ("train/0.jsonl", "train/1.jsonl", "test/0.jsonl"),
    "beside another": ("train.jsonl", "valid.jsonl", "notes.jsonl"),
    "years": ("train2017.jsonl", "val2017.jsonl"),
}


def write(path: Path, names: Sequence[str]) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"prompt": f"p {name}", "completion": "c", "client": "a"})
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path / name, "wt") as file:
            file.write(text)
    return path


def of(name: str) -> str:
    """The split of a file, by eye."""
    return next(
        split
        for split, words in {"train": ["train"], "validation": ["val", "dev"], "test": ["test"]}.items()
        if any(word in name.lower() for word in words)
    )


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"beside another"}))
def test_files_named_as_splits_are_splits(layout: str, tmp_path: Path) -> None:
    reading = read_records(write(tmp_path, LAYOUTS[layout]))
    column, names = find_splits(reading.records, tables=reading.splits) or ("", [])
    assert column == "split"
    assert {WORDS[name] for name in names} == {of(name) for name in LAYOUTS[layout]}
    (client,) = form_clients(reading.records, by="client", split_column="split")
    for split in SPLITS:
        assert all(of(record.instruction) == split for record in getattr(client, split))
        assert len(getattr(client, split)) == sum(of(name) == split for name in LAYOUTS[layout])


def test_a_file_beside_splits_is_named_and_not_dealt_by_guess(tmp_path: Path) -> None:
    reading = read_records(write(tmp_path, LAYOUTS["beside another"]))
    assert reading.splits == ("train", "valid")
    with pytest.raises(DataError, match=r"1 of 3 records have no 'split': notes\.jsonl:1"):
        form_clients(reading.records, by="client", split_column="split")


@pytest.mark.parametrize(
    "names",
    [
        ("er.jsonl", "icu.jsonl"),
        ("test.jsonl", "er.jsonl"),
        ("test.jsonl",),
        ("task1_test_generation.jsonl", "task2_train_generation.jsonl", "task3_sums.jsonl"),
        ("train_test.jsonl", "test_train.jsonl"),
        ("trainer.jsonl", "tester.jsonl"),
    ],
)
def test_files_that_only_seem_to_be_splits_are_not(names: Sequence[str], tmp_path: Path) -> None:
    reading = read_records(write(tmp_path, names))
    assert reading.splits == ()
    assert find_splits(reading.records) is None


def test_rows_of_sub_folders_are_named_with_their_file_and_errors_with_their_folder_too(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["folders"])
    assert {record.columns["file"] for record in read_records(tmp_path).records} == {"0", "1"}
    (tmp_path / "test" / "0.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"test/0\.jsonl:1"):
        read_records(tmp_path)


def test_files_of_one_name_in_sub_folders_for_splits_are_one_client(tmp_path: Path) -> None:
    write(tmp_path, ("train/oslo.jsonl", "train/rome.jsonl", "test/oslo.jsonl", "test/rome.jsonl"))
    clients = form_clients(read_records(tmp_path).records, by="file", split_column="split", validation=0, test=0)
    assert sorted(client.name for client in clients) == ["oslo", "rome"]
    assert all(client.train and client.test for client in clients)


PAIRS = {  # spellings of the files of two clients, each with two splits or more
    "after": ("oslo_train", "oslo_test", "rome_train", "rome_test"),
    "before": ("train-oslo", "test-oslo", "Train-rome", "Test-rome"),
    "inside": ("oslo.train.v2", "oslo.val.v2", "rome.train.v2", "rome.dev.v2"),
    "joined": ("oslo_trainset", "oslo_testset", "rome train data", "rome test data"),
    "shards": (*(f"oslo-train-0000{n}-of-00002" for n in (0, 1)), "oslo-test-00000-of-00001", "rome-train", "rome-dev"),
    "folders": ("train/oslo_train", "test/oslo_test", "train/rome", "test/rome-test"),
}


@pytest.mark.parametrize("layout", sorted(PAIRS))
def test_files_whose_names_differ_in_the_word_for_a_split_are_one_client(layout: str, tmp_path: Path) -> None:
    reading = read_records(write(tmp_path, [f"{name}.jsonl" for name in PAIRS[layout]]))
    clients = form_clients(reading.records, by="file", split_column="split")
    assert sorted(client.name.partition(".")[0] for client in clients) == ["oslo", "rome"]
    for client in clients:
        names = {split: {of(record.instruction) for record in getattr(client, split)} for split in SPLITS}
        assert all(found <= {split} for split, found in names.items())
        assert names["train"]
        assert names["validation"] or names["test"]


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (("oslo_train", "rome_test"), {"oslo_train", "rome_test"}),  # no pair
        (("train_station", "test_centre"), {"train_station", "test_centre"}),
        (("oslo_val", "oslo_test", "rome_train"), {"oslo_val", "oslo_test", "rome_train"}),  # nothing to train on
        (("oslo_train", "oslo_test", "oslo"), {"oslo_train", "oslo_test", "oslo"}),  # a file has the rest as its name
        (("oslo_train", "oslo_test", "rome_train"), {"oslo", "rome_train"}),
        (("train", "test"), {"train", "test"}),
        (("x_train",), {"x_train"}),
    ],
)
def test_names_that_are_no_pair_are_not_taken_apart(names: Sequence[str], files: set[str], tmp_path: Path) -> None:
    reading = read_records(write(tmp_path, [f"{name}.jsonl" for name in names]))
    assert {record.columns["file"] for record in reading.records} == files


@given(st.from_regex(r"[A-Za-z]{3,8}", fullmatch=True), st.sampled_from(sorted(WORDS)), st.sampled_from(" _-."))
def test_a_name_is_what_is_left_without_the_word_for_its_split(name: str, word: str, between: str) -> None:
    if split_word(name) is None and name.lower() not in ("set", "split", "data"):
        assert without_split(f"{name}{between}{word}") == without_split(f"{word}{between}{name}") == name
        assert without_split(name) == name
    assert without_split(f"{word}-00000-of-00012") == ""


@pytest.mark.parametrize(
    "names",
    [("train", "test"), ("gsm8k_train", "gsm8k_test"), ("train-00000-of-00002", "train-00001-of-00002")],
)
def test_the_splits_and_shards_of_one_data_set_are_not_suggested_as_clients(
    names: Sequence[str], tmp_path: Path
) -> None:
    for name in names:
        rows = [json.dumps({"prompt": f"p{index}", "completion": "c"}) for index in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    assert find_owners(read_records(tmp_path).records)[:2] == (None, [])


def test_a_row_that_names_its_split_itself_is_believed(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "p", "completion": "c", "split": "validation"}')
    assert {record.columns["split"] for record in read_records(tmp_path).records} == {"validation"}


def test_parquet_files_of_the_hub_are_splits(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        table = pyarrow.table({"prompt": ["p"], "completion": ["c"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert read_records(tmp_path).splits == ("test", "train")


# ---------------------------------------------------------------- columns


def found(**columns: Sequence[str]) -> tuple[str, list[str]] | None:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return find_splits([Record("p", "", ("c",), row, "f:1") for row in rows])


@pytest.mark.parametrize("pair", [*itertools.product(TRAIN, VALIDATION), *itertools.product(TRAIN, TEST)])
def test_a_column_of_splits_is_found_under_any_name(pair: tuple[str, str]) -> None:
    for column in ("split", "Split", "set", "partition"):
        assert found(site=["a", "b"], **{column: pair}) == (column, sorted(pair))


@pytest.mark.parametrize(
    "columns",
    [
        {"split": ["train", "train"]},
        {"split": ["A", "B"]},
        {"set": ["train", "x"]},
        {"set": ["validation", "test"]},
        {"words": ["train me", "test me"]},
    ],
)
def test_other_columns_are_not(columns: dict[str, Sequence[str]]) -> None:
    assert found(**columns) is None


@pytest.mark.parametrize("values", [["train", "extra"], ["train_sft", "test_gen"], ["train", "validation_matched"]])
def test_a_column_called_split_counts_as_soon_as_one_value_does(values: list[str]) -> None:
    assert found(split=values) == ("split", sorted(values))


def test_splits_of_a_saved_data_set_count_whatever_they_are_called() -> None:
    records = [Record("p", "", ("c",), {"split": name}, "f:1") for name in ("sport", "law")]
    assert find_splits(records, tables=("sport", "law")) == ("split", ["law", "sport"])


def test_the_words_of_files_do_not_depend_on_their_order() -> None:
    for names in LAYOUTS.values():
        stems = [name.partition(".")[0] for name in names]
        words = dict(zip(stems, file_words(stems), strict=True))
        assert words == dict(zip(stems[::-1], file_words(stems[::-1]), strict=True))
