"""What a path is: a file, a folder, a saved data set, a name on the hub, or a misspelling."""

from pathlib import Path

import pytest
from tests.data.bad_rows import PAIR, fault, records, write

from fedmira.data.formats import read_records


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_missing_file_suggests_the_nearest_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PAIR)
    assert "no such file or folder (did you mean 'train.jsonl'?)" in fault(tmp_path / "trian.jsonl")


def test_a_file_of_another_kind_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("a,b")
    assert "reads .json, .jsonl, .json.gz, .jsonl.gz, .parquet, .csv, .tsv, .csv.gz, .tsv.gz files" in fault(
        tmp_path / "a.xlsx"
    )


def test_a_folder_without_data_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "the folder holds no .json" in fault(tmp_path)
    assert "folders are not read" not in fault(tmp_path)


def test_a_folder_of_folders_says_that_they_are_not_read(tmp_path: Path) -> None:
    for name in ("train", "test", ".git"):
        (tmp_path / name).mkdir()
    write(tmp_path / "train" / "a.jsonl", PAIR)
    assert "its 2 folders are not read: name one of them" in fault(tmp_path)


def test_a_file_and_its_compressed_copy_are_not_read_as_two(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", PAIR)
    write(tmp_path / "a.jsonl.gz", PAIR)
    assert "more than one file is named 'a'" in fault(tmp_path)


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["b.csv", "a.tsv"], ["a", "b"]),
        (["b.jsonl", "a.json"], ["a", "b"]),
    ],
)
def test_the_files_of_one_kind_in_a_folder_are_read_together(
    tmp_path: Path, names: list[str], files: list[str]
) -> None:
    for name in names:
        separator = "\t" if name.endswith("tsv") else ","
        if ".json" in name:
            write(tmp_path / name, PAIR)
        else:
            (tmp_path / name).write_text(f"prompt{separator}completion\np{separator}c\n")
    assert [record.columns["file"] for record in records(tmp_path)] == files


def test_a_table_about_the_files_of_a_folder_is_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "tasks.jsonl", PAIR)
    (tmp_path / "index.tsv").write_text("task\tcategory\nt\tc\n")
    reading = read_records(tmp_path)
    assert (len(reading.records), reading.counts["tables"], reading.counts["others"]) == (1, 1, 1)


def test_examples_in_files_of_two_kinds_are_not_dropped_silently(tmp_path: Path) -> None:
    write(tmp_path / "tasks.jsonl", PAIR)
    (tmp_path / "more.csv").write_text("prompt,completion\np,c\n")
    message = fault(tmp_path)
    assert "'more.csv' holds examples too, but is another kind of file than 'tasks.jsonl'" in message


@pytest.mark.parametrize("path", ["./org/name", "../org/name", "/org/name", "~/org/name", "~org/name"])
def test_a_path_that_begins_like_one_is_never_looked_for_on_the_hub(here: Path, path: str) -> None:
    message = fault(path)
    assert "no such file or folder" in message
    assert "as a data set of the hub" not in message


def test_a_home_folder_is_not_guessed(here: Path) -> None:
    assert "'~' is not expanded, write the path in full" in fault("~/data")


@pytest.mark.parametrize(
    "path", ["org/name/more", "name.json", "org/name.csv", "org/my data", "a--b/c", "org/..", "", "notes.txt", "a.zip"]
)
def test_a_name_that_the_hub_cannot_have_is_never_looked_for_there(here: Path, path: str) -> None:
    message = fault(path)
    assert "no such file or folder" in message or "the folder holds no" in message
    assert "as a data set of the hub" not in message


def test_a_misspelt_folder_below_an_existing_one_is_a_misspelling(here: Path) -> None:
    write(here / "data.jsonl", PAIR)
    (here / "data" / "train").mkdir(parents=True)
    assert "no such file or folder (did you mean 'train'?)" in fault("data/trian")
    assert "no such file or folder; current folder" in fault("data/other")


def test_a_name_without_an_owner_is_not_on_the_hub(here: Path) -> None:
    (here / "patients").mkdir()
    assert "no such file or folder (did you mean 'patients'?)" in fault("patiens")
    assert "no such file or folder; a data set on the hub is named owner/name; current folder" in fault("gsm8k")


@pytest.mark.parametrize("path", ["org/name", "Org-1/na.me_2"])
@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_name_on_the_hub_names_the_variable_that_switches_it_off(
    here: Path, monkeypatch: pytest.MonkeyPatch, path: str, switch: str
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(switch, "true")
    message = fault(path)
    assert message == (
        f"data.path '{path}': no such file or folder, and as a data set on the hub: the hub is switched off by "
        f"{switch}; unset it, or name a local file or folder"
    )


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_only_the_hub_has_subsets_and_revisions(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.jsonl", PAIR)
    assert f"data.{key} 'main': only a data set on the hub has one" in fault(path, **{key: "main"})


UNREADABLE = Path("/proc/self/mem")  # opens, and fails at the first byte, for root too


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")
def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(UNREADABLE)
    assert f"data: cannot read '{tmp_path / 'a.jsonl'}': Input/output error" in fault(tmp_path / "a.jsonl")


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    assert "File name too long" in fault(tmp_path / ("x" * 300))


def test_a_hidden_file_of_a_folder_is_not_read_and_capitals_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path / ".b.jsonl", PAIR, PAIR)
    (tmp_path / "C.JSONL").write_bytes(write(tmp_path / "a.jsonl", PAIR).read_bytes())
    assert [record.source for record in records(tmp_path)] == ["C.JSONL:1", "a.jsonl:1"]
