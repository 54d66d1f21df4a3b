"""The config: YAML's traps, overrides, and every fault named at once, with the nearest right word."""

import math
import string
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import fedmira
from fedmira import bundled
from fedmira.config.faults import check_config, describe_fault
from fedmira.config.sections import Config
from fedmira.config.yaml_text import dump_config, parse_yaml, read_config
from fedmira.errors import ConfigError
from fedmira.methods import entry_faults
from fedmira.methods.wrappers import Clipped

WHOLE = """
seeds: [0]
output_dir: runs/check
model: {base_model: models/tiny, dtype: float32, device: cpu}
lora: {r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}
data:
  path: data/tasks.jsonl.gz
  format: auto
  columns: {}
  template: alpaca
  max_length: 512
  truncation: prompt
  split: {validation: 0.1, test: 0.1}
  clients: {by: task, first: 8}
federation: {rounds: 2, participation: 0.5, cohort: auto}
training: {local_steps: 2, batch_size: 4, optimizer: adamw, learning_rate: 3e-4, weight_decay: 0.01, max_grad_norm: 1.0,
  keep_optimizer: false}
methods:
  - {name: local}
  - {name: fedavg, weights: examples}
  - {name: mira, eta: 1.0, lambda: 0.1, neighbours: sampled, normalise: row, graph: {kind: groups, column: category}}
evaluation: {every: 1, metrics: [loss, rouge_l], max_new_tokens: 16}
"""


def raw() -> dict[str, Any]:
    return deepcopy(parse_yaml(WHOLE, "whole"))


def check(content: dict[str, Any]) -> Config:
    return check_config(content, "config", entry_faults)


def faults_of(content: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(content)
    return caught.value.faults


def written(tmp_path: Path, text: str = WHOLE) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- YAML


def test_the_contracts_example_is_accepted_as_it_stands() -> None:
    assert check(raw()).training.learning_rate == 0.0003


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 0.0003), ("1e5", 100000.0), ("-2E+3", -2000.0), ("0.5", 0.5), (".5", 0.5), ("1.", 1.0), ("12", 12)],
)
def test_what_looks_like_a_number_is_one(text: str, value: float) -> None:
    found = parse_yaml(f"a: {text}", "test")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["007", "no", "yes", "on", "Off", "y", "0x10", "0o7", "1_000", "12:30", "2026-01-01"])
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text: str) -> None:
    assert parse_yaml(f"a: {text}", "test") == {"a": text}


@pytest.mark.parametrize("key", ["no", "007", "<<"])
def test_keys_stay_text_too(key: str) -> None:
    assert parse_yaml(f"{key}: x", "test") == {key: "x"}


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match="line 2: key 'a' is given twice"):
        parse_yaml("\na: 1\na: 2\n", "test")


def test_a_key_given_twice_deep_inside_is_refused() -> None:
    with pytest.raises(ConfigError, match="key 'r' is given twice"):
        parse_yaml("lora: {r: 8, lora_alpha: 16, r: 4}", "test")


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: !!python/object:os.system x",
        "a: !!int x",
        "a: \x00",
        "{[1]: 2}",
        "---\na: 1\n---\nb: 1",
        "[" * 5000,
    ],
)
def test_bad_yaml_is_a_fault_of_the_file_and_not_a_crash(text: str) -> None:
    with pytest.raises(ConfigError, match="file\\.yaml"):
        parse_yaml(text, "file.yaml")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=string.ascii_letters + string.digits + " :-[]{}&*!|>'\"%@`,?#\n\t.~é\x85", max_size=60))
def test_no_text_at_all_gives_anything_but_a_value_or_a_config_error(text: str) -> None:
    try:
        value = parse_yaml(text, "test")
        check_config(value if isinstance(value, dict) else {}, "test", entry_faults)
    except ConfigError:
        pass


@pytest.mark.parametrize("content", [b"", b"- a\n", b"just text"])
def test_a_file_that_is_no_mapping_is_refused_with_the_keys_it_may_have(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="a config is a mapping with the keys seeds, output_dir"):
        read_config(tmp_path / "config.yaml")


def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="byte 3 is not UTF-8"):
        read_config(tmp_path / "config.yaml")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_config(tmp_path / "config.yaml") == {"a": 1}


