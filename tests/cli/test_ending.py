"""How commands end: stopped at any moment, printing to what cannot be written, and with text that looks like markup."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.reports.made_study import make_study
from tests.small_study import Ended, command, has_traceback, start

import fedmira
from fedmira.cli.ending import Steady

ODD = ("x[/q]", "x[bold]red[/bold]", "a:smile:b", "x[link=z]y[/link]", "100%[", "a b'c")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete study of one method, which tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    base, data = small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")
    raw = small_study.settings(base, data, folder / "Straße [b]", methods=[{"name": "local"}], federation={"rounds": 1})
    assert command("run", small_study.save_config(folder / "config.yaml", raw), "-q").code == 0
    return folder / "Straße [b]"


# ---------------------------------------------------------------- Ctrl-C

READY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may ignore it
from fedmira.__main__ import main
os.write(1, b"!")
sys.argv[0] = "fedmira"
main()
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.2, 1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment_is_one_line_and_130(delay_s: float, tmp_path: Path) -> None:
    place = tmp_path / "my study"
    arguments = ["run", "demo", "-q", f"output_dir={place}"]
    process = subprocess.Popen(
        [sys.executable, "-c", READY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 130, err
    (line,) = err.splitlines()
    assert line.startswith("interrupted: ")
    assert ("continue with" in line) == place.exists()


def test_what_is_printed_after_ctrl_c_is_the_command_that_goes_on(finished: Path, tmp_path: Path) -> None:
    raw: dict[str, Any] = small_study.settings(
        finished.parent / "base", finished.parent / "data.jsonl", tmp_path / "my [b] study", federation={"rounds": 400}
    )
    running = start("run", small_study.save_config(tmp_path / "config.yaml", raw), "-q")
    log = tmp_path / "my [b] study" / "local" / "seed-3" / "metrics.jsonl"
    while not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    running.signal(signal.SIGINT)
    ended = running.wait()
    assert (ended.code, ended.out) == (130, "")
    words = shlex.split(ended.err.split("continue with: ")[1])
    assert words == ["fedmira", "resume", str(tmp_path / "my [b] study")]
    assert fedmira.load_run(log.parent).facts.state == "interrupted"


def test_run_with_the_folder_of_a_study_names_the_command_that_continues_it(finished: Path) -> None:
    for folder in (finished, finished / "local" / "seed-3"):
        ended = command("run", folder)
        assert ended.code == 2
        assert ended.err.rstrip().endswith(f"to continue it: {shlex.join(['fedmira', 'resume', str(folder)])}")


def test_run_with_another_folder_says_that_it_is_a_folder(tmp_path: Path) -> None:
    assert "is a folder, not a config; 'fedmira init'" in command("run", tmp_path).err
    (tmp_path / "config.yaml").write_text("")
    assert f"did you mean '{tmp_path / 'config.yaml'}'?" in command("run", tmp_path).err


def test_the_version_is_printed() -> None:
    ended = command("--version")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("fedmira ")


# ---------------------------------------------------------------- where output goes


def ended_into(out: str, *arguments: object, encoding: str = "utf-8", folder: Path) -> Ended:
    """Run a command whose standard output goes to `out`: a file, `closed` (a pipe that nobody reads) or `none`."""
    reader, writer = os.pipe()
    os.close(reader)
    process = os.fork()
    if not process:
        code = 97
        try:
            stderr = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stderr, 2)
            sys.stderr = os.fdopen(2, "w", encoding=encoding)
            if out == "none":
                os.close(1)
                sys.stdout = None  # type: ignore[assignment]
            else:
                target = writer if out == "closed" else os.open(out, os.O_WRONLY | os.O_CREAT)
                os.dup2(target, 1)
                sys.stdout = os.fdopen(1, "w", encoding=encoding)
            sys.argv = ["fedmira", *map(str, arguments)]
            small_study.torch.set_num_threads(1)
            small_study.cli_main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            try:
                if sys.stdout is not None:
                    sys.stdout.flush()
                sys.stderr.flush()
            except OSError:
                code = 120  # as Python's own end
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), "", (folder / "stderr").read_text(encoding, errors="replace"))


def commands(finished: Path, folder: Path) -> Iterator[tuple[object, ...]]:
    """Every command that prints results, once."""
    run = finished / "local" / "seed-3"
    yield ("run", finished / "config.yaml", f"output_dir={folder / 'Größe'}")
    yield ("run", finished / "config.yaml", f"output_dir={folder / 'other'}", "--dry-run")
    yield ("run", finished / "config.yaml", "--show-example")
    yield ("resume", finished)
    yield ("report", finished)
    yield ("report", finished, "--json")
    yield ("methods",)
    yield ("export", run, "--client", "ada", "--out", folder / "東京")
    yield ("chat", run, "--client", "ada", "-p", "w3 w4", "--max-new-tokens", "1")
    yield ("--help",)


@pytest.mark.parametrize(
    "out",
    [
        pytest.param("ascii", marks=pytest.mark.slow),
        "closed",
        pytest.param("/dev/full", marks=pytest.mark.slow),
        pytest.param("none", marks=pytest.mark.slow),
    ],
)
def test_printing_never_changes_the_exit_code(out: str, finished: Path, tmp_path: Path) -> None:
    encoding = "ascii" if out == "ascii" else "utf-8"
    target = str(tmp_path / "out") if out == "ascii" else out
    for arguments in commands(finished, tmp_path):
        ended = ended_into(target, *arguments, encoding=encoding, folder=tmp_path)
        assert ended.code == 0, (arguments, ended.err)
        assert not has_traceback(ended.err), (arguments, ended.err)
        assert ("warning: standard output could not be written" in ended.err) == (out == "/dev/full"), arguments
    assert (tmp_path / "Größe" / "report.html").is_file()
    assert (tmp_path / "東京" / "ada" / "README.md").is_file()


def test_letters_that_an_encoding_does_not_have_are_written_as_numbers(finished: Path, tmp_path: Path) -> None:
    ended_into(str(tmp_path / "out"), "report", finished, encoding="ascii", folder=tmp_path)
    assert "Stra\\xdfe [b]" in (tmp_path / "out").read_text("ascii")


@pytest.mark.slow
def test_the_doctor_prints_to_a_closed_pipe_too(tmp_path: Path) -> None:
    assert ended_into("closed", "doctor", "--json", folder=tmp_path).code == 0


def test_a_stream_that_failed_drops_what_follows(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        steady = Steady(full)
        assert steady.write("x") == 1
        steady.flush()
        assert isinstance(steady.failed, OSError)
        assert steady.write("more") == 4
        steady.flush()


# ---------------------------------------------------------------- text that is literal


@pytest.mark.parametrize("name", ODD)
def test_names_of_folders_are_printed_as_they_are(name: str, tmp_path: Path) -> None:
    study = make_study(tmp_path / name.replace("/", "|"), ["a", "b", "c", "d"], sampled=2)
    ended = command("report", study)
    assert ended.code == 0, ended.err
    assert f"report:   {study}/report.html" in ended.out
    assert f"{study.name}: test split, over clients" in " ".join(ended.out.split())


@pytest.mark.parametrize("name", ODD)
def test_names_of_data_are_printed_as_they_are(name: str, finished: Path, tmp_path: Path) -> None:
    ended = command("run", finished / "config.yaml", "output_dir=x", f"data.path={name}", folder=tmp_path)
    assert ended.code == 2
    assert f"'{name}'" in ended.err


@pytest.mark.parametrize(
    "name", [name if name in ("x[/q]", "a b'c") else pytest.param(name, marks=pytest.mark.slow) for name in ODD]
)
def test_words_of_the_command_line_are_printed_as_they_are(name: str, tmp_path: Path) -> None:
    for arguments in (("run", name), ("report", name), (name,), ("run", "demo", name), ("run", "demo", f"--{name}")):
        ended = command(*arguments, folder=tmp_path)
        assert ended.code == 2, ended
        assert not has_traceback(ended.err), ended.err
        assert name[:5] in ended.err.replace("\n", "")
    written = command("init", f"{name.replace('/', '|')}.yaml", folder=tmp_path)
    assert written.code == 0
    assert f"wrote {name.replace('/', '|')}.yaml" in written.out


def test_a_terminal_shows_names_as_they_are(finished: Path, tmp_path: Path) -> None:
    from tests.cli.test_main import terminal

    place = tmp_path / "[bold]x[" / "q]:smile:_"
    shown = terminal("run", finished / "config.yaml", f"output_dir={place}", "methods.0.label=a", colour=False)
    assert f"{place}/report.html" in shown.replace("\r\n", "\n")
