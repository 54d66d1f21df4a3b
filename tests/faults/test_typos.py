"""Slips of a typist in a config: every key with every single edit, and every key with values of every wrong kind."""

import itertools
import math
import random
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from tests.small_study import command, has_traceback

import fedmira
from fedmira.config.faults import check_config
from fedmira.config.partitioners import PARTITIONERS
from fedmira.config.sections import Config, MethodEntry
from fedmira.errors import ConfigError
from fedmira.methods import entry_faults

LETTERS = string.ascii_lowercase + "_"
VALID: dict[str, Any] = {
    "seeds": [0],
    "output_dir": "runs/x",
    "model": {"base_model": "models/tiny"},
    "lora": {"r": 8},
    "data": {"path": "data.jsonl", "split": {"test": 0.1}, "clients": {"first": 8}},
    "federation": {"rounds": 2},
    "training": {"local_steps": 2},
    "methods": [{"name": "local"}],
    "evaluation": {"every": 1},
    "report": {"examples": False},
}
PARTS: dict[str, Any] = {  # what a partitioner needs and has no default for
    "num_partitions": 2,
    "partition_by": "label",
    "partition_sizes": [3, 4],
    "alpha": 0.5,
    "num_classes_per_partition": 1,
    "shard_size": 5,
}


@dataclass(frozen=True)
class Section:
    """A mapping of the config: a full valid config around it, where it stands in there, and its keys."""

    raw: dict[str, Any]
    place: tuple[str | int, ...]
    models: tuple[type[BaseModel], ...]

    @property
    def fields(self) -> dict[str, str]:
        """YAML key -> Python name."""
        return {field.alias or name: name for model in self.models for name, field in model.model_fields.items()}

    @property
    def known(self) -> set[str]:
        """Every word that is no slip here; settings may be given by their Python names too."""
        return {*self.fields, *self.fields.values()}

    def where(self, key: str) -> str:
        return ".".join(str(word) for word in (*self.place, key))

    def having(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the whole config with these values in this section."""
        raw = deepcopy(self.raw)
        find(raw, self.place).update(values)
        return raw


def find(value: Any, place: Sequence[str | int]) -> Any:
    for word in place:
        value = value[word] if isinstance(value, dict | list) else getattr(value, str(word))
    return value


def nested(model: type[BaseModel], place: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, type[BaseModel]]]:
    """Yield a model and every model among its fields, with their places."""
    yield place, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from nested(field.annotation, (*place, field.alias or name))


def sections() -> list[Section]:
    """Every section of the config, every partitioner's and every method's own, found by themselves."""
    found = [Section(VALID, place, (model,)) for place, model in nested(Config)]
    for name, model in PARTITIONERS.items():
        needed = {key: value for key, value in PARTS.items() if key in model.model_fields}
        clients = {"partitioner": {"name": name, **needed}}
        raw = {**VALID, "data": {**VALID["data"], "clients": clients}}
        found.append(Section(raw, ("data", "clients", "partitioner"), (model,)))
    for name in fedmira.method_names():
        (_, own), *inner = nested(fedmira.load_method(name).Config)
        entry = {"name": name, **{str(place[0]): {} for place, _ in inner}}
        raw = {**VALID, "methods": [{"name": "local"}, {"label": "this", **entry}]}
        found.append(Section(raw, ("methods", 1), (MethodEntry, own)))
        found += [Section(raw, ("methods", 1, *place), (model,)) for place, model in inner]
    return found


SECTIONS = sections()


def attempt(raw: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """Take a config to the door: what it became, or every fault that was found."""
    try:
        return check_config(raw, "config", entry_faults), []
    except ConfigError as error:
        return None, error.faults


def faults_of(raw: dict[str, Any]) -> list[str]:
    return attempt(raw)[1]


def edits(word: str) -> set[str]:
    """Every word that is one edit away: a letter left out, put in, exchanged for another, or swapped with the next."""
    made = set()
    for place in range(len(word) + 1):
        before, after = word[:place], word[place:]
        made |= {before + letter + after for letter in LETTERS}
        made |= {before + letter + after[1:] for letter in LETTERS if after} | {before + after[1:]}
        made |= {before + after[1] + after[0] + after[2:]} if len(after) > 1 else set()
    return made - {word}


def meant(section: Section) -> dict[str, set[str]]:
    """Every slip that is possible in a section -> the keys that it may stand for."""
    slips: dict[str, set[str]] = {}
    for key in section.fields:
        for wrong in edits(key) - section.known:
            slips.setdefault(wrong, set()).add(key)
    return slips


# ---------------------------------------------------------------- keys


def test_the_valid_config_around_every_section_is_accepted() -> None:
    assert [section.place for section in SECTIONS if faults_of(section.raw)] == []


def test_the_sections_are_all_that_a_config_can_have() -> None:
    whole = yaml.safe_load((Path(fedmira.__file__).parent / "bundled" / "init.yaml").read_text().replace("@", ""))
    places = {section.place for section in SECTIONS}
    assert {(key,) for key, value in whole.items() if isinstance(value, dict)} <= places
    assert {("data", "split"), ("data", "clients"), ("methods", 1, "graph")} <= places
    assert len([place for place in places if place == ("data", "clients", "partitioner")]) == 1
    assert sum(section.place == ("methods", 1) for section in SECTIONS) == len(fedmira.method_names()) >= 3
    assert sum(section.place == ("data", "clients", "partitioner") for section in SECTIONS) == len(PARTITIONERS) == 9


def test_one_edit_of_a_word_is_every_one() -> None:
    assert {"b", "", "ab", "ba", "_b", "b_"} <= edits("b") | {"b"}
    assert {"ba", "a", "b", "aab", "acb", "abc", "cb", "ac"} <= edits("ab")
    assert len(edits("ab")) == 2 + 1 + 2 * 26 + (3 * 27 - 2)  # leave out, swap, exchange, put in (two of which double)


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)], ids=["one of 23", "all"])
def test_every_key_with_every_single_edit_is_refused_and_the_right_one_suggested(step: int) -> None:
    total, wrongly = 0, Counter[str]()
    for section in SECTIONS:
        slips = dict(sorted(meant(section).items())[::step])
        said = {}
        for fault in faults_of(section.having(dict.fromkeys(slips, 1))):
            where, unknown, rest = fault.partition(": unknown key")
            assert unknown, fault
            said[where] = rest
        assert said.keys() == {section.where(wrong) for wrong in slips}, section.place
        for wrong, keys in slips.items():
            total += 1
            if not any(f"(did you mean '{key}'?)" in said[section.where(wrong)] for key in keys):
                wrongly[section.where(min(keys))] += 1
    right = 1 - wrongly.total() / total
    assert total > 50_000 / step
    assert right >= 0.95, f"suggestion right for {right:.2%} of {total} slips; wrong: {wrongly.most_common(5)}"


def test_a_slip_in_the_place_of_its_key_is_refused_by_a_message_that_names_both(tmp_path: Path) -> None:
    dice = random.Random(5)
    cases = [(section, wrong, keys) for section in SECTIONS for wrong, keys in sorted(meant(section).items()) if wrong]
    right = 0
    for number, (section, wrong, keys) in enumerate(dice.sample(cases, 300)):
        raw = deepcopy(section.raw)
        own = find(raw, section.place)
        own[wrong] = own.pop(min(keys), 1)
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            fedmira.load_config(path)
        assert f"'{wrong}'" in str(caught.value) or f"{section.where(wrong)}: unknown key" in str(caught.value)
        right += any(f"did you mean '{key}'?" in str(caught.value) for key in keys)
    assert right >= 0.95 * 300, f"suggestion right for {right} of 300 slips"


@pytest.mark.parametrize("wrong", sorted(edits("name") - {"names"})[::9])
def test_a_misspelt_name_of_a_method_or_a_partitioner_is_suggested_too(wrong: str) -> None:
    methods = {**VALID, "methods": [{wrong: "mira", "lambda": 0.5}]}
    clients = {"partitioner": {wrong: "iid", "num_partitions": 2}}
    partitioner = {**VALID, "data": {**VALID["data"], "clients": clients}}
    for raw, where in ((methods, "methods.0"), (partitioner, "data.clients.partitioner")):
        (fault,) = faults_of(raw)
        assert fault.startswith(f"{where}: found no name: '{wrong}' is an unknown key (did you mean 'name'?)")


@pytest.mark.parametrize("key", [3, 1.5, True, None, ("a", "b")])
def test_a_key_that_is_no_text_is_refused(key: object) -> None:
    for section in SECTIONS:
        assert faults_of(section.having({key: 1})), section.place


# ---------------------------------------------------------------- values

PLAIN = [None, True, False, -1, 0, 1, 3, 3.0, 3.7, -0.0, 1e300, 1e-300, math.nan, math.inf, -math.inf]
HUGE = [2**31, 2**63, 10**20, -(10**20), 10**400, -(10**400), 10**5000]
TEXTS = [
    "",
    "text",
    "3",
    "3.5",
    "-1",
    "true",
    "no",
    "null",
    "1e3",
    "inf",
    "nan",
    "é",
    "a\nb",
    "\0",
    "\ud800",
    "x" * 9999,
]
LISTS: list[Any] = [
    [],
    [1],
    ["3"],
    ["x"],
    ["\ud800"],
    [""],
    [True],
    [None],
    [3.7],
    [math.nan],
    [[1]],
    [{}],
    (1,),
    [0] * 9,
]
OTHERS: list[Any] = [{}, {"a": 1}, {"name": "iid"}, {"a": {"b": {}}}, b"3", {1}, range(3), 1j, object()]
VALUES = [*PLAIN, *HUGE, *TEXTS, *LISTS, *OTHERS]


def same(read: Any, written: Any) -> bool:
    """Is what was read what was written? A whole number may be read as the same real one, a list as a tuple."""
    if isinstance(read, bool) or isinstance(written, bool):
        return read is written
    if isinstance(written, int | float):
        return isinstance(read, int | float) and read == written
    if isinstance(written, list | tuple):
        return isinstance(read, list | tuple) and len(read) == len(written) and all(map(same, read, written))
    return (isinstance(read, BaseModel) and isinstance(written, dict)) or (
        type(read) is type(written) and read == written
    )


def read_back(config: Config, section: Section, name: str) -> Any:
    if section.place[:1] != ("methods",):
        return getattr(find(config, section.place), name)
    entry = config.methods[1]
    own = fedmira.load_method(entry.name).Config.model_validate(entry.settings)
    owner = find(own, section.place[2:])
    return getattr(owner if name in type(owner).model_fields else entry, name)


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)], ids=["one of ten", "all"])
def test_no_value_of_any_kind_crashes_the_door_or_is_read_as_something_else(step: int) -> None:
    """In turn: of ten keys one after another, the first gets values 0, 10, 20, ..., the second 1, 11, 21, ..."""
    accepted = tried = 0
    turn = itertools.cycle(range(step))
    for section in SECTIONS:
        for key, name in section.fields.items():
            for value in VALUES[next(turn) :: step]:
                tried += 1
                config, faults = attempt(section.having({key: value}))
                assert max(map(len, faults), default=0) < 500, section.where(key)
                if config is None:
                    continue
                read = read_back(config, section, name)
                if key == "metrics":  # the loss is measured whether it is asked for or not
                    read = [metric for metric in read if metric != "loss"]
                if key == "name" and section.place == ("data", "clients", "partitioner"):
                    continue  # spelt as in flwr-datasets, it is read as ours
                accepted += 1
                assert same(read, value), f"{section.where(key)}: {value!r:.50} is read as {read!r:.50}"
    assert tried > 6000 / step
    assert accepted > 300 / step


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ('federation.rounds="3"', "federation.rounds: found '3': should be a number"),
        ("federation.rounds=3.7", "federation.rounds: found 3.7: input should be a valid integer"),
        ("federation.rounds=true", "federation.rounds: found True: true and false are not allowed here"),
        (
            "federation.rounds=99999999999999999999",
            "federation.rounds: found 99999999999999999999: input should be less",
        ),
        ("federation.rounds=null", "federation.rounds: found None: "),
        ("training.learning_rate=1e999", "training.learning_rate: found inf: input should be a finite number"),
        ("training.learning_rate=.nan", "training.learning_rate: found '.nan': should be a number"),
        ("federation.cohort=4 at once", "federation.cohort: found '4 at once': should be a number, or auto"),
        ("training.keep_optimizer=yes", "training.keep_optimizer: found 'yes': should be true or false"),
        ("training.keep_optimizer=1", "training.keep_optimizer: found 1: should be true or false"),
        ("report.examples=!!binary aGk=", "report.examples: should be true or false"),
        ("output_dir=!!binary aGk=", "output_dir: is not text, a number, a list or a mapping"),
        ("seeds=!!set {1}", "seeds: is not text, a number, a list or a mapping"),
        ("data.path=", "data.path: found None: input should be a valid string"),
        ('data.path=""', "data.path: found '': is empty"),
        ('data.path="a\\0b"', "data.path: found 'a\\x00b': is not a path"),
        (f"output_dir={'x' * 256}", "is not a path: at most 4000 letters, 255 bytes between two /"),
        (f"model.base_model={'x' * 5000}", "is not a path"),
        (f"data.template={'é' * 128}", "is not a path"),
        ('data.clients.by="\\ud800"', "data.clients.by: found '\\ud800': contains half a character"),
        ('data.clients.partitioner={name: "\\ud800"}', "name '\\ud800' is unknown"),
        ("lora.lora_alpha=1e300", "lora.lora_alpha: found 1e+300: input should be less than or equal to 1000000"),
        ("lora.r=100000", "lora.r: found 100000: input should be less than or equal to 65536"),
        ("methods.0.label=5", "methods.0.label: found 5: input should be a valid string"),
        ("methods.0=3", "methods.0: found 3: input should be a valid dictionary"),
    ],
)
def test_a_value_that_would_have_to_be_guessed_at_is_refused_on_the_command_line(
    override: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(VALID), encoding="utf-8")
    ended = command("run", "config.yaml", override, folder=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert reason in ended.err
    assert not has_traceback(ended.err)
    assert len(ended.err) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
