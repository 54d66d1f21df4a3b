"""Studies with a method that trains virtual tokens: what is checked, run, kept, counted and gone on with."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tests import small_study, tiny
from tests.small_study import CLIENTS, command, differences, outcome

import fedmira
from fedmira.adapters import Layout, prompt_layout
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.engine import cost as plan
from fedmira.engine.cost import Speeds
from fedmira.engine.events import silent
from fedmira.errors import ConfigError, MethodError, ModelError
from fedmira.evaluation import measure
from fedmira.methods import fedptuning
from fedmira.methods.base import Change, Method
from fedmira.study import assemble as preparing
from fedmira.study import dry_run as preview
from fedmira.study.assemble import prepare

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
    return next(run for run in study.runs if run.facts.method == "fedptuning")


def test_it_runs_beside_methods_with_lora(study: fedmira.Study) -> None:
    facts = of_prompts(study).facts
    assert facts.state == "complete"
    assert facts.parameters == LAYOUT.parameters
    assert facts.layout_fingerprint == LAYOUT.fingerprint
    assert not facts.personal
    table = json.loads((of_prompts(study).path / "clients.json").read_text())
    assert {row["rank"] for row in table.values()} == {0}
    lora = next(run for run in study.runs if run.facts.method == "local")
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        ConfigError, match=r"64 positions, of which 5 are kept for virtual tokens; set data.max_length to at most 59"
    ):
        prepare(config(home, "x", **changes), silent)
    with pytest.raises(ConfigError, match=r"max_new_tokens: found 60: .* of which 5 are kept for virtual tokens"):
        prepare(config(home, "x", evaluation={"max_new_tokens": 60}), silent)


def test_a_dry_run_counts_the_encoder(home: Path) -> None:
    wide = {**PROMPTS, "virtual_tokens": 20, "hidden": 64}
    found = preview.plan_study(config(home, "y", methods=[{"name": "fedavg"}, wide]))
    layout = prompt_layout(WIDTH, 20, 64)
    assert found.parameters == layout.parameters
    assert found.bytes_per_round["fedptuning"] == 2 * 3 * 4 * layout.size
    assert found.bytes_per_round["fedavg"] < found.bytes_per_round["fedptuning"]
    assert set(found.run_seconds) == {"fedavg", "fedptuning"}


def test_a_personal_method_with_virtual_tokens_begins_where_these_put_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that are never drawn have virtual tokens that were drawn at random: they are not the untouched base."""
    real = fedptuning.build

    def personal(settings: Any, cohort: Any) -> Method:
        return replace(real(settings, cohort), rows_of="each", merge=keep)

    def keep(state: Any, ids: Any, returned: Any, weights: Any, clock: Any) -> Any:
        return Change(ids, returned.rows)

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


@pytest.mark.slow
def test_a_run_of_a_study_is_made_again_by_its_own_config(home: Path) -> None:
    """Beside virtual tokens prompts have less room, and a method run again alone must not be given more."""
    # Of 64 positions 7 are left for a prompt, and 2 beside 5 virtual tokens.
    long = {"federation": {"rounds": 2}, "evaluation": {"max_new_tokens": 57}}
    study = fedmira.run(config(home, "beside", **long))
    for run in study.runs:
        assert run.config.data.positions_ahead == TOKENS
        again = fedmira.run(run.config)
        assert (again.runs[0].path / "results.csv").read_text() == (run.path / "results.csv").read_text()
        assert (again.runs[0].path / "clients.json").read_text() == (run.path / "clients.json").read_text()
    alone = fedmira.run(config(home, "alone", methods=[{"name": "local"}], **long))
    tables = [json.loads((one.runs[0].path / "clients.json").read_text()) for one in (study, alone)]
    assert all(row["questions_cut"] for row in tables[0].values())
    assert not any(row["questions_cut"] for row in tables[1].values())
    assert all(tables[0][name]["sha256"] != tables[1][name]["sha256"] for name in CLIENTS)


def test_settings_and_layout_must_agree_on_the_virtual_tokens(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedptuning.Config, "tokens_ahead", 3)
    with pytest.raises(MethodError, match="lays out 5 virtual tokens, and its settings say 3"):
        prepare(config(home, "z"), silent)