def test_a_missing_file_is_refused_with_its_name_and_the_current_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: 1 fault\n.*no such config file \(current folder"):
        read_config(tmp_path / "none.yaml")


# ---------------------------------------------------------------- overrides


def override(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    return read_config(written(tmp_path), overrides)


def test_an_override_replaces_a_value_below_a_section(tmp_path: Path) -> None:
    assert override(tmp_path, "training.learning_rate=1e-3")["training"]["learning_rate"] == 0.001


def test_an_override_reaches_into_a_list_by_index(tmp_path: Path) -> None:
    assert override(tmp_path, "methods.2.lambda=0.3")["methods"][2]["lambda"] == 0.3


def test_an_override_makes_the_sections_that_are_missing(tmp_path: Path) -> None:
    path = written(tmp_path, "a: {b: null}")
    assert read_config(path, ["a.b.c=1", "d.e.f=x"]) == {"a": {"b": {"c": 1}}, "d": {"e": {"f": "x"}}}


def test_an_override_whose_words_are_equal_is_not_cut_short(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, "x: 1"), ["a.a=1"]) == {"x": 1, "a": {"a": 1}}


def test_an_overrides_value_is_yaml(tmp_path: Path) -> None:
    assert override(tmp_path, "seeds=[1, 2]", "data.clients.by=007", "lora.r=")["seeds"] == [1, 2]


def test_an_overrides_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert override(tmp_path, "output_dir=a=b")["output_dir"] == "a=b"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seeds", "written a.b=c"),
        ("=1", "written a.b=c"),
        ("methods.3.name=x", "not an index of a list of 3"),
        ("methods.-1.name=x", "not an index of a list of 3"),
        ("methods.²=x", "not an index of a list of 3"),
        ("methods.mirra.lambda=1", "not an index of a list of 3"),
        ("output_dir.x=1", "inside a plain value"),
        ("seeds=[1", "not valid YAML"),
    ],
)
def test_an_override_that_does_not_lead_to_a_key_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        override(tmp_path, text)
    assert f"'{text}'" in str(caught.value)


def test_all_bad_overrides_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        override(tmp_path, "seeds", "methods.9=1", "seeds=[0")
    assert len(caught.value.faults) == 3


# ---------------------------------------------------------------- unknown keys


def place_in(content: dict[str, Any], path: str) -> dict[str, Any]:
    found: Any = content
    for word in path.split(".") if path else []:
        found = found[int(word)] if word.isdigit() else found[word]
    return found


def test_an_unknown_key_is_refused_with_the_keys_that_are_allowed_there() -> None:
    content = raw()
    content["lora"]["rank"] = 4
    (fault,) = faults_of(content)
    allowed = "alpha_pattern, exclude_modules, init_lora_weights, layers_pattern, layers_to_transform, lora_alpha, "
    assert fault.endswith(
        f"allowed here: {allowed}lora_dropout, r, rank_pattern, ranks, start, target_modules, use_rslora"
    )


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    content = raw()
    content["methods"][2] = {"name": "miro"}
    (fault,) = faults_of(content)
    assert fault.startswith("methods.2.name: unknown method 'miro' (did you mean 'mira'?)")


@pytest.mark.parametrize("name", ["../mira", ".mira", "a/b", "", "mira ", "a..b", "/abs"])
def test_a_method_name_that_could_be_a_path_is_refused(name: str) -> None:
    content = raw()
    content["methods"] = [{"name": name}]
    (fault,) = faults_of(content)
    assert fault.startswith(f"methods.0.name: found {name!r}")


