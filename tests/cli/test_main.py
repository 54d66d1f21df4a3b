"""The command line: exit codes, what goes to which stream, and messages instead of tracebacks."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.small_study import CLIENTS, Ended, command, has_traceback

import fedmira
from fedmira.cli.main import main as cli_main

LOCAL = [{"name": "local"}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture
def config(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A config of one method whose study would lie in tmp_path/study."""
    return small_study.save_config(
        tmp_path / "config.yaml", small_study.settings(*inputs, tmp_path / "study", methods=LOCAL)
    )


@pytest.fixture(scope="module")
def finished(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A study run by the command line, and how that ended; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    raw = small_study.settings(*inputs, folder / "study", methods=LOCAL)
    return folder / "study", command("run", small_study.save_config(folder / "config.yaml", raw))


def assert_refused(ended: Ended, *words: str) -> None:
    """Bad input: code 2, a message and no traceback on standard error, nothing on standard output."""
    assert (ended.code, ended.out) == (2, ""), ended
    assert not has_traceback(ended.err), ended.err
    for word in words:
        assert word in ended.err, ended.err


# ---------------------------------------------------------------- a good run


def test_a_run_ends_with_0_and_prints_results_to_the_one_stream_and_progress_to_the_other(
    finished: tuple[Path, Ended],
) -> None:
    study, ended = finished
    assert ended.code == 0
    assert "untouched base" in ended.out
    assert str(study / "report.html") in ended.out
    assert "round 4/4" in ended.err
    assert " left\n" in ended.err  # after each round but the last, what is left of the study
    assert "round 4/4" not in ended.out
    assert "report.html" not in ended.err


def test_no_colour_or_cursor_codes_reach_a_file(finished: tuple[Path, Ended]) -> None:
    assert "\x1b" not in finished[1].out + finished[1].err


def test_with_json_standard_output_is_json_and_nothing_else(config: Path) -> None:
    ended = command("run", config, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)
    assert ended.err == ""


def test_a_report_in_json_is_the_summary_on_disk(finished: tuple[Path, Ended]) -> None:
    ended = command("report", finished[0], "--json")
    assert json.loads(ended.out) == json.loads((finished[0] / "summary.json").read_text())


def test_quiet_silences_progress_and_keeps_the_results(config: Path) -> None:
    ended = command("run", config, "-q")
    assert (ended.code, ended.err) == (0, "")
    assert "untouched base" in ended.out


def test_overrides_on_the_command_line_change_the_run(config: Path, tmp_path: Path) -> None:
    ended = command("run", config, "federation.rounds=1", "methods.0.label=alone", f"output_dir={tmp_path / 'other'}")
    assert ended.code == 0
    assert fedmira.load_run(tmp_path / "other" / "alone" / "seed-3").facts.rounds == 1


def terminal(*arguments: object, colour: bool) -> str:
    """What `fedmira ARGUMENTS` shows on a terminal of 100 columns."""
    process, screen = os.forkpty()
    if process == 0:
        os.environ.update({"TERM": "xterm-256color", "COLUMNS": "100"})
        os.environ.pop("NO_COLOR", None)
        if not colour:
            os.environ["NO_COLOR"] = "1"
        import sys

        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["fedmira", *map(str, arguments)]
        try:
            cli_main()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    shown = b""
    while True:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.waitpid(process, 0)
    return shown.decode()


def test_a_terminal_without_colour_gets_none(finished: tuple[Path, Ended]) -> None:
    shown = terminal("report", finished[0], colour=False)
    assert "untouched base" in shown
    assert not [code for code in ("\x1b[3", "\x1b[9", "\x1b[38") if code in shown.replace("\x1b[3m", "")]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments", [("none.yaml",), ("none",)])
def test_a_missing_config_is_named(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert_refused(command("run", *arguments, folder=tmp_path), "no such config file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainin.local_steps=3"], ["trainin: unknown key (did you mean 'training'?)"]),
        (["training.local_step=3"], ["training.local_step: unknown key (did you mean 'local_steps'?)"]),
        (["federation.rounds=0", "lora.r=no"], ["2 faults", "federation.rounds: found 0", "lora.r: found 'no'"]),
        (["methods.0.name=miro"], ["unknown method 'miro' (did you mean 'mira'?)", "fedavg"]),
        (["methods.0={name: local, x: 1}"], ["methods.0.x: unknown key"]),
        (["methods.0.name=.mira"], ["methods.0.name: found '.mira'"]),
        (["methods.7.name=x"], ["not an index of a list of 1"]),
        (["seeds"], ["an override is written a.b=c"]),
        (["data.path=none.jsonl"], ["none.jsonl"]),
        (["data.clients.by=client_"], ["no column 'client_' (did you mean 'client'?)"]),
        (["model.base_model=./none"], ["no such folder"]),
        (["model.base_model=nobody/nothing"], ["nobody/nothing"]),
        (["model.base_model=bundled:nothing"], ["bundled:model"]),
        (["model.device=cuda:7"], ["cuda:7"]),
        (["data.max_length=999"], ["data.max_length: found 999", "64 positions"]),
        (["lora.target_modules=[none]"], ["none"]),
    ],
)
def test_bad_input_is_explained_and_nothing_is_left_behind(
    overrides: list[str], words: list[str], config: Path, tmp_path: Path
) -> None:
    assert_refused(command("run", config, *overrides), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_unstable_coupling_is_refused_with_the_largest_that_is_allowed(config: Path, tmp_path: Path) -> None:
    graph = "graph: {kind: groups, column: group}"
    ended = command("run", config, f"methods.0={{name: mira, lambda: 9, normalise: none, {graph}}}")
    assert_refused(ended, "eta x lambda = 9 must be below", "lower lambda")
    limit = float(ended.err.split("must be below ")[1].split()[0])
    assert 0.1 < limit < 2
    for coupling, code in ((limit * 1.01, 2), (limit * 0.99, 0)):
        name = f"methods.0={{name: mira, lambda: {coupling}, normalise: none, {graph}}}"
        assert command("run", config, name, "federation.rounds=4").code == code, coupling
    assert (tmp_path / "study").is_dir()


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n", "[]\n", "{\n"])
def test_data_without_an_example_is_refused_with_the_files_name(content: str, config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    assert_refused(command("run", config, f"data.path={tmp_path / 'empty.jsonl'}"), "empty.jsonl")
    assert not (tmp_path / "study").exists()


def test_an_output_folder_that_holds_something_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("mine")
    for options in ([], ["--overwrite"]):
        assert_refused(command("run", config, *options), "thesis.tex", "output_dir")
    assert (tmp_path / "study" / "thesis.tex").read_text() == "mine"


def test_an_output_folder_that_is_a_file_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "study").write_text("mine")
    for options in ([], ["--overwrite"]):
        assert_refused(command("run", config, *options), "is a file")


def test_a_study_that_is_there_is_kept_unless_overwriting_is_asked_for(config: Path, tmp_path: Path) -> None:
    assert command("run", config, "-q").code == 0
    assert_refused(command("run", config), "already holds a study", "fedmira resume", "--overwrite")
    assert command("run", config, "-q", "--overwrite", "methods.0.name=fedavg").code == 0
    assert (tmp_path / "study" / "fedavg").is_dir()
    assert not (tmp_path / "study" / "local").exists()


@pytest.mark.parametrize(
    "arguments",
    [("run",), ("rum",), ("run", "x", "--unknown"), ("resume",), ("export", "x", "--client"), ("--unknown",), ()],
)
def test_a_command_line_that_cannot_be_read_ends_with_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    ended = command(*arguments)
    assert ended.code == 2, ended
    assert not has_traceback(ended.err), ended.err


@pytest.mark.parametrize("name", ["resume", "report", "export"])
@pytest.mark.parametrize("path", ["none", "empty", "file"])
def test_a_path_that_is_no_study_is_refused(name: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert_refused(command(name, tmp_path / path, folder=tmp_path), path)


def test_a_damaged_run_json_is_refused_by_name(config: Path, tmp_path: Path) -> None:
    assert command("run", config, "-q").code == 0
    damaged = tmp_path / "study" / "local" / "seed-3" / "run.json"
    damaged.write_text("{")
    assert_refused(command("resume", tmp_path / "study"), "run.json", "is damaged")


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    ended = command("run", "none.yaml", "--debug", folder=tmp_path)
    assert ended.code == 2
    assert has_traceback(ended.err)


def test_a_bug_of_ours_ends_with_1_and_says_so(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(fedmira.study.face, "run", broken)
    ended = command("run", config)
    assert ended.code == 1
    assert "bug: RuntimeError" in ended.err


# ---------------------------------------------------------------- the other commands


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("resume", "--help"), ("export", "--help")])
def test_help_goes_to_standard_output_and_ends_with_0(arguments: tuple[str, ...]) -> None:
    ended = command(*arguments)
    assert (ended.code, ended.err) == (0, "")
    assert "Usage" in ended.out


def test_methods_lists_every_method_with_one_line_each() -> None:
    ended = command("methods")
    assert (ended.code, ended.err) == (0, "")
    assert [line.split()[0] for line in ended.out.splitlines()] == fedmira.method_names()


def test_methods_in_json_are_the_same_methods() -> None:
    assert list(json.loads(command("methods", "--json").out)) == fedmira.method_names()


def test_export_writes_one_client_or_all_and_prints_where(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    run = finished[0] / "local" / "seed-3"
    one = command("export", run, "--client", "007", "--out", tmp_path / "one")
    assert (one.code, one.out) == (0, f"{tmp_path / 'one' / '007'}\n")
    every = command("export", run, "--out", tmp_path / "all", "--json")
    assert sorted(Path(path).name for path in json.loads(every.out)["adapters"]) == sorted(CLIENTS)
    assert all((tmp_path / "all" / client / "adapter_model.safetensors").is_file() for client in CLIENTS)


def test_export_refuses_a_client_that_is_not_there_with_those_that_are(
    finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    run = finished[0] / "local" / "seed-3"
    for client in ("nobody", "../adapters/ada", str(run / "adapters" / "ada")):
        assert_refused(command("export", run, "--client", client, "--out", tmp_path), "there are: 007, ada")
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_study_ends_with_0(finished: tuple[Path, Ended]) -> None:
    ended = command("resume", finished[0])
    assert ended.code == 0
    assert "round 4/4" not in ended.err


@pytest.mark.slow
def test_resume_takes_more_rounds_and_nothing_else(config: Path, tmp_path: Path) -> None:
    assert command("run", config, "-q", "federation.rounds=2").code == 0
    study = tmp_path / "study"
    assert_refused(command("resume", study, "training.learning_rate=1"), "only federation.rounds may change")
    assert_refused(command("resume", study, "federation.rounds=1"), "only federation.rounds may change, from 2 up")
    ended = command("resume", study, "federation.rounds=3")
    assert ended.code == 0
    assert "round 3/3" in ended.err
    assert "round 2/" not in ended.err


@pytest.mark.parametrize("make", [lambda run: run, lambda run: run.parent.parent])
def test_a_study_is_resumed_from_within_its_own_folders(
    make: Callable[[Path], Path], finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    ended = command("resume", ".", folder=make(finished[0] / "local" / "seed-3"))
    assert ended.code == 0, ended.err


def test_a_config_that_repeats_a_key_or_is_no_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    for text, words in (("a: 1\na: 2\n", "line 1: key 'a' is given twice"), ("a: [1\nb", "not valid YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        assert_refused(command("run", tmp_path / "bad.yaml"), words, "bad.yaml")


def test_a_mixture_of_faults_is_told_in_one_go(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    raw: dict[str, Any] = small_study.settings(*inputs, tmp_path / "study", methods=[{"name": "mira", "lamda": 1}])
    raw["lora"]["r"] = 0
    raw["evalution"] = raw.pop("evaluation")
    ended = command("run", small_study.save_config(tmp_path / "config.yaml", raw))
    assert_refused(ended, "3 faults", "lora.r", "did you mean 'evaluation'?", "did you mean 'lambda'?")
