"""What does not compute does not import the libraries that compute: each command in a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.reports.made_study import make_study

from fedmira.graphs.graph import group_graph

HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "statsmodels")
PROGRAM = f"""
import sys
def at_the_end():
    print("imported:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
import atexit
atexit.register(at_the_end)
from fedmira.cli.main import main
sys.argv[0] = "fedmira"
main()
"""


def start(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `fedmira ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    *err, imported = done.stderr.splitlines()
    assert imported == "imported:", f"fedmira {' '.join(arguments)}"
    return done.returncode, done.stdout, "\n".join(err)


def test_the_package_itself() -> None:
    program = f"import fedmira, sys; dir(fedmira); print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("run", "--help"),
        pytest.param(("resume", "--help"), marks=pytest.mark.slow),
        pytest.param(("chat", "--help"), marks=pytest.mark.slow),
    ],
)
def test_help(arguments: tuple[str, ...]) -> None:
    code, out, _ = start(*arguments)
    assert code == 0
    assert "Usage" in out


def test_the_list_of_the_methods() -> None:
    code, out, _ = start("methods")
    assert code == 0
    assert "mira" in out
    code, out, _ = start("methods", "--json")
    assert code == 0
    assert "mira" in json.loads(out)


def test_the_report_of_a_stored_study(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", [f"client-{place}" for place in range(8)], sampled=4)
    code, out, _ = start("report", str(study))
    assert code == 0
    assert "report.html" in out


def test_the_report_of_a_small_study_needs_neither_arrays_nor_yaml(tmp_path: Path) -> None:
    groups = ["a", "b"] * 4
    study = make_study(tmp_path / "study", [f"c{k}" for k in range(8)], graph=group_graph(groups))
    program = """
import sys
from pathlib import Path
from fedmira.reports.render import write_report
write_report(Path(sys.argv[1]))
print([name for name in ("numpy", "scipy", "yaml", "pydantic", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program, str(study)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["methods", "report"])
def test_arguments_that_are_text_or_paths_need_no_pydantic(command: str, tmp_path: Path) -> None:
    arguments = [command]
    if command == "report":
        arguments.append(str(make_study(tmp_path / "study", ["a", "b", "c", "d"], sampled=2)))
    program = """
import atexit, sys
atexit.register(lambda: print("checked by pydantic:", "pydantic.type_adapter" in sys.modules))
from fedmira.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "checked by pydantic: False"


def test_the_completion_of_a_command() -> None:
    words = {"COMP_WORDS": "fedmira me", "COMP_CWORD": "1"}
    code, out, _ = start(_FEDMIRA_COMPLETE="complete_bash", **words)
    assert code == 0
    assert out.split() == ["methods"]


def test_the_script_that_a_shell_completes_with() -> None:
    code, out, _ = start(_FEDMIRA_COMPLETE="source_bash")
    assert code == 0
    assert "_FEDMIRA_COMPLETE" in out


@pytest.mark.parametrize(
    ("override", "told"),
    [
        pytest.param("federation.round=2", "did you mean 'rounds'", marks=pytest.mark.slow),
        pytest.param("methods.2.lambda=-1", "methods.2.lambda: found -1", marks=pytest.mark.slow),
        ("methods.0.name=miro", "unknown method 'miro' (did you mean 'mira'"),
        pytest.param("federation.rounds", "federation.rounds", marks=pytest.mark.slow),
    ],
)
def test_a_refused_override(override: str, told: str) -> None:
    code, _, err = start("run", "demo", override)
    assert code == 2
    assert told in " ".join(err.split())


def test_a_refused_config(tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text("seeds: [0]\nmethod: [{name: mira, lamda: 0.1}]\n", encoding="utf-8")
    code, _, err = start("run", str(config))
    assert code == 2
    assert "did you mean 'methods'" in err


@pytest.mark.parametrize("command", ["report", "resume", "export"])
def test_a_folder_that_is_not_a_study(command: str, tmp_path: Path) -> None:
    assert start(command, str(tmp_path))[0] == 2


def test_an_output_folder_that_holds_a_study_already(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ["a", "b", "c", "d"], sampled=2)
    code, _, err = start("run", "demo", f"output_dir={study}")
    assert code == 2
    assert "already holds a study" in " ".join(err.split())