def test_wrong_settings_are_a_config_error_from_python_too(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"virtual_token.*did you mean 'virtual_tokens'"):
        fedmira.run(config(home, "z", methods=[{"name": "fedptuning", "virtual_token": 3}]))
    assert not (home / "z").exists()


def test_a_row_has_low_rank_factors_or_one_encoder(home: Path) -> None:
    prepared = prepare(config(home, "z"), silent)
    method = prepared.built["local"].methods[3]
    lora, prompt = prepared.federation.layout.parts[0], LAYOUT.parts[0]
    for parts in ((lora, prompt), (prompt, prompt)):
        both = replace(method, layout=lambda layout, width, parts=parts: Layout(parts))
        with pytest.raises(MethodError, match="2 parts"):
            prepared.under(both)


def test_a_base_that_takes_no_embeddings_is_refused_where_they_are_needed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ModelError("no embeddings")

    monkeypatch.setattr(preparing, "check_embeddings", refuse)
    with pytest.raises(ModelError, match="no embeddings"):
        prepare(config(home, "z"), silent)
    assert prepare(config(home, "z", methods=[{"name": "local"}]), silent)


def test_fewer_clients_share_a_pass_where_virtual_tokens_take_their_memory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_free_bytes", lambda device: 2 * plan.CHUNK_BYTES + 1_000_000)
    everyone = {"participation": 1.0, "cohort": "auto"}
    widths = [
        prepare(config(home, "z", methods=methods, federation=everyone), silent).workplace.cohort
        for methods in ([{"name": "fedavg"}], [{"name": "fedavg"}, {**PROMPTS, "virtual_tokens": 40}])
    ]
    assert widths[0] > widths[1] >= 1


def test_ranks_are_no_matter_of_a_method_without_them(home: Path) -> None:
    mixed = {"lora": {"r": 8, "ranks": [1, 2, 1, 2, 1, 2]}, "methods": [{"name": "fedavg"}, PROMPTS]}
    built = prepare(config(home, "z", **mixed), silent).built
    assert built["fedavg"].notes
    assert not built["fedptuning"].notes


def test_a_dry_run_times_every_kind_of_rows_by_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(workplace: Any, federation: Any, *_: Any) -> Speeds:
        return Speeds(1e-3 if federation.layout.low_rank else 1.0, 1e-3, 1e-3)

    monkeypatch.setattr(preview, "measure_speeds", measure)
    found = preview.plan_study(config(home, "z", methods=[{"name": "fedavg"}, PROMPTS]))
    assert found.run_seconds["fedptuning"] > 50 * found.run_seconds["fedavg"]


def test_what_every_client_trains_is_said(home: Path) -> None:
    ended = command("run", small_study.save_config(home / "said.yaml", raw(home, "said", federation={"rounds": 1})))
    assert ended.code == 0
    lora = "rank 2 on 4 layers, 224 parameters each"
    assert f"adapters: {lora} or 5 virtual tokens, {LAYOUT.parameters:,} parameters each; 3 clients" in ended.err
    report = (home / "said" / "report.html").read_text()
    assert f"224 (local) or {LAYOUT.parameters:,} (fedptuning) parameters a client" in report


@pytest.mark.parametrize("padded", [False, True])
def test_virtual_tokens_count_among_those_of_a_scoring_pass(padded: bool) -> None:
    queue = [tiny.example(np.random.default_rng(0), 10, answer=3)] * 900
    for ahead in (0, 20, 500):
        passes = [sum(map(len, parts)) for parts in measure._deal([queue, queue], padded=padded, ahead=ahead)]
        assert sum(passes) == 1800
        assert max(passes) * (10 + ahead) <= measure.PASS_TOKENS
        assert max(passes) * (10 + ahead) > 0.8 * measure.PASS_TOKENS


def test_positions_that_leave_no_room_for_texts_are_refused_with_a_way_out(home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"64 positions, of which 62 are kept .* leaves 2 for texts; take fewer virtual"
    ):
        prepare(config(home, "z", data={"positions_ahead": 62}), silent)