@pytest.mark.parametrize("label", ["../up", "a/b", "", "-x", "a b", "x" * 65, "é"])
def test_a_label_that_is_no_folder_name_is_refused(label: str) -> None:
    content = raw()
    content["methods"][0]["label"] = label
    assert faults_of(content)[0].startswith("methods.0.label: found")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("", "seeds", []),
        ("", "seeds", 0),
        ("", "seeds", [-1]),
        ("", "seeds", [True]),
        ("", "output_dir", 7),
        ("", "methods", []),
        ("", "methods", {"name": "local"}),
        ("model", "dtype", "float16"),
        ("model", "device", "gpu"),
        ("lora", "r", 0),
        ("lora", "r", 8.5),
        ("lora", "r", True),
        ("lora", "lora_alpha", "many"),
        ("lora", "target_modules", 3),
        ("data", "columns", ["a"]),
        ("data", "format", "csv"),
        ("data", "max_length", 3),
        ("data", "truncation", "end"),
        ("data.split", "test", 1.0),
        ("data.clients", "first", 0),
        ("federation", "rounds", 0),
        ("federation", "rounds", True),
        ("federation", "participation", 1.5),
        ("federation", "cohort", "all"),
        ("training", "learning_rate", 0),
        ("training", "learning_rate", math.inf),
        ("training", "learning_rate", "inf"),
        ("training", "learning_rate", math.nan),
        ("training", "max_grad_norm", -1),
        ("training", "keep_optimizer", "maybe"),
        ("training", "betas", [0.9]),
        ("evaluation", "metrics", ["bleu"]),
        ("methods.2", "lambda", -0.1),
        ("methods.2", "lambda", True),
        ("methods.2", "normalise", "rows"),
        ("methods.1", "weights", 3),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_where_it_stands(path: str, key: str, value: Any) -> None:
    content = raw()
    place_in(content, path)[key] = value
    where = f"{path}.{key}" if path else key
    said = faults_of(content)
    assert all(fault.startswith(where) for fault in said), said


@pytest.mark.parametrize("path", ["seeds", "output_dir", "model", "data", "federation", "training", "methods"])
def test_a_missing_section_is_named(path: str) -> None:
    content = raw()
    del content[path]
    assert faults_of(content) == [f"{path}: missing; it has no default"]


@pytest.mark.parametrize("path", ["model.base_model", "data.path", "federation.rounds"])
def test_a_missing_value_without_default_is_named(path: str) -> None:
    content = raw()
    section, key = path.split(".")
    del content[section][key]
    assert faults_of(content) == [f"{path}: missing; it has no default"]


@pytest.mark.parametrize("given_keys", [{}, {"local_steps": 2, "local_epochs": 1}])
def test_local_steps_and_local_epochs_exclude_each_other_and_one_is_needed(given_keys: dict[str, int]) -> None:
    content = raw()
    del content["training"]["local_steps"]
    content["training"] |= given_keys
    (fault,) = faults_of(content)
    assert "exactly one of local_steps and local_epochs" in fault


def test_local_epochs_may_stand_for_local_steps() -> None:
    content = raw()
    del content["training"]["local_steps"]
    content["training"]["local_epochs"] = 3
    assert check(content).training.local_epochs == 3


def test_splits_that_leave_nothing_to_train_on_are_refused() -> None:
    content = raw()
    content["data"]["split"] = {"validation": 0.5, "test": 0.5}
    (fault,) = faults_of(content)
    assert "validation + test = 1" in fault


def test_a_seed_given_twice_is_refused() -> None:
    content = raw()
    content["seeds"] = [1, 1]
    (fault,) = faults_of(content)
    assert "seeds [1, 1] repeat" in fault


def test_a_method_given_twice_needs_a_label() -> None:
    content = raw()
    content["methods"] = [{"name": "local"}, {"name": "local"}]
    (fault,) = faults_of(content)
    assert "give each a 'label:'" in fault
    content["methods"][1]["label"] = "again"
    assert [entry.folder for entry in check(content).methods] == ["local", "again"]


def test_all_faults_of_a_file_are_reported_together_those_of_methods_included() -> None:
    content = raw()
    content["sedes"] = content.pop("seeds")
    content["lora"]["r"] = 0
    content["training"]["learning_rat"] = 1
    content["methods"][1]["wieghts"] = "examples"
    content["methods"][2] |= {"lamda": 0.1, "graph": {"kind": "groups"}}
    content["methods"].append({"name": "miro"})
    said = faults_of(content)
    for start in (
        "seeds: missing",
        "sedes: unknown key (did you mean 'seeds'?)",
        "lora.r: found 0",
        "training.learning_rat: unknown key (did you mean 'learning_rate'?)",
        "methods.1.wieghts: unknown key (did you mean 'weights'?)",
        "methods.2.lamda: unknown key (did you mean 'lambda'?)",
        "methods.2.graph: ",
        "methods.3.name: unknown method 'miro'",
    ):
        assert any(fault.startswith(start) for fault in said), (start, said)
    assert len(said) == 8


