"""Studies with a method that trains virtual tokens: what is checked, run, kept, counted and gone on with."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests import small_study
from tests.small_study import CLIENTS, command, differences, outcome

import fedmira
from fedmira import preview
from fedmira.adapters import prompt_layout
from fedmira.config import Config, check_config
from fedmira.engine import rounds
from fedmira.errors import ConfigError
from fedmira.methods import fedptuning
from fedmira.methods.base import Method, own_rows, serve_own
from fedmira.prepare import prepare

TOKENS, HIDDEN, WIDTH = 5, 3, 16
LAYOUT = prompt_layout(WIDTH, TOKENS, HIDDEN)
PROMPTS: dict[str, Any] = {"name": "fedptuning", "virtual_tokens": TOKENS, "hidden": HIDDEN}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    small_study.save_base(folder / "base")
    small_study.save_data(folder / "data.jsonl")
    return folder


def raw(home: Path, name: str, **changes: Any) -> dict[str, Any]:
    changes = {"methods": [{"name": "local"}, PROMPTS], **changes}
    return small_study.settings(home / "base", home / "data.jsonl", home / name, **changes)


def config(home: Path, name: str, **changes: Any) -> Config:
    return check_config(raw(home, name, **changes), "test")


@pytest.fixture(scope="module")
def study(home: Path) -> fedmira.Study:
    return fedmira.run(config(home, "study"))


def of_prompts(study: fedmira.Study) -> Any:
    return next(run for run in study.runs if run.facts["method"] == "fedptuning")


def test_it_runs_beside_methods_with_lora(study: fedmira.Study) -> None:
    facts = of_prompts(study).facts
    assert facts["state"] == "complete"
    assert facts["parameters"] == LAYOUT.parameters
    assert facts["layout_fingerprint"] == LAYOUT.fingerprint
    assert not facts["personal"]
    table = json.loads((of_prompts(study).path / "clients.json").read_text())
    assert {row["rank"] for row in table.values()} == {0}
    lora = next(run for run in study.runs if run.facts["method"] == "local")
    assert {row["rank"] for row in json.loads((lora.path / "clients.json").read_text()).values()} == {2}


def test_all_methods_are_compared_with_the_untouched_base(study: fedmira.Study) -> None:
    table = study.results
    table = table[(table.split == "validation") & (table.metric == "loss")]
    first = table[table["round"] == 0].pivot(index="client", columns="method", values="value")
    assert first["local"].equals(first["fedptuning"])


def test_training_lowers_the_loss(home: Path) -> None:
    often = {"federation": {"participation": 1.0}, "training": {"local_steps": 16, "learning_rate": 0.02}}
    records = fedmira.run(config(home, "often", methods=[PROMPTS], **often)).runs[0].rounds
    losses = [sum(record["train_loss"]) / len(record["train_loss"]) for record in records]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_its_clients_may_have_a_learning_rate_of_their_own(home: Path, study: fedmira.Study) -> None:
    same, other = (
        fedmira.run(config(home, f"rate-{rate}", methods=[{"name": "local"}, {**PROMPTS, "learning_rate": rate}]))
        for rate in (0.05, 0.01)
    )
    changed = [differences(outcome(study.path), outcome(one.path)) for one in (same, other)]
    assert all(name.endswith("README.md") for name in changed[0])  # which tell the settings
    assert "fedptuning/seed-3/results.csv" in changed[1]
    assert all(name.startswith("fedptuning") for name in changed[1])


def test_bytes_are_those_of_the_encoder(study: fedmira.Study) -> None:
    for record in of_prompts(study).rounds:
        assert record["bytes_up"] == record["bytes_down"] == 3 * 4 * LAYOUT.size


def test_the_checkpoint_keeps_the_whole_encoder(study: fedmira.Study) -> None:
    newest = sorted((of_prompts(study).path / "checkpoints").glob("round-*"))[-1]
    row = load_file(newest / "state.safetensors")["rows"]
    assert row.shape == (1, LAYOUT.size)
    for leaf in LAYOUT.parts[0].leaves:
        assert bool(row[0, leaf.start : leaf.stop].all()), leaf.module


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(home: Path) -> None:
    """Moments of the encoder are kept too."""
    kept = {"training": {"keep_optimizer": True}, "methods": [PROMPTS]}
    fedmira.run(config(home, "whole", **kept))
    file = small_study.save_config(home / "killed.yaml", raw(home, "killed", **kept))
    ended = command("run", file, die_at=40)
    assert ended.code == -signal.SIGKILL, ended.err
    done = [run for run in small_study.run_folders(home / "killed") if (run / "results.csv").is_file()]
    assert done
    assert command("resume", home / "killed").code == 0
    assert differences(outcome(home / "whole"), outcome(home / "killed")) == []


def test_more_rounds_go_on_from_the_encoder(home: Path, study: fedmira.Study) -> None:
    short = fedmira.run(config(home, "short", federation={"rounds": 2}))
    longer = fedmira.resume(short.path, ["federation.rounds=4"])
    assert differences(outcome(study.path), outcome(longer.path)) == []


def test_positions_that_virtual_tokens_take_are_counted_before_anything_is_read(home: Path) -> None:
    changes = {"data": {"max_length": 62, "path": str(home / "nothing.jsonl")}}
    with pytest.raises(
        ConfigError, match=r"64 positions, of which virtual tokens take 5; set data.max_length to at most 59"
    ):
        prepare(config(home, "x", **changes), lambda event, facts: None)
    with pytest.raises(ConfigError, match=r"max_new_tokens: found 60: .* of which virtual tokens take 5"):
        prepare(config(home, "x", evaluation={"max_new_tokens": 60}), lambda event, facts: None)


def test_a_dry_run_counts_the_encoder(home: Path) -> None:
    wide = {**PROMPTS, "virtual_tokens": 20, "hidden": 64}
    plan = preview.plan_study(config(home, "y", methods=[{"name": "fedavg"}, wide]))
    layout = prompt_layout(WIDTH, 20, 64)
    assert plan.parameters == layout.parameters
    assert plan.bytes_per_round["fedptuning"] == 2 * 3 * 4 * layout.size
    assert plan.bytes_per_round["fedavg"] < plan.bytes_per_round["fedptuning"]
    assert set(plan.run_seconds) == {"fedavg", "fedptuning"}


def test_a_cohort_is_measured_for_the_rows_that_need_most(home: Path) -> None:
    """Virtual tokens make every text longer and every layer keep what it saw."""
    alone, both = (
        preview.plan_study(config(home, "y", methods=methods, federation={"cohort": "auto"}))
        for methods in ([{"name": "fedavg"}], [{"name": "fedavg"}, {**PROMPTS, "virtual_tokens": 30}])
    )
    assert both.memory["cohort"] > 1.5 * alone.memory["cohort"]


def test_a_personal_method_with_virtual_tokens_begins_where_these_put_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that are never drawn have virtual tokens that were drawn at random: they are not the untouched base."""
    real = fedptuning.build

    def personal(settings: Any, cohort: Any) -> Method:
        return replace(real(settings, cohort), personal=True, send=own_rows, serve=serve_own, merge=keep)

    def keep(state: Any, ids: Any, returned: Any, weights: Any, clock: Any) -> Any:
        return rounds.Change(ids, returned.rows)

    monkeypatch.setattr(fedptuning, "build", personal)
    few = {"rounds": 1, "participation": 0.34}
    study = fedmira.run(config(home, "personal", methods=[PROMPTS], federation=few))
    table = study.results
    drawn = set(study.runs[0].rounds[0]["clients"])
    assert len(drawn) == 2
    for split in ("validation", "test"):
        own = table[(table.split == split) & (table.metric == "loss")]
        own = own.pivot(index="client", columns="round", values="value")
        for client in set(CLIENTS) - drawn:
            assert abs(own.loc[client, 0] - own.loc[client, 1]) > 1e-3, (split, client)
