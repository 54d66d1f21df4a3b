"""Loading a method: by id from the tree, by dotted path from where Python looks, then from the current folder."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import small_study

from fedmira.config.faults import check_config
from fedmira.config.sections import MethodEntry
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import entry_faults, load, recipe_of

GOOD = '''"""A method that is local training under another name."""

from fedmira.methods.base import Cohort, Method, Settings
from fedmira.methods.local import Config as Local
from fedmira.methods.local import build as build_local


class Config(Settings):
    """One setting."""

    share: float = 0.5  # of something


def build(config: Config, cohort: Cohort) -> Method:
    return build_local(Local(), cohort)
'''
NUMBERS = itertools.count()  # every test its own package: what was imported once stays imported

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write files of a package into the current folder, NAME=TEXT; return the package's name."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def wrote(**files: str) -> str:
        package = f"my_methods_{next(NUMBERS)}"
        (tmp_path / package).mkdir()
        for name, text in files.items():
            (tmp_path / package / f"{name}.py").write_text(text, encoding="utf-8")
        return package

    yield wrote
    for name in set(sys.modules) - before:
        if name.startswith("my_methods_"):
            del sys.modules[name]


def fault(name: str) -> str:
    with pytest.raises(MethodError) as caught:
        load(name)
    return str(caught.value)


def test_a_dotted_path_is_found_below_the_current_folder(write: Write) -> None:
    package = write(halfway=GOOD)
    assert load(f"{package}.halfway").Config(share=0.25).share == 0.25


def test_a_file_may_import_its_neighbours(write: Write) -> None:
    package = write(other=GOOD)
    (Path(package) / "halfway.py").write_text(f"from {package}.other import Config, build\n", encoding="utf-8")
    assert load(f"{package}.halfway").Config is load(f"{package}.other").Config


def test_looking_in_the_current_folder_leaves_the_search_path_as_it_was(write: Write) -> None:
    package = write(halfway=GOOD, broken="1 / 0\n")
    before = list(sys.path)
    load(f"{package}.halfway")
    fault(f"{package}.broken")
    fault("no_such_package_at_all.halfway")
    assert sys.path == before


def test_a_file_that_takes_the_current_folder_off_the_search_path_itself_does_no_harm(write: Write) -> None:
    package = write(halfway=f"import sys\nsys.path.remove({str(Path.cwd())!r})\n{GOOD}")
    before = list(sys.path)
    load(f"{package}.halfway")
    assert sys.path == before


def test_the_current_folder_never_hides_an_installed_package(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("fedmira").mkdir()
    Path("fedmira/methods.py").write_text("raise RuntimeError('the wrong one')\n", encoding="utf-8")
    Path("colorsys.py").write_text("raise RuntimeError('the wrong one')\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)  # of the standard library, and seldom imported
    package = write(halfway=f"import colorsys\n{GOOD}")
    assert load("fedmira.methods.mira") is load("mira")
    assert load(f"{package}.halfway").Config(share=1).share == 1


def test_a_file_that_is_not_there_is_told_with_where_it_would_be(write: Write) -> None:
    package = write(halfway=GOOD)
    assert f"it is {package}/halfwy.py below the current folder ({Path.cwd()})" in fault(f"{package}.halfwy")
    assert "it is nowhere/halfway.py below" in fault("nowhere.halfway")


def test_a_slip_of_syntax_is_told_with_its_file_and_line(write: Write) -> None:
    package = write(halfway="x = 1\nif x\n    y = 2\n")
    assert f"cannot be imported: {package}/halfway.py:2: SyntaxError: expected ':'" in fault(f"{package}.halfway")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("from fedmira.methods.base import Methd", "ImportError: cannot import name 'Methd'"),
        ("import json.nothing", "ModuleNotFoundError: No module named 'json.nothing'"),
        ("Methd()", "NameError: name 'Methd' is not defined"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("raise KeyError", "KeyError"),
        ("import json; json.loads('{')", "JSONDecodeError: Expecting property name"),  # not the line in json
    ],
)
def test_an_error_in_the_file_is_told_with_its_file_and_line(line: str, words: str, write: Write) -> None:
    package = write(halfway=f"x = 1\n\n{line}\n")
    assert f"'{package}.halfway' cannot be imported: {package}/halfway.py:3: {words}" in fault(f"{package}.halfway")


def test_an_error_in_a_neighbour_is_told_with_the_neighbours_file_and_line(write: Write) -> None:
    package = write(other="\n1 / 0\n")
    for name, line in (("halfway", "other"), ("whole", "third")):
        (Path(package) / f"{name}.py").write_text(f"import {package}.{line}\n", encoding="utf-8")
    (Path(package) / "third.py").write_text("x = (\n", encoding="utf-8")
    assert f"{package}/other.py:2: ZeroDivisionError: division by zero" in fault(f"{package}.halfway")
    assert f"{package}/third.py:1: SyntaxError: '(' was never closed" in fault(f"{package}.whole")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "from fedmira.methods.base import Settings as Config\n",
        "class Config: pass\ndef build(config, cohort): pass\n",
        "from fedmira import Config\ndef build(config, cohort): pass\n",
        "Config = 1\ndef build(config, cohort): pass\n",
    ],
)
def test_a_file_without_config_and_build_is_refused(text: str, write: Write) -> None:
    package = write(halfway=text)
    words = f"({package}/halfway.py) needs a class Config(Settings) and a build(config, cohort)"
    assert words in fault(f"{package}.halfway")


def test_a_folder_is_no_method(write: Write) -> None:
    package = write()
    (Path(package) / "inner").mkdir()
    assert "(a folder) needs a class Config(Settings)" in fault(f"{package}.inner")


def test_a_file_that_was_mended_is_loaded_at_the_next_try(write: Write) -> None:
    package = write(halfway="x = (\n")
    fault(f"{package}.halfway")
    (Path(package) / "halfway.py").write_text(GOOD, encoding="utf-8")
    assert load(f"{package}.halfway").Config().share == 0.5


def test_a_config_with_such_a_method_tells_the_place_of_every_fault(write: Write) -> None:
    package = write(halfway=GOOD, broken="x = (\n")
    raw = small_study.settings(
        Path("base"),
        Path("data.jsonl"),
        Path("study"),
        methods=[{"name": f"{package}.broken"}, {"name": f"{package}.halfway", "shar": 1}],
    )
    with pytest.raises(ConfigError) as caught:
        check_config(raw, "config", entry_faults)
    first, second = caught.value.faults
    assert first.startswith(f"methods.0.name: method '{package}.broken' cannot be imported: {package}/broken.py:1:")
    assert second.startswith("methods.1.shar: unknown key (did you mean 'share'?)")


def test_an_unknown_name_is_refused_with_the_nearest_method() -> None:
    assert "unknown method 'mirra' (did you mean 'mira'?); known: " in fault("mirra")


def test_hyphens_and_the_other_name_of_fedavg_are_understood() -> None:
    assert load("fedit") is load("fedavg")


def test_the_command_finds_a_method_in_the_folder_it_is_called_in(write: Write) -> None:
    package = write(halfway="x = (\n")
    raw = small_study.settings(
        Path("base"), Path("data.jsonl"), Path("study"), methods=[{"name": f"{package}.halfway"}]
    )
    small_study.save_config(Path("study.yaml"), raw)
    ended = small_study.command("run", "study.yaml")
    assert ended.code == 2
    assert f"{package}/halfway.py:1: SyntaxError" in ended.err
    assert not small_study.has_traceback(ended.err)


def test_faults_of_wrappers_are_listed_with_their_place_and_what_is_allowed_there() -> None:
    wrappers = [{"name": "clipp", "norm": 1}, {"name": "proximal", "mu": -1}, {"name": "only", "train": "B"}]
    entry = MethodEntry.model_validate({"name": "fedavg", "with": wrappers})
    assert entry_faults(2, entry) == [
        "methods.2.with.0.name: unknown wrapper 'clipp' (did you mean 'clipped'?); known: proximal, only, "
        "server_optimizer, tuned_after, accepting, lost_reply, clipped, noised",
        "methods.2.with.1.mu: found -1: input should be greater than or equal to 0",
        "methods.2.with.2.train: unknown key (did you mean 'trained'?); allowed here: name, trained, travels",
    ]


def test_wrappers_are_applied_in_order_and_an_alias_is_read() -> None:
    wrappers = [{"name": "only", "trained": "B"}, {"name": "clip", "norm": 1}]
    recipe = recipe_of(MethodEntry.model_validate({"name": "fedavg", "with": wrappers}))
    assert [name for name, _ in recipe.wrappers] == ["only", "clipped"]
