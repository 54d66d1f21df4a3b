"""What a run writes is its owner's: modes, links planted by others, and a user's files among those of a study."""

import importlib
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests import small_study
from tests.reports.made_study import make_study
from tests.small_study import command

import fedmira
from fedmira.disk.files import append_lines, copy_file, remove_temporaries, temporary_of, write_atomic, write_json
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.errors import StoreError
from fedmira.export.peft_folder import FILES, copy_adapters
from fedmira.reports.paths import config_without_folders, without_folders
from fedmira.reports.record import read_study
from fedmira.reports.render import render_page

SECRET = "kept"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A study that was run, stopped and resumed under a umask that hides nothing, with exported and merged adapters."""
    folder = tmp_path_factory.mktemp("finished")
    base, data = small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")
    raw = small_study.settings(base, data, folder / "out" / "study", methods=[{"name": "fedavg"}])
    raw |= {"report": {"examples": True}, "federation": {**raw["federation"], "rounds": 1}}
    config = small_study.save_config(folder / "config.yaml", raw)
    before = os.umask(0)
    try:
        assert command("run", config, "-q").code == 0
        study = folder / "out" / "study"
        assert command("resume", study, "federation.rounds=2", "-q").code == 0
        run = study / "fedavg" / "seed-3"
        assert command("export", run, "--out", folder / "out" / "copies").code == 0
        assert command("export", run, "--out", folder / "out" / "merged", "--merge", "--client", "ada").code == 0
    finally:
        os.umask(before)
    yield study
    shutil.rmtree(folder)


def test_files_and_folders_are_for_their_owner_only(finished: Path) -> None:
    written = [finished.parent, *finished.parent.rglob("*")]
    assert len(written) > 60
    wrong = {path: oct(mode) for path in written if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077}
    assert wrong == {}


def test_nothing_temporary_is_left(finished: Path) -> None:
    assert [path for path in finished.parent.rglob("*") if temporary_of(path.name)] == []


def test_a_umask_can_take_more_away(tmp_path: Path) -> None:
    before = os.umask(0o277)
    try:
        write_atomic(tmp_path / "a", b"a")
        write_atomic(tmp_path / "b", b"b", shared=True)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o400, 0o400]


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o444, 0o600, 0o644, 0o777])
def test_a_copy_is_not_open_to_more_than_its_source(mode: int, finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "ada"
    shutil.copytree(finished / "fedavg" / "seed-3" / "adapters" / "ada", source)
    for path in source.iterdir():
        path.chmod(mode)
    copy_adapters([source], [tmp_path / "copy"])
    for name in FILES:
        copied = stat.S_IMODE((tmp_path / "copy" / name).stat().st_mode)
        assert copied & ~mode & 0o077 == 0
        assert copied & 0o077 == 0


# ---------------------------------------------------------------- planted links


def victim(folder: Path) -> Path:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "file").write_text(SECRET)
    return folder / "elsewhere" / "file"


WRITERS: dict[str, Callable[[Path], object]] = {
    "write": lambda path: write_atomic(path, b"new"),
    "write for others": lambda path: write_atomic(path, b"new", shared=True),
    "write json": lambda path: write_json(path, {}),
    "append": lambda path: append_lines(path, ["line"]),
    "copy": lambda path: copy_file(Path(__file__), path),
    "export": lambda path: copy_adapters([path.parent / "source"], [path]),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["a.json", ".a.json.tmp", ".a.json.abcdefgh.tmp"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_no_writer_follows_a_link_under_any_name(
    writer: str, name: str, target: str, finished: Path, tmp_path: Path
) -> None:
    kept = victim(tmp_path)
    shutil.copytree(finished / "fedavg" / "seed-3" / "adapters" / "ada", tmp_path / "source")
    leads = {"file": kept, "folder": kept.parent, "nothing": tmp_path / "made"}[target]
    (tmp_path / name).symlink_to(leads)
    try:
        WRITERS[writer](tmp_path / "a.json")
    except (StoreError, FileExistsError):
        assert name == "a.json"
    assert [path.read_text() for path in kept.parent.iterdir()] == [SECRET]
    assert not (tmp_path / "made").exists()


def test_init_writes_beside_a_planted_name_and_not_through_it(tmp_path: Path) -> None:
    kept = victim(tmp_path)
    (tmp_path / ".fedmira.yaml.tmp").symlink_to(kept)
    assert command("init", folder=tmp_path).code == 0
    assert kept.read_text() == SECRET
    assert (tmp_path / "fedmira.yaml").read_text().startswith("#")


@pytest.mark.parametrize("name", [*FILES, ".", ".."])
@pytest.mark.parametrize("options", [(), ("--merge",), ("--client", "ada")])
def test_export_refuses_links_in_a_run_by_name(
    name: str, options: tuple[str, ...], finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "seed-3"
    shutil.copytree(finished / "fedavg" / "seed-3", run)
    path = (run / "adapters" / "ada" / name).resolve()
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)
    ended = command("export", run, "--out", tmp_path / "out", *options)
    assert ended.code == 2, ended
    assert f"'{path}' is a link to '{moved}'" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_log_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    kept = victim(tmp_path)
    (tmp_path / "log.txt").symlink_to(kept)
    with pytest.raises(StoreError, match=r"log.txt' is a link to"), RunFolder(tmp_path).logging():
        pass
    assert kept.read_text() == SECRET


def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    kept = victim(tmp_path)
    (tmp_path / ".lock").symlink_to(kept)
    with pytest.raises(StoreError, match=r"\.lock' is a link to .*; remove the link"), StudyFolder(tmp_path).held():
        pass
    assert kept.read_text() == SECRET


# ---------------------------------------------------------------- --overwrite


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return make_study(tmp_path / "study", ["a", "b", "c", "d"], sampled=2)


OWN = (
    "notes.txt",
    "local/notes.txt",
    "local/seed-0/notes.txt",
    "local/seed-0/again/config.yaml",
    "local/seed-0/checkpoints/best.safetensors",
    "local/seed-0/checkpoints/round-000001/plot.png",
    "local/seed-0/adapters/a/plot.png",
    "local/seed-0/adapters/notes.txt",
    "local/seed-0/tensorboard/mine.py",
    "mine/notes.txt",
    "mine/seed-0/notes.txt",
    "report.html.bak",
    ".notes.txt.tmp",
)


@pytest.mark.parametrize("name", OWN)
def test_a_users_file_anywhere_in_a_study_is_named_before_anything_is_deleted(name: str, study: Path) -> None:
    (study / name).parent.mkdir(parents=True, exist_ok=True)
    (study / name).write_text(SECRET)
    before = sorted(study.rglob("*"))
    with pytest.raises(StoreError, match=name.rsplit("/", 1)[0]):
        StudyFolder(study).clear()
    assert sorted(study.rglob("*")) == before


@pytest.mark.parametrize("name", ["report.html", "config.yaml", "local", "local/seed-0", "local/seed-0/run.json", "x"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_a_link_anywhere_in_a_study_is_named_before_anything_is_deleted(name: str, target: str, study: Path) -> None:
    kept = victim(study.parent)
    path = study / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to({"file": kept, "folder": kept.parent, "nothing": kept.parent / "none"}[target])
    before = sorted(study.rglob("*"))
    with pytest.raises(StoreError, match=rf"'{name}' \('.*' is a link to '.*'\)"):
        StudyFolder(study).clear()
    assert sorted(study.rglob("*")) == before
    assert kept.read_text() == SECRET


def test_all_that_a_run_writes_is_deleted(finished: Path, tmp_path: Path) -> None:
    copied = tmp_path / "study"
    shutil.copytree(finished, copied)
    run = copied / "fedavg" / "seed-3"
    for name in (".run.json.tmp", ".run.json.a1b2c3d4.tmp", "tensorboard/events.out.tfevents.1", "graph.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("")
    (copied / ".trackio").mkdir()
    (copied / ".trackio" / "fedmira.db").write_text("")
    StudyFolder(copied).clear()
    assert [path.name for path in copied.iterdir()] == [".lock"]
    StudyFolder(copied).check_free()


def test_what_a_crash_left_half_written_goes_and_other_files_stay(tmp_path: Path) -> None:
    for name in (".a.json.tmp", ".a.json.a1b2c3d4.tmp", "a.tmp", ".tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".b.tmp").symlink_to(tmp_path / "a.tmp")
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tmp", ".tmp", ".b.tmp"}


# ---------------------------------------------------------------- where a study can be


@pytest.mark.parametrize(
    "place", ["/proc/none/study", "/sys/study", "file", "file/study", "link", "n" * 300, "a/" + "n" * 300]
)
@pytest.mark.parametrize("options", [(), pytest.param(("--dry-run",), marks=pytest.mark.slow), ("--overwrite",)])
def test_a_folder_that_cannot_be_made_is_refused_before_the_base_is_loaded(
    place: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(SECRET)
    (tmp_path / "link").symlink_to("none")
    ended = command("run", "demo", f"output_dir={place}", *options, folder=tmp_path)
    assert ended.code == 2, ended
    assert "output_dir" in ended.err
    assert "base:" not in ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


# ---------------------------------------------------------------- locks


def test_the_package_is_imported_and_locks_a_study_where_fcntl_is_not(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            modules = [name for name in sys.modules if name.split(".")[0] in ("fedmira", "filelock")]
            for name in modules:
                del sys.modules[name]
            sys.modules["fcntl"] = None  # type: ignore[assignment]
            for name in modules:
                importlib.import_module(name)
            with importlib.import_module("fedmira.disk.folders").StudyFolder(tmp_path).held():
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_study_is_held_by_one_and_freed_when_that_one_is_killed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with StudyFolder(tmp_path).held():
            os.write(writer, b"x")
            while True:
                signal.pause()
    os.close(writer)  # so that a child that dies too soon is an end of file here, and not a wait
    assert os.read(reader, 1) == b"x"
    with pytest.raises(StoreError, match="in use by another fedmira process"), StudyFolder(tmp_path).held():
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    with StudyFolder(tmp_path).held():
        pass


# ---------------------------------------------------------------- reports


def test_a_report_shows_no_absolute_path(study: Path) -> None:
    folder = StudyFolder(study)
    config = folder.config()
    far = str(study.parent / "my folder" / "data.jsonl")
    folder.rewrite(config.model_copy(update={"data": config.data.model_copy(update={"path": far})}))
    for run in folder.runs():
        facts = run.facts
        command = [str(study.parent / "bin" / "fedmira"), "run", far, f"data.path={far}"]
        run.update(replace(facts, command=command, base_model=far, resumed=[{"command": command}]))
    page = render_page(read_study(study))
    assert str(study.parent) not in page
    assert "my folder" not in page
    assert "data.jsonl" in page
    assert fedmira.load_config(study / "config.yaml").data.path == far


def test_the_config_of_a_report_is_the_same_but_for_its_folders() -> None:
    text = "lr: 3e-4\nid: '007'\ndata: {path: '/home/my user/a b/c.jsonl', by: x}\nuse:\n- no\n- /a/b: /c/d\n"
    assert config_without_folders(text) == text.replace("/home/my user/a b/", "").replace("/a/", "").replace("/c/", "")
    plain = "a: /x/y\nb:\n- /c/d\n- e: /f/g\n"
    assert config_without_folders(plain) == "a: y\nb:\n- d\n- e: g\n"
    assert "user" not in config_without_folders("a: /home/my\n  user/data set/x\nb: 1\n")
    assert config_without_folders("a: [1, /x/y") == without_folders("a: [1, /x/y")
