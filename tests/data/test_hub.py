"""Data sets of the hub, from a small hub of our own on the loopback: what arrives, what is refused, what is left."""

import errno
import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.data.bad_rows import SECRET, fault

from fedmira.data.formats import read_records
from fedmira.data.hub_program import explain
from fedmira.errors import DataError

COMMIT = "a" * 40
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: socratic
  data_files: [{split: train, path: socratic/train.jsonl}]
---
"""
ROWS = b'{"question": "1 + 1?", "answer": "2"}\n'
CHAT = (
    b'{"messages": [{"role": "user", "content": "a"},'
    b' {"role": "assistant", "content": "b", "tool_calls": [{"n": 1}]}]}\n'
)
SETS = {  # name -> its files
    "org/one": {"train.jsonl": ROWS * 3, "test.jsonl": ROWS},
    "org/two": {
        "README.md": CARD.encode(),
        "main/train.jsonl": ROWS * 2,
        "main/test.jsonl": ROWS,
        "socratic/train.jsonl": ROWS,
    },
    "org/csv": {"data/train.csv": b"question,answer\nWhy?,so\n"},
    "org/broken": {"train.jsonl": ROWS + b'{"question": "' + SECRET.encode()},
    "org/nothing": {"README.md": b"# nothing here\n"},
    "org/script": {"script.py": b"raise SystemExit", "README.md": b"# a loading script\n"},
    "org/images": {"train/0001.png": b"no image"},
    "org/mixed": {"train.jsonl": CHAT.replace(b'[{"n": 1}]', b"null") + CHAT},
}
REFUSED = {"org/gated": (403, "GatedRepo"), "org/gone": (404, "RepoNotFound")}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that `datasets` asks for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = self.path.partition("?")[0].removeprefix("/api").removeprefix("/datasets/").replace("%2F", "/")
        name = next((name for name in [*SETS, *REFUSED] if path.startswith((f"{name}/", name))), "")
        verb, _, rest = path.removeprefix(name).lstrip("/").partition("/")
        revision, _, inner = rest.partition("/")
        if name not in SETS:
            status, code = REFUSED.get(name, (404, "RepoNotFound"))
            self.answer(status, code=code)
        elif revision not in ("", "main", COMMIT, "refs"):
            self.answer(404, code="RevisionNotFound")
        elif verb == "resolve":
            content = SETS[name].get(inner)
            self.answer(404, code="EntryNotFound") if content is None else self.answer(200, content, tag=inner)
        elif verb in ("tree", "paths-info"):
            files = [file for file in SETS[name] if file.startswith(inner) or file in asked]
            self.answer(200, self.listing(name, files, inner))
        else:
            siblings = [{"rfilename": file} for file in SETS[name]]
            about = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(about).encode())

    do_HEAD = do_POST = do_GET

    def listing(self, name: str, files: list[str], inner: str) -> bytes:
        deep = "recursive=true" in self.path.lower()
        kept = [file for file in files if deep or "/" not in file.removeprefix(inner).lstrip("/")]
        entries = [{"type": "file", "path": file, "size": len(SETS[name][file]), "oid": "b" * 40} for file in kept]
        folders = {file.partition("/")[0] for file in files if "/" in file.removeprefix(inner).lstrip("/")}
        return json.dumps(entries + [{"type": "directory", "path": f, "oid": "c" * 40} for f in folders]).encode()

    def answer(self, status: int, body: bytes = b"", *, code: str = "", tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        if tag:
            self.send_header("ETag", f'"{tag.replace("/", "-")}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def hub(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Switch the hub on, in an empty current folder, with caches and temporary files below the returned folder."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    watched = tmp_path / "watched"
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR", "HF_HUB_CACHE"):
        (watched / name).mkdir(parents=True)
        monkeypatch.setenv(name, str(watched / name))
    monkeypatch.setattr("tempfile.tempdir", None)  # TMPDIR is read once otherwise
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return watched


def left_over(watched: Path) -> list[str]:
    return [str(path) for path in watched.rglob("*") if not path.is_dir()] + [
        str(path) for path in (watched / "TMPDIR").iterdir()
    ]


def test_a_data_set_of_the_hub_is_read_with_its_splits_and_leaves_nothing(
    hub: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    reading = read_records("org/one")
    assert (reading.format, reading.counts["tables"]) == ("prompt_completion", 2)
    assert [record.columns["split"] for record in reading.records] == ["train"] * 3 + ["test"]
    assert [record.source for record in reading.records][2:] == ["org/one/train, row 3", "org/one/test, row 1"]
    assert left_over(hub) == []
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert not caplog.records


@pytest.mark.parametrize(("subset", "count"), [("main", 3), pytest.param("socratic", 1, marks=pytest.mark.slow)])
def test_a_subset_and_a_revision_choose_what_is_read(hub: Path, subset: str, count: int) -> None:
    assert len(read_records("org/two", subset=subset, revision=COMMIT).records) == count


@pytest.mark.slow
def test_a_csv_file_of_the_hub_is_read(hub: Path) -> None:
    [record] = read_records("org/csv").records
    assert (record.answers, record.source) == (("so",), "org/csv/train, row 1")


@pytest.mark.slow
def test_rows_of_mixed_kinds_are_skipped_like_any_others(hub: Path) -> None:
    reading = read_records("org/mixed", on_bad_row="skip")
    assert [str(skipped) for skipped in reading.skipped] == [
        "org/mixed/train, row 2: 'messages', turn 2 of 2: 'tool_calls' is not read: only text is; remove the row, or "
        "the key"
    ]


@pytest.mark.slow
def test_a_module_in_the_current_folder_is_not_run(hub: Path) -> None:
    Path("datasets.py").write_text("raise SystemExit('run')")
    Path("json.py").write_text("raise SystemExit('run')")
    assert len(read_records("org/csv").records) == 1


REFUSALS = {
    "several subsets": ({"path": "org/two"}, "it has several subsets; name one of them in data.subset: main, socratic"),
    "a misspelt subset": (
        {"path": "org/two", "subset": "sokratic"},
        "it has no subset 'sokratic' (did you mean 'socratic'?); data.subset may be main, socratic",
    ),
    "no such set": ({"path": "org/gone"}, "the hub has no such data set, or you may not see it"),
    "terms": ({"path": "org/gated"}, "the hub requires that you accept its terms"),
    "no such revision": ({"path": "org/one", "revision": "v9"}, "the hub has no such revision of it"),
    "no data": ({"path": "org/nothing"}, "the hub has it, but it has no data file"),
    "a script": ({"path": "org/script"}, "`datasets` could not read it (RuntimeError)"),
    "no text": ({"path": "org/images"}, "it holds no tables of text"),
    "broken rows": ({"path": "org/broken"}, "`datasets` could not read it (DatasetGenerationError)"),
}


FAST = ("no such set", "a script")  # each takes a process that imports `datasets`


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in REFUSALS]
)
def test_a_refusal_of_the_hub_is_one_line_and_leaves_nothing(
    hub: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    options, expected = REFUSALS[kind]
    message = fault(**options)  # type: ignore[arg-type]
    assert message.startswith(f"data.path '{options['path']}': no such file or folder, and as a data set on the hub: ")
    assert expected in message
    assert "\n" not in message
    assert SECRET not in message
    assert left_over(hub) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_line_at_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = fault("org/one")
    assert message.endswith(
        "the hub cannot be reached; check the network, or save the data set to a folder and name that"
    )
    assert "\n" not in message


def test_a_crash_of_the_program_is_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", str(hub))  # where there is no Python
    assert fault("org/one").endswith("`datasets` could not read it (its process ended with 1)")
    assert left_over(hub) == []


def test_a_missing_package_is_named_with_its_extra(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else real(name))
    with pytest.raises(DataError, match=r"needs the package datasets; install it with pip install 'fedmira\[hub\]'"):
        read_records("owner/pairs")


def test_a_full_disk_is_named() -> None:
    full = OSError(errno.ENOSPC, SECRET)
    wrapped = RuntimeError(SECRET)
    wrapped.__cause__ = full
    assert explain(wrapped) == {"reason": "disk"}


def test_an_unexpected_error_is_named_by_its_class_only() -> None:
    assert explain(RuntimeError(SECRET)) == {"reason": "other", "kind": "RuntimeError"}
