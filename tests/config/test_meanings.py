"""A key as other programs call it leads to ours, and an entry of a list is found by its name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import fedmira
from fedmira.config.meanings import MEANINGS
from fedmira.config.sections import Config
from fedmira.config.yaml_text import read_config
from fedmira.errors import ConfigError


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        fedmira.load_config("demo", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rank", "r"),
        ("lora.lora_r", "r"),
        ("lora.alpha", "lora_alpha"),
        ("lora.dropout", "lora_dropout"),
        ("lora.targets", "target_modules"),
        ("training.lr", "learning_rate"),
        ("training.LR", "learning_rate"),
        ("training.epochs", "local_epochs"),
        ("training.num_train_epochs", "local_epochs"),
        ("training.steps", "local_steps"),
        ("training.bs", "batch_size"),
        ("training.per-device-train-batch-size", "batch_size"),
        ("training.wd", "weight_decay"),
        ("training.grad_clip", "max_grad_norm"),
        ("training.optim", "optimizer"),
        ("model.model_name", "base_model"),
        ("model.model_name_or_path", "base_model"),
        ("data.dataset", "path"),
        ("data.max_seq_length", "max_length"),
        ("data.sep", "delimiter"),
        ("data.split.dev", "validation"),
        ("data.clients.column", "by"),
        ("federation.num_rounds", "rounds"),
        ("federation.fraction_fit", "participation"),
        ("evaluation.metric", "metrics"),
        ("evaluation.max_tokens", "max_new_tokens"),
        ("seed", "seeds"),
        ("output", "output_dir"),
        ("algorithm", "methods"),
        ("methods.2.lam", "lambda"),
        ("methods.2.normalize", "normalise"),
        ("methods.2.neighbors", "neighbours"),
        # a key of another section
        ("learning_rate", "training.learning_rate"),
        ("lr", "training.learning_rate"),
        ("lora.batch_size", "training.batch_size"),
        ("training.rounds", "federation.rounds"),
        ("data.base_model", "model.base_model"),
    ],
)
def test_a_key_as_others_call_it_leads_to_ours(key: str, meant: str) -> None:
    assert f"{key}: unknown key (did you mean '{meant}'?)" in fault(f"{key}=1")


def test_no_meaning_is_a_key_of_the_section_that_it_leads_to() -> None:
    """It would not be unknown there, and the entry could never be used."""
    for name, field in Config.model_fields.items():
        own = getattr(field.annotation, "model_fields", {})
        for key in own:
            assert not set(MEANINGS.get(key, "").split()) & (set(own) - {key}) - {"alpha", "seed"}, f"{name}.{key}"


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(methods: list[Any]) -> Path:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"methods": methods, "seeds": [0]}))
        return tmp_path / "c.yaml"

    return write


METHODS = ["local", {"name": "fedavg-ft"}, {"name": "mira", "label": "weak"}, {"name": "mira", "label": "strong"}]


@pytest.mark.parametrize(
    ("word", "index"),
    [("local", 0), ("0", 0), ("fedavg-ft", 1), ("fedavg_ft", 1), ("weak", 2), ("strong", 3), ("3", 3)],
)
def test_an_entry_is_found_by_its_label_its_name_or_its_index(word: str, index: int, config: Any) -> None:
    raw = read_config(config(METHODS), [f"methods.{word}.lambda=0.5"])
    assert [entry.get("lambda") if isinstance(entry, dict) else None for entry in raw["methods"]] == [
        0.5 if place == index else None for place in range(4)
    ]


def test_a_label_comes_before_a_name(config: Any) -> None:
    methods = [{"name": "mira", "label": "other"}, {"name": "fedavg", "label": "mira"}]
    raw = read_config(config(methods), ["methods.mira.x=1"])
    assert [entry.get("x") for entry in raw["methods"]] == [None, 1]


def test_a_wrapper_is_found_by_its_name_too(config: Any) -> None:
    methods = [{"name": "fedavg", "with": [{"name": "clip", "norm": 1}, {"name": "proximal"}]}]
    raw = read_config(config(methods), ["methods.fedavg.with.proximal.mu=0.1"])
    assert raw["methods"][0]["with"] == [{"name": "clip", "norm": 1}, {"name": "proximal", "mu": 0.1}]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("methods.mira.lambda=1", "2 entries are called 'mira': say which by its label or index, 2 (weak), 3 (strong)"),
        ("methods.mirra.lambda=1", "nor the label or name of an entry (did you mean 'mira'?): local, fedavg-ft, weak"),
        ("methods.4.lambda=1", "'4' is not an index of a list of 4"),
        ("methods.-1.lambda=1", "'-1' is not an index"),
        ("seeds.x=1", "'x' is not an index of a list of 1"),
    ],
)
def test_an_entry_that_is_not_there_or_not_alone_is_refused(override: str, told: str, config: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(config(METHODS), [override])
    assert told in str(caught.value)


def test_a_method_of_a_bundled_config_is_changed_by_its_name() -> None:
    config = fedmira.load_config("demo", ["methods.mira.lambda=0.125"])
    assert [entry.settings.get("lambda") for entry in config.methods] == [None, None, 0.125]