def test_a_group_graph_without_its_column_is_refused_with_what_is_missing() -> None:
    content = raw()
    content["methods"][2]["graph"] = {"kind": "groups"}
    (fault,) = faults_of(content)
    assert fault.startswith("methods.2.graph: ")
    assert "needs 'column'" in fault


def test_yamls_lambda_is_pythons_lam() -> None:
    entry = check(raw()).methods[2]
    assert fedmira.load_method("mira").Config.model_validate(entry.settings).lam == 0.1  # type: ignore[attr-defined]


def test_hyphens_in_a_methods_name_are_read_as_underscores() -> None:
    content = raw()
    content["methods"] = [{"name": "fed-it"}]
    assert "unknown method 'fed-it'" in faults_of(content)[0]
    content["methods"] = [{"name": "fedit"}]
    assert check(content).methods[0].id == "fedit"


def test_loss_is_measured_even_where_it_is_not_asked_for() -> None:
    content = raw()
    content["evaluation"]["metrics"] = ["rouge_l"]
    assert check(content).evaluation.metrics == ["loss", "rouge_l"]


# ---------------------------------------------------------------- round trip and presets


def test_a_config_written_and_read_back_is_the_same() -> None:
    whole = check(raw())
    assert check(parse_yaml(dump_config(whole), "dump")) == whole


@settings(max_examples=40, deadline=None)
@given(
    by=st.one_of(st.text(min_size=1, max_size=12), st.from_regex(r"\A[-+]?[0-9._eExo:]{1,8}\Z")),
    rate=st.floats(min_value=1e-300, max_value=1e300),
)
@example(by="\x85", rate=1.0)
def test_no_text_and_no_number_changes_on_its_way_through_a_file(by: str, rate: float) -> None:
    content = raw()
    content["data"]["clients"]["by"] = by
    content["training"]["learning_rate"] = rate
    content["methods"][0]["label"] = "1e5"
    once = check(content)
    assert check(parse_yaml(dump_config(once), "dump")) == once


@pytest.mark.parametrize("text", ["no", "007", "1e5", "null", "true", "2026-01-01"])
def test_a_dumped_text_is_text_to_other_readers_of_yaml_too(text: str) -> None:
    import yaml

    content = raw()
    content["output_dir"] = text
    assert yaml.safe_load(dump_config(check(content)))["output_dir"] == text


@pytest.mark.parametrize("name", bundled.presets())
def test_a_preset_is_loaded_by_its_name_and_is_sound(name: str) -> None:
    assert fedmira.load_config(name, ["seeds=[5]"]).seeds == [5]


def test_a_file_goes_before_a_preset_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text(WHOLE, encoding="utf-8")
    assert fedmira.load_config("demo").output_dir == "runs/check"


@pytest.mark.parametrize("name", ["../presets/demo", "presets/demo", "none", ""])
def test_a_preset_is_found_by_its_plain_name_only(name: str) -> None:
    assert bundled.preset(name) is None


def test_a_mark_of_utf_8_before_a_config_is_no_part_of_its_first_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfseeds: [1]\n")
    assert read_config(path) == {"seeds": [1]}


def test_an_unknown_key_of_a_wrapper_is_answered_with_the_keys_of_a_wrapper() -> None:
    with pytest.raises(ValidationError) as caught:
        Clipped.model_validate({"norm": 1, "nrom": 2})
    line = describe_fault(caught.value.errors()[0], Clipped, {}, prefix="methods.0.with.0.")
    assert line == "methods.0.with.0.nrom: unknown key (did you mean 'norm'?); allowed here: name, norm"


def test_an_unknown_key_of_a_partitioner_is_answered_with_the_keys_of_that_one() -> None:
    raw = {"data": {"clients": {"partitioner": {"name": "dirichlet", "num_partitions": 2, "alhpa": 1}}}}
    with pytest.raises(ConfigError, match=r"partitioner.*alhpa: unknown key \(did you mean 'alpha'"):
        check_config(raw)
