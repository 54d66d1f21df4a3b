"""A whole study, for real: the folders it leaves, what stands in them, and going on with it later."""

import csv
import importlib
import inspect
import json
import random
import re
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests import small_study
from tests.small_study import CLIENTS, ROUNDS, differences, outcome

import fedmira
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.config.yaml_text import read_config
from fedmira.disk.folders import NAME_COLUMN, RESULT_COLUMNS, RunFolder
from fedmira.engine.events import Event, RoundDone
from fedmira.engine.schedule import draw_schedule
from fedmira.errors import ConfigError, DataError, FedMiraError, MethodError, ModelError, Stopped, StoreError
from fedmira.study.events import AdaptersWritten, ClientsEncoded
from fedmira.study.face import Run, Study

Make = Callable[..., Config]
FILES = {
    "config.yaml",
    "run.json",
    "clients.json",
    "metrics.jsonl",
    "results.csv",
    "log.txt",
    "checkpoints",
    "adapters",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_study.save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_study.save_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture
def make(base: Path, data: Path, tmp_path: Path) -> Make:
    """Make a config whose study lies in tmp_path/NAME."""

    def made(name: str = "study", **changes: Any) -> Config:
        return check_config(small_study.settings(base, data, tmp_path / name, **changes))

    return made


@pytest.fixture(scope="module")
def study(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One finished study that tests only read."""
    raw = small_study.settings(base, data, tmp_path_factory.mktemp("finished") / "study")
    return fedmira.run(check_config(raw))


def find(study: Study, method: str) -> Run:
    return fedmira.load_run(study.path / method / "seed-3")


def table(run: Run) -> list[dict[str, str]]:
    with (run.path / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tensors(run: Run, client: str) -> dict[str, torch.Tensor]:
    return load_file(run.adapters(client) / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- folders


def test_a_study_holds_its_config_its_report_and_one_folder_per_method_and_seed(study: Study) -> None:
    assert {path.name for path in study.path.iterdir()} == {
        "config.yaml",
        "summary.json",
        "report.html",
        "local",
        "fedavg",
        "mira",
        "results.csv",
        ".lock",
    }
    assert [run.path.relative_to(study.path).as_posix() for run in study.runs] == [
        "local/seed-3",
        "fedavg/seed-3",
        "mira/seed-3",
    ]


@pytest.mark.parametrize("method", ["local", "fedavg", "mira"])
def test_a_run_holds_exactly_the_files_of_the_contract(method: str, study: Study) -> None:
    names = {path.name for path in find(study, method).path.iterdir()}
    assert names == FILES | ({"graph.json"} if method == "mira" else set())


def test_every_client_has_a_peft_folder(study: Study) -> None:
    for run in study.runs:
        assert {path.name for path in (run.path / "adapters").iterdir()} == set(CLIENTS)
        for client in CLIENTS:
            assert {path.name for path in run.adapters(client).iterdir()} == {
                "adapter_model.safetensors",
                "adapter_config.json",
                "README.md",
                "chat_template.jinja",
                "tokenizer.json",
                "tokenizer_config.json",
            }


def test_checkpoints_are_safetensors_with_a_manifest(study: Study) -> None:
    newest = find(study, "mira").path / "checkpoints" / f"round-{ROUNDS:06d}"
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
    assert read(newest / "manifest.json")["round"] == ROUNDS


@pytest.mark.slow
def test_a_label_names_the_folder_and_the_method_column(make: Make) -> None:
    done = fedmira.run(make(methods=[{"name": "fedavg", "label": "plain", "weights": "uniform"}], seeds=[3, 4]))
    assert [run.path.relative_to(done.path).as_posix() for run in done.runs] == ["plain/seed-3", "plain/seed-4"]
    assert set(done.results["method"]) == {"plain"}
    assert set(done.results["seed"]) == {3, 4}
    assert done.runs[0].facts.method == "fedavg"


def test_the_studys_config_comes_back_as_it_was(study: Study) -> None:
    assert study.config.federation.rounds == ROUNDS
    assert [entry.name for entry in study.config.methods] == ["local", "fedavg", "mira"]


def test_a_runs_own_config_runs_again_with_the_same_bits(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)  # again/ is written inside the run: the finished study stays as it is
    path = copy / "mira" / "seed-3" / "config.yaml"
    config = fedmira.load_config(path, [f"output_dir={tmp_path / 'again'}"])
    again = fedmira.run(config)
    expected = {name: value for name, value in outcome(study.path).items() if name.startswith("mira/")}
    assert differences(outcome(again.path), expected) == []


def test_a_runs_own_config_needs_no_change_to_run_again(study: Study) -> None:
    run = find(study, "local")
    config = fedmira.load_config(run.path / "config.yaml")
    assert Path(config.output_dir) == run.path / "again"
    assert [entry.name for entry in config.methods] == ["local"]
    assert config.seeds == [3]


# ---------------------------------------------------------------- contents


def test_run_json_says_what_the_run_was(study: Study, base: Path) -> None:
    facts = find(study, "mira").facts
    assert (facts.schema, facts.state, facts.seed) == (2, "complete", 3)
    assert (facts.method, facts.settings["lambda"]) == ("mira", 0.25)
    assert (facts.cohort, facts.threads, facts.dtype) == (2, 1, "float32")
    assert re.fullmatch(r"[0-9a-f]{64}", facts.base_fingerprint)
    assert {"fedmira", "torch", "transformers", "peft", "python"} <= facts.versions.keys()
    assert facts.base_model == str(base)


def test_clients_json_counts_every_example_once(study: Study) -> None:
    clients = read(find(study, "local").path / "clients.json")
    assert list(clients) == list(CLIENTS)
    assert [sum(client["examples"].values()) for client in clients.values()] == [10, 11, 10, 11, 10, 11]
    assert {client["group"] for client in clients.values()} == {"even", "odd"}
    assert all(client["folder"] == name and client["rank"] == 2 for name, client in clients.items())
    # an answer of two words and the end of text, for each example to train on
    assert all(client["trained_tokens"] == 3 * client["examples"]["train"] for client in clients.values())


def test_graph_json_lists_the_edges_that_the_method_used(study: Study) -> None:
    graph = read(find(study, "mira").path / "graph.json")
    assert (graph["kind"], graph["clients"]) == ("groups", list(CLIENTS))
    assert sorted((a, b) for a, b, _ in graph["edges"]) == [
        (a, b) for a in range(6) for b in range(6) if a != b and a % 2 == b % 2
    ]


def test_results_csv_has_the_contracts_columns_and_every_number_once(study: Study) -> None:
    for run in study.runs:
        assert (run.path / "results.csv").read_text().splitlines()[0] == ",".join((*RESULT_COLUMNS, NAME_COLUMN))
        keys = [(row["client"], row["round"], row["split"], row["metric"]) for row in table(run)]
        assert len(keys) == len(set(keys))
        validation = {(client, str(number), "validation", "loss") for client in CLIENTS for number in range(ROUNDS + 1)}
        tests = {
            (client, number, "test", metric)
            for client in CLIENTS
            for number in ("0", str(ROUNDS))
            for metric in ("loss", "exact_match")
        }
        assert set(keys) == validation | tests


def test_the_view_tells_whose_adapter_was_measured(study: Study) -> None:
    views = {run.facts.label: {row["view"] for row in table(run)} for run in study.runs}
    assert views == {"local": {"personal"}, "fedavg": {"global"}, "mira": {"personal"}}


def test_round_0_is_the_untouched_base_whatever_the_method(study: Study, base: Path, data: Path) -> None:
    zero = [
        {(row["client"], row["split"], row["metric"]): row["value"] for row in table(run) if row["round"] == "0"}
        for run in study.runs
    ]
    assert zero[0] == zero[1] == zero[2]
    # judged by transformers alone: ada's test examples through the model without any adapter
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    losses = {}
    for row in (row for row in rows if row["client"] == "ada"):
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        with torch.no_grad():
            losses[row["prompt"]] = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    found = float(zero[0]["ada", "test", "loss"])
    pairs = [
        (a + b) / 2 for a in losses.values() for b in losses.values() if a != b
    ]  # two of its ten are the test split
    assert min(abs(pair - found) for pair in pairs) < 1e-5


def test_results_are_one_table_of_all_runs(study: Study) -> None:
    frame = study.results
    assert isinstance(frame, pd.DataFrame)
    assert tuple(frame.columns) == (*RESULT_COLUMNS, NAME_COLUMN)
    assert len(frame) == sum(len(table(run)) for run in study.runs)
    assert set(frame["client"]) == set(CLIENTS)  # 007 is no number, no is no truth value


def test_every_round_has_a_line_with_the_clients_that_the_seed_draws(study: Study) -> None:
    drawn = draw_schedule(len(CLIENTS), rounds=ROUNDS, participation=0.5, seed=3)
    for run in study.runs:
        assert [line["round"] for line in run.rounds] == [1, 2, 3, 4]
        assert [line["clients"] for line in run.rounds] == [[CLIENTS[k] for k in ids] for ids in drawn]


def test_bytes_are_clients_times_parameters_times_four_each_way(study: Study) -> None:
    parameters = sum(value.numel() for value in tensors(find(study, "local"), "ada").values())
    assert parameters == 224  # 2 layers x (q 2x16 + 16x2, v 2x16 + 8x2): no padding in a row of this size
    for method, each in (
        ("local", 0),
        ("fedavg", 3 * 224 * 4),
        ("mira", 3 * 224 * 4),
    ):  # who trains alone sends nothing
        run = find(study, method)
        assert {(line["bytes_up"], line["bytes_down"]) for line in run.rounds} == {(each, each)}
        assert (run.facts.bytes_up, run.facts.bytes_down) == (ROUNDS * each, ROUNDS * each)


def test_the_first_round_of_every_method_starts_from_the_same_adapter(study: Study) -> None:
    first = [(run.rounds[0]["train_loss"], run.rounds[0]["loss_before"]) for run in study.runs]
    assert first[0] == first[1] == first[2]


def test_a_client_that_was_never_sampled_is_at_the_common_start_and_scored_like_the_base(study: Study) -> None:
    drawn = {client for line in find(study, "local").rounds for client in line["clients"]}
    absent = [client for client in CLIENTS if client not in drawn]
    assert absent  # of this seed
    for method in ("local", "mira"):
        run = find(study, method)
        for name, value in tensors(run, absent[0]).items():
            assert bool((value == 0).all()) == name.endswith("lora_B.weight")
        values = {row["round"]: row["value"] for row in table(run) if _is_test_loss(row, absent[0])}
        assert values["0"] == values[str(ROUNDS)]
    assert equal(tensors(find(study, "local"), absent[0]), tensors(find(study, "mira"), absent[0]))
    assert find(study, "local").facts.ever_sampled == len(drawn)


def _is_test_loss(row: dict[str, str], client: str) -> bool:
    return (row["client"], row["split"], row["metric"]) == (client, "test", "loss")


def test_a_shared_model_is_the_same_adapter_for_every_client(study: Study) -> None:
    run = find(study, "fedavg")
    assert all(equal(tensors(run, "ada"), tensors(run, client)) for client in CLIENTS)


def test_clients_that_were_sampled_differ_when_they_train_alone(study: Study) -> None:
    run = find(study, "local")
    assert not equal(tensors(run, "007"), tensors(run, "eve"))


def test_the_same_config_gives_the_same_bits(study: Study, make: Make) -> None:
    assert differences(outcome(fedmira.run(make()).path), outcome(study.path)) == []


def test_another_seed_gives_other_bits_but_the_same_base(study: Study, make: Make) -> None:
    other = fedmira.run(make(seeds=[4], methods=[{"name": "local"}])).runs[0]
    zero = [[row for row in table(run) if row["round"] == "0"] for run in (other, find(study, "local"))]
    assert [row["value"] for row in zero[0]] == [row["value"] for row in zero[1]]
    assert other.rounds[0]["train_loss"] != find(study, "local").rounds[0]["train_loss"]


# ---------------------------------------------------------------- going on


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_more_rounds_later_equal_as_many_from_the_start(keep: bool, make: Make) -> None:
    training = {"keep_optimizer": keep, "optimizer": "adamw"}
    whole = fedmira.run(make("whole", training=training))
    short = fedmira.run(make("short", training=training, federation={"rounds": 2}))
    assert differences(outcome(short.path), outcome(whole.path)) != []
    grown = fedmira.resume(short.path, [f"federation.rounds={ROUNDS}"])
    assert differences(outcome(grown.path), outcome(whole.path)) == []
    assert grown.config.federation.rounds == ROUNDS
    assert {run.facts.rounds for run in grown.runs} == {ROUNDS}


@pytest.mark.slow
def test_a_run_that_has_grown_reads_like_one_that_was_longer_from_the_start(make: Make) -> None:
    """The old last round was validated because it was the last; in the longer run it is not due."""
    evaluation = {"every": ROUNDS, "metrics": ["loss"]}
    whole = fedmira.run(make("whole", evaluation=evaluation))
    short = fedmira.run(make("short", evaluation=evaluation, federation={"rounds": 2}))
    grown = fedmira.resume(short.path, [f"federation.rounds={ROUNDS}"])
    assert differences(outcome(grown.path), outcome(whole.path)) == []


@pytest.mark.slow
def test_resuming_one_run_leaves_the_others_alone(make: Make) -> None:
    study = fedmira.run(make(federation={"rounds": 2}))
    first, *others = study.runs
    fedmira.resume(first.path, [f"federation.rounds={ROUNDS}"])
    assert first.facts.rounds == ROUNDS
    assert {run.facts.rounds for run in others} == {2}


@pytest.mark.slow
def test_a_resumed_run_keeps_when_and_with_what_it_began(make: Make) -> None:
    study = fedmira.run(make(federation={"rounds": 2}, methods=[{"name": "local"}]))
    began = study.runs[0].facts.started
    fedmira.resume(study.path, [f"federation.rounds={ROUNDS}"])
    facts = study.runs[0].facts
    assert facts.started == began
    assert [set(one) for one in facts.resumed] == [{"started", "versions", "device", "command"}]


def test_another_graph_is_refused_on_resume(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "graph.csv"
    path.write_text("client,neighbour,weight\n007,eve,1\n")
    mira = {"name": "mira", "graph": {"kind": "file", "path": str(path)}}
    study = fedmira.run(make(federation={"rounds": 2}, methods=[mira]))
    path.write_text("client,neighbour,weight\n007,eve,0.5\n")
    with pytest.raises(MethodError, match="not the one this run began with"):
        fedmira.resume(study.path, [f"federation.rounds={ROUNDS}"])


def test_keeping_the_optimizer_makes_a_difference(study: Study, make: Make) -> None:
    kept = fedmira.run(make(training={"keep_optimizer": True}, methods=[{"name": "local"}]))
    assert not equal(tensors(kept.runs[0], "007"), tensors(find(study, "local"), "007"))


@pytest.mark.slow
def test_the_settings_of_a_method_are_checked_once_in_a_study(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    module = fedmira.load_method("mira")
    real = module.Config.model_validate

    def count(settings: Any) -> Any:
        checked.append(settings)
        return real(settings)

    config = make("once", methods=[{"name": "mira", "lambda": 0.1, "graph": {"kind": "uniform"}}], seeds=[0, 1])
    monkeypatch.setattr(module.Config, "model_validate", count)
    fedmira.run(config)
    assert len(checked) == 1


def test_a_study_that_an_earlier_version_began_is_refused_with_the_way_out_and_still_reported(make: Make) -> None:
    study = fedmira.run(make("earlier", methods=[{"name": "local"}]))
    path = study.runs[0].path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 1}))
    assert fedmira.report(study.path).is_file()
    with pytest.raises(StoreError, match=r"checkpoints of schema 1.*finish it with the version that began it"):
        fedmira.resume(study.path, ["federation.rounds=5"])


def test_an_observer_gets_what_happens_in_its_order(make: Make) -> None:
    events: list[Event] = []
    done = fedmira.run(make(methods=[{"name": "fedavg_ft", "steps": 1}]), observer=events.append)
    assert [kind.__name__ for kind in dict.fromkeys(map(type, events))] == [
        "ClientsEncoded",
        "DataRead",
        "StudyPrepared",
        "StudyBegun",
        "StepBegun",
        "AnswersWritten",
        "RunBegun",
        "RoundDone",
        "ClientsTuned",
        "AdaptersWritten",
        "RunDone",
        "ReportBegun",
    ]
    records = [event.record for event in events if isinstance(event, RoundDone)]
    assert [record.round for record in records] == [line["round"] for line in done.runs[0].rounds] == [1, 2, 3, 4]
    for kind in (ClientsEncoded, AdaptersWritten):
        counts = [(event.done, event.clients) for event in events if isinstance(event, kind)]
        assert counts == [(count, len(CLIENTS)) for count in range(1, len(CLIENTS) + 1)]


@pytest.mark.slow
def test_resuming_a_finished_study_changes_nothing_in_its_runs(make: Make) -> None:
    done = fedmira.run(make(methods=[{"name": "mira", "lambda": 0.1}]))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done.runs[0].path.rglob("*.*")}
    fedmira.resume(done.path)
    fedmira.resume(done.runs[0].path)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done.runs[0].path.rglob("*.*")} == before


@pytest.mark.parametrize(
    "override",
    [
        "federation.rounds=1",
        "federation.rounds=x",
        "federation.rounds=²",
        "federation.rounds=",
        "federation.rounds",
        "federation.participation=1",
        "training.learning_rate=1",
        "seeds=[1]",
    ],
)
def test_on_resume_nothing_but_more_rounds_may_change(override: str, study: Study) -> None:
    before = outcome(study.path)
    with pytest.raises(ConfigError, match=r"only federation\.rounds may change, from 4 up"):
        fedmira.resume(study.path, [override])
    assert differences(outcome(study.path), before) == []
    assert study.config.federation.rounds == ROUNDS


def test_resume_refuses_another_base_in_the_old_ones_place(make: Make, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    done = fedmira.run(make(model={"base_model": str(own)}, methods=[{"name": "local"}]))
    small_study.save_base(own, seed=1)
    before = outcome(done.path)
    with pytest.raises(ModelError, match="not the base this study began with"):
        fedmira.resume(done.path, ["federation.rounds=9"])
    assert differences(outcome(done.path), before) == []
    assert done.config.federation.rounds == ROUNDS


def test_resume_refuses_data_with_other_clients_or_counts(make: Make, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(data, own)
    done = fedmira.run(make(data={"path": str(own)}, methods=[{"name": "local"}]))
    own.write_text("".join(own.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(StoreError, match="not the data this study began with: 1 clients differ, such as 'ada'"):
        fedmira.resume(done.path, ["federation.rounds=9"])


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_one_round_and_not_the_result(
    make: Make, study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    done = fedmira.run(make())
    for run in done.runs:
        path = run.path / "checkpoints" / f"round-{ROUNDS:06d}" / "state.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        RunFolder(run.path).update(replace(run.facts, state="running"))
    fedmira.resume(done.path)
    assert sum("resuming from round 3" in record.getMessage() for record in caplog.records) == 3
    assert differences(outcome(done.path), outcome(study.path)) == []


def test_a_full_disk_stops_the_run_so_that_it_can_be_resumed(
    make: Make, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    rename, left = os.replace, iter(range(60))

    def full(*arguments: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(Stopped, match=r"cannot write '.*' \(\d+ bytes\): No space left"):
            fedmira.run(make())
    assert Stopped.exit_code == 3
    study_path = Path(make().output_dir)
    fedmira.resume(study_path)
    assert differences(outcome(study_path), outcome(study.path)) == []


# ---------------------------------------------------------------- nothing is begun with bad input


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": {"path": "none.jsonl"}}, DataError),
        ({"data": {"clients": {"by": "nobody"}}}, DataError),
        ({"model": {"base_model": "./none"}}, ModelError),
        ({"model": {"base_model": "nobody/nothing"}}, ModelError),
        ({"data": {"max_length": 10_000}}, ConfigError),
        ({"lora": {"target_modules": ["nothing"]}}, ModelError),
        ({"methods": [{"name": "mira", "lambda": 50}]}, MethodError),
        ({"methods": [{"name": "mira", "graph": {"kind": "groups", "column": "none"}}]}, MethodError),
        ({"methods": [{"name": "miro"}]}, FedMiraError),
    ],
)
def test_bad_input_leaves_no_folder_behind(changes: dict[str, Any], error: type[Exception], make: Make) -> None:
    config = make(**changes)
    with pytest.raises(error):
        fedmira.run(config)
    assert not Path(config.output_dir).exists()


def test_a_study_is_not_run_over_another(study: Study, make: Make) -> None:
    config = make().model_copy(update={"output_dir": str(study.path)})
    before = outcome(study.path)
    with pytest.raises(StoreError, match="already holds a study"):
        fedmira.run(config)
    assert differences(outcome(study.path), before) == []


@pytest.mark.slow
def test_overwriting_replaces_a_study(make: Make) -> None:
    fedmira.run(make(methods=[{"name": "local"}]))
    done = fedmira.run(make(methods=[{"name": "fedavg"}]), overwrite=True)
    assert [run.path.parent.name for run in done.runs] == ["fedavg"]
    assert not (done.path / "local").exists()


def test_overwriting_keeps_the_old_study_if_the_new_one_cannot_begin(make: Make) -> None:
    done = fedmira.run(make(methods=[{"name": "local"}]))
    before = outcome(done.path)
    with pytest.raises(DataError):
        fedmira.run(make(data={"path": "none.jsonl"}), overwrite=True)
    assert differences(outcome(done.path), before) == []


# ---------------------------------------------------------------- the Python face


def test_the_contracts_names_are_there() -> None:
    names = ["Config", "load_config", "run", "resume", "load_run", "load_method", "method_names", "export", "report"]
    names += ["Adapters", "Layout", "Method"]
    assert set(names) <= set(fedmira.__all__)
    assert all(hasattr(fedmira, name) for name in fedmira.__all__)
    assert issubclass(fedmira.errors.FedMiraError, Exception)
    assert fedmira.FedMiraError is FedMiraError
    assert set(fedmira.__all__) <= set(dir(fedmira))


def test_the_package_of_the_methods_and_the_function_that_exports_keep_their_names() -> None:
    assert importlib.import_module("fedmira.methods") is fedmira.methods
    assert fedmira.methods.names() == fedmira.method_names()
    importlib.import_module("fedmira.export.vllm")  # would set fedmira.export, were it the first of its package
    assert inspect.isfunction(fedmira.export)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedmira' has no attribute 'no_such_name'"):
        fedmira.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", [name for name in fedmira.__all__ if inspect.isfunction(getattr(fedmira, name))])
def test_every_public_function_has_its_types_and_a_docstring(name: str) -> None:
    function = getattr(fedmira, name)
    assert set(inspect.signature(function).parameters) | {"return"} == set(inspect.get_annotations(function))
    assert function.__doc__


def test_methods_are_listed_by_their_file_names() -> None:
    assert {"local", "fedavg", "mira"} <= set(fedmira.method_names())
    assert all(fedmira.load_method(name).Config for name in fedmira.method_names())


def test_a_run_hands_out_its_adapters_by_client(study: Study) -> None:
    folder = find(study, "mira").adapters("007")
    assert read(folder / "adapter_config.json")["peft_type"] == "LORA"


@pytest.mark.parametrize("client", ["nobody", "", ".", "..", "../../../local/seed-3/adapters/ada", "/etc"])
def test_a_client_that_is_not_there_is_refused_with_those_that_are(client: str, study: Study) -> None:
    with pytest.raises(StoreError, match="there are: 007, ada, bo, cy, eve, no"):
        find(study, "mira").adapters(client)


@pytest.mark.parametrize("opening", [fedmira.load_run, fedmira.resume, fedmira.report, fedmira.export])
def test_a_folder_that_is_none_of_ours_is_refused(opening: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        opening(tmp_path)


# ---------------------------------------------------------------- examples stay where they are


def secrets() -> list[str]:
    dice = random.Random(11)
    return ["".join(dice.choices(string.ascii_letters + string.digits, k=32)) for _ in range(40)]


@pytest.mark.slow
def test_no_file_of_a_study_and_no_output_holds_a_word_of_the_examples(make: Make, tmp_path: Path) -> None:
    words = secrets()
    path = small_study.save_data(tmp_path / "secret.jsonl", extra=words)
    raw = small_study.settings(Path(make().model.base_model), path, tmp_path / "study")
    ended = small_study.command("run", small_study.save_config(tmp_path / "config.yaml", raw))
    assert ended.code == 0, ended.err
    files = [path for path in (tmp_path / "study").rglob("*") if path.is_file()]
    assert len(files) > 60
    for content in (ended.out.encode(), ended.err.encode(), *(path.read_bytes() for path in files)):
        assert not [word for word in words if word.encode() in content]


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "SECRET", "completion": 5, "client": "ada"}',
        '{"prompt": "SECRET", "completion": "", "client": "ada"}',
        '{"prompt": ["SECRET"], "completion": "w2", "client": "ada"}',
        '{"prompt": "SECRET", "completion": "w2 SECRET", "client": "ada"',
        '{"prompt": "SECRET", "completion": "SECRET\\u0000", "client": "ada"}',
        '{"prompt": "SECRET", "completion": "w2", "client": ""}',
        '["SECRET"]',
        '"SECRET"',
        "SECRET",
    ],
)
def test_no_message_about_a_bad_row_holds_a_word_of_it(row: str, make: Make, data: Path, tmp_path: Path) -> None:
    word = secrets()[0]
    path = tmp_path / "bad.jsonl"
    path.write_text(data.read_text() + row.replace("SECRET", word) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        fedmira.run(make(data={"path": str(path)}))
    assert word not in str(caught.value)
    assert "bad.jsonl:64" in str(caught.value)


def test_the_config_of_a_study_is_read_back_by_its_path(study: Study) -> None:
    assert read_config(study.path / "config.yaml")["data"]["clients"]["groups"] == "group"
