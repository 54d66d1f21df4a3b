"""`training` and its change for one method: strict keys, one place for each fault, and a config that reads back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.config.test_config import raw

from fedmira.config.faults import check_config
from fedmira.config.sections import Config, MethodTraining, TrainingConfig
from fedmira.config.yaml_text import dump_config, parse_yaml, read_config
from fedmira.errors import ConfigError
from fedmira.methods import entry_faults

STUDY: Mapping[str, Any] = {"local_steps": 5, "learning_rate": 1e-3}


def config(*methods: Any, **training: Any) -> Config:
    return check_config({**raw(), "training": {**STUDY, **training}, "methods": list(methods)}, "test", entry_faults)


def faults(*methods: Any, **training: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config(*methods, **training)
    return caught.value.faults


def changed(keys: Mapping[str, Any], **training: Any) -> TrainingConfig:
    found = config({"name": "fedavg", "training": keys}, **training)
    return found.training_of(found.methods[0])


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("training", "fault"),
    [
        ({"warmup_steps": 2}, "training: lr_scheduler_type: constant has no warm-up"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2, "warmup_ratio": 0.1}, "one of warmup_steps and warmup_rat"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0.1}, "a share of all steps is written warmup_ratio: 0.1"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs lr_scheduler_kwargs with one of min_lr and min_lr_rate"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0}}, "needs lr_scheduler_type: cosine_with"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}},
            "min_lr = 0.1 is above learning_rate = 0.001",
        ),
        ({"lr_scheduler_type": "cosin"}, "training.lr_scheduler_type: found 'cosin': input should be 'constant'"),
        ({"lr_scheduler_kwargs": {"minlr": 0}}, "lr_scheduler_kwargs.minlr: unknown key (did you mean 'min_lr'?)"),
        ({"lr_schedule_over": "run"}, "training.lr_schedule_over: unknown key (did you mean 'lr_scheduler_over'?)"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps: found 0"),
        ({"gradient_acumulation_steps": 2}, "(did you mean 'gradient_accumulation_steps'?)"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_with_what_to_write(training: dict[str, Any], fault: str) -> None:
    (found,) = faults("local", **training)
    assert fault in found


# ---------------------------------------------------------------- one method


def test_a_method_changes_its_keys_and_has_the_studys_for_the_rest() -> None:
    found = config("local", {"name": "fedavg", "training": {"learning_rate": 0.1, "optimizer": "sgd"}}, batch_size=3)
    local, fedavg = (found.training_of(entry) for entry in found.methods)
    assert local is found.training
    assert (fedavg.learning_rate, fedavg.optimizer, fedavg.batch_size, fedavg.local_steps) == (0.1, "sgd", 3, 5)


def test_a_default_that_is_written_out_is_a_change() -> None:
    default = TrainingConfig.model_fields["batch_size"].default
    assert changed({"batch_size": default}, batch_size=3).batch_size == default


@pytest.mark.parametrize(
    ("keys", "study", "expected"),
    [
        ({"local_epochs": 2}, {}, {"local_epochs": 2, "local_steps": None}),
        ({"local_steps": 2}, {"local_steps": None, "local_epochs": 3}, {"local_epochs": None, "local_steps": 2}),
        (
            {"warmup_ratio": 0.5},
            {"lr_scheduler_type": "linear", "warmup_steps": 2},
            {"warmup_steps": 0, "warmup_ratio": 0.5},
        ),
        (
            {"lr_scheduler_type": "constant"},
            {"lr_scheduler_type": "linear", "warmup_steps": 2},
            {"warmup_steps": 0},
        ),
        (
            {"lr_scheduler_type": "linear"},
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            {"lr_scheduler_type": "linear"},
        ),
    ],
)
def test_what_excludes_a_key_of_the_study_replaces_it(
    keys: dict[str, Any], study: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = changed(keys, **study)
    assert {key: getattr(found, key) for key in expected} == expected
    assert found.lr_scheduler_kwargs is None


def test_faults_of_a_methods_training_name_their_place_and_come_together() -> None:
    found = faults(
        {"name": "fedavg", "training": {"lerning_rate": 1, "batch_size": 0}},
        {"name": "mira", "lamda": 1, "training": {"lr_scheduler_kwargs": {"min": 1}}},
        {"name": "local", "training": 3},
    )
    places = [fault.split(": ")[0] for fault in found]
    assert sorted(places) == [
        "methods.0.training.batch_size",
        "methods.0.training.lerning_rate",
        "methods.1.lamda",
        "methods.1.training.lr_scheduler_kwargs.min",
        "methods.2.training",
    ]
    assert any("did you mean 'learning_rate'?" in fault for fault in found)


def test_keys_that_do_not_go_with_the_studys_are_a_fault_of_each_method() -> None:
    found = faults(
        {"name": "fedavg", "training": {"local_steps": 2, "local_epochs": 1}},
        "local",
        {"name": "mira", "training": {"lr_scheduler_type": "cosine_with_min_lr"}},
    )
    assert [fault.split(": ")[0] for fault in found] == ["methods.0.training", "methods.2.training"]
    assert "exactly one of local_steps and local_epochs" in found[0]


def test_a_misspelt_training_of_a_method_is_recognised() -> None:
    (fault,) = faults({"name": "fedavg", "trainin": {}})
    assert fault.startswith("methods.0.trainin: unknown key (did you mean 'training'?)")


def test_an_override_reaches_a_methods_training_even_where_only_its_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    content = {**raw(), "training": dict(STUDY), "methods": ["local", "fedavg", {"name": "mira"}]}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    found = check_config(
        read_config(path, ["methods.1.training.learning_rate=1e-2", "methods.2.training={local_epochs: 1}"])
    )
    assert [found.training_of(entry).learning_rate for entry in found.methods] == [1e-3, 1e-2, 1e-3]
    assert found.training_of(found.methods[2]).local_epochs == 1
    with pytest.raises(ConfigError, match=r"methods.0.training.lr: unknown key"):
        check_config(read_config(path, ["methods.0.training.lr=1"]))


KEYS: Mapping[str, st.SearchStrategy[Any]] = {
    "local_steps": st.integers(1, 9),
    "batch_size": st.integers(1, 9),
    "gradient_accumulation_steps": st.integers(1, 9),
    "learning_rate": st.floats(1e-6, 1),
    "optimizer": st.sampled_from(["adamw", "sgd"]),
    "lr_scheduler_type": st.sampled_from(["constant", "linear", "cosine"]),
    "lr_scheduler_over": st.sampled_from(["run", "rounds", "steps"]),
    "max_grad_norm": st.one_of(st.none(), st.floats(0.1, 9)),
    "keep_optimizer": st.booleans(),
    "betas": st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)).map(list),
}


@settings(max_examples=20)
@given(keys=st.fixed_dictionaries({}, optional=dict(KEYS)), study=st.fixed_dictionaries({}, optional=dict(KEYS)))
def test_a_config_reads_back_with_what_was_written_and_nothing_more(
    keys: dict[str, Any], study: dict[str, Any]
) -> None:
    found = config("local", {"name": "fedavg", "training": keys}, **study)
    again = check_config(parse_yaml(dump_config(found), "dumped"))
    assert again == found
    training = again.methods[1].training
    assert training is not None
    assert training.given == keys
    merged = again.training_of(again.methods[1])
    plain = TrainingConfig.model_validate({**STUDY, **study, **keys})
    assert merged == plain


def test_every_key_of_training_may_be_changed_for_a_method() -> None:
    assert list(MethodTraining.model_fields) == list(TrainingConfig.model_fields)
