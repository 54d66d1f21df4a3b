"""Looking before running: --dry-run, --show-example, init and doctor write nothing and tell the truth."""

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from rich.cells import cell_len
from tests import small_study
from tests.small_study import CLIENTS, command, has_traceback

from fedmira import bundled
from fedmira.cli import doctor
from fedmira.cli.show import show_plan
from fedmira.config.faults import check_config
from fedmira.config.partitioners import PARTITIONERS
from fedmira.config.sections import Config
from fedmira.config.yaml_text import read_config
from fedmira.data.batches import Encoded
from fedmira.disk import table
from fedmira.disk.folders import RunFolder
from fedmira.engine import cost, probe
from fedmira.study import dry_run as preview
from fedmira.study import face as study
from fedmira.study import handover
from fedmira.study.loading import load_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture
def config(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    return small_study.save_config(tmp_path / "config.yaml", small_study.settings(*inputs, tmp_path / "study"))


# ---------------------------------------------------------------- what it will cost


@pytest.mark.parametrize(
    "length", [pytest.param({"local_epochs": 2, "local_steps": None}, marks=pytest.mark.slow), {"local_steps": 3}]
)
def test_the_plan_counts_the_work_that_the_runs_then_do(
    length: dict[str, int | None], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    raw = small_study.settings(*inputs, tmp_path / "study", training=length, evaluation={"every": 2})
    checked = check_config(raw)
    plan = preview.plan_study(checked)
    assert not (tmp_path / "study").exists()
    done = study.run(checked)
    for run in done.runs:
        records = RunFolder(run.path).records()
        assert {record["bytes_up"] + record["bytes_down"] for record in records} == {
            plan.bytes_per_round[run.facts.label]
        }
        trained = sum(record["tokens"] for record in records)
        assert plan.work[run.facts.label].trained == pytest.approx(
            trained, rel=1e-9 if "local_epochs" in length else 0.05
        )
    facts = done.runs[0].facts
    assert (plan.clients, plan.sampled, plan.cohort) == (facts.clients, facts.sampled, facts.cohort)
    assert plan.parameters == facts.parameters
    adapters = sum(path.stat().st_size for path in (tmp_path / "study").glob("*/*/adapters/*/*.safetensors"))
    assert plan.disk["adapters"] <= adapters <= plan.disk["adapters"] + 2000 * len(CLIENTS) * plan.runs  # and headers
    checkpoints = sum(path.stat().st_size for path in (tmp_path / "study").glob("*/*/checkpoints/*/state.safetensors"))
    assert 0 < checkpoints <= plan.disk["checkpoints"] + 2000 * plan.runs * small_study.ROUNDS


def test_the_plan_adds_up_and_measured_what_it_says(config: Path) -> None:
    plan = preview.plan_study(load_config(config))
    assert plan.speeds.trained > 0
    assert (plan.speeds.scored or 0) > 0
    assert (plan.speeds.answer or 0) > 0
    whole = plan.prepare_seconds + plan.start_seconds + sum(plan.run_seconds.values())
    assert plan.total_seconds == pytest.approx(whole)
    assert 0 < plan.prepare_seconds < plan.total_seconds
    assert plan.cpu_seconds >= plan.speeds.cpu * (plan.total_seconds - plan.prepare_seconds) > 0
    assert plan.runs == 3
    shares = [plan.work[label].trained for label in ("local", "fedavg", "mira")]
    assert shares[0] == shares[1] == shares[2]
    assert plan.work["fedavg"].scored > plan.work["local"].scored  # a shared model changes everybody's loss


@pytest.mark.slow
def test_the_plan_counts_rows_where_they_will_lie(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round of 3 of 6 clients: 3 rows and 2 x 3 moments; fedavg's own are one row and as many moments."""

    def plan(**changes: Any) -> preview.Plan:
        raw = small_study.settings(*inputs, tmp_path / "study", federation={"rounds": 1}, **changes)
        return preview.plan_study(check_config(raw))

    kept = {"training": {"keep_optimizer": True}}
    row = plan().memory["rows"] // 3
    assert row > 4 * plan().parameters - 1
    assert plan(**kept).memory["rows"] == 9 * row
    assert plan(**kept).disk["rows"] == 0
    copied = plan().disk["adapters"]
    assert copied == 3 * 6 * 4 * plan().parameters
    monkeypatch.setattr(table, "RAM_BYTES", row)
    monkeypatch.setattr(handover, "LINK_BYTES", 0)
    large = plan(**kept, methods=[{"name": "fedavg"}])
    assert (large.memory["rows"], large.disk["rows"]) == (row, 6 * row)  # its one row stays in memory
    assert large.disk["adapters"] == 4 * plan().parameters  # one file for all
    large = plan(**kept)
    assert (large.memory["rows"], large.disk["rows"]) == (row, 9 * row)
    assert large.disk["adapters"] == (4 + 1 + 4) * 4 * plan().parameters  # one for those never drawn
    assert large.disk["checkpoints"] == preview.COPIES * (9 + 7 + 9) * row


def test_a_dry_run_prints_the_plan_and_writes_nothing(config: Path, tmp_path: Path) -> None:
    ended = command("run", config, "--dry-run")
    assert ended.code == 0, ended.err
    words = ("clients", "tokens", "truncation", "in one pass", "memory", "disk", "per round", "about", "tokens/s")
    for word in (*words, "CPU time", "assumed"):
        assert word in ended.out, word
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_plans_table_stays_aligned_under_wide_names(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = preview.plan_study(load_config(str(config)))
    names = dict(
        zip(
            plan.names,
            ["東京大学病院", "🏥 Nord", "中" * 60, "Praxis", *map(str, range(len(plan.names)))],
            strict=False,
        )
    )
    show_plan(replace(plan, names=names), False)
    header, *lines = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
    assert len(lines) == len(plan.names)
    assert {cell_len(line) for line in lines} == {len(header)}


def test_a_dry_run_in_json_is_the_plan(config: Path) -> None:
    ended = command("run", config, "--dry-run", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["clients"] == len(CLIENTS)


def test_a_dry_run_refuses_what_a_run_refuses(config: Path, tmp_path: Path) -> None:
    (tmp_path / "study").write_text("mine")
    for overrides in (["lora.r=0"], [], ["data.path=none.jsonl", f"output_dir={tmp_path / 'other'}"]):
        ended = command("run", config, "--dry-run", *overrides)
        assert (ended.code, ended.out) == (2, "")
        assert not has_traceback(ended.err)


def test_a_dry_run_writes_nothing_so_a_folder_that_is_taken_is_only_a_warning(config: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("mine")
    ended = command("run", config, "--dry-run")
    assert ended.code == 0
    assert "warning: output_dir" in ended.err
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["thesis.tex"]


# ---------------------------------------------------------------- what the model gets


def test_one_example_of_every_client_is_shown_with_what_is_trained_on(config: Path, tmp_path: Path) -> None:
    ended = command("run", config, "--show-example")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.out.splitlines() if line.startswith("--- ")]
    assert [line.split()[1].rstrip(":") for line in lines] == list(CLIENTS)
    assert ended.out.count("[[ w") == len(CLIENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_shown_pieces_are_the_whole_example(config: Path) -> None:
    shown = json.loads(command("run", config, "--show-example", "--json").out)
    for one in shown:
        texts = [text for text, _ in one["pieces"]]
        assert [trained for _, trained in one["pieces"]] == [False, True]
        assert len(texts[0].split()) == 4  # of the prompt
        assert len(texts[1].split()) == one["labels"] == one["tokens"] - 4  # two words and the end


# ---------------------------------------------------------------- a first config


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{field.alias or name}"


def flat(raw: Any, prefix: str = "") -> Iterator[str]:
    for key, value in raw.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_init_writes_every_key_and_the_file_runs_as_it_is(tmp_path: Path) -> None:
    ended = command("init", "mine.yaml", folder=tmp_path)
    assert ended.code == 0, ended.err
    raw = read_config(tmp_path / "mine.yaml")
    missing = set(keys(Config)) - set(flat(raw)) - {"training.local_steps"}  # the other of two
    assert missing == set()
    assert "local_steps" in (tmp_path / "mine.yaml").read_text()
    short = ("federation.rounds=1", "training.local_epochs=null", "training.local_steps=1", "data.clients.first=4")
    ended = command("run", "mine.yaml", *short, "-q", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_the_comments_of_init_name_every_choice(tmp_path: Path) -> None:
    command("init", folder=tmp_path)
    text = (tmp_path / "fedmira.yaml").read_text()
    schedules = ("constant_with_warmup", "cosine_with_min_lr", "min_lr_rate", "rounds", "warmup_ratio")
    for name in (
        *PARTITIONERS,
        *schedules,
        "auto",
        "sharegpt",
        "bfloat16",
        "skip",
        "exact_match",
        "symmetric",
        "stored",
    ):
        assert name in text, name


def test_init_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "fedmira.yaml").write_text("mine")
    ended = command("init", folder=tmp_path)
    assert ended.code == 2
    assert "exists already" in ended.err
    assert (tmp_path / "fedmira.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("rows", "clients"),
    [
        ([{"instruction": "a", "output": "b", "site": "x"}], {"by": "site"}),
        ([{"instruction": "a", "output": "b"}] * 80, {"partitioner": {"name": "iid", "num_partitions": 4}}),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "task": "t"}],
            {"by": "task"},
        ),
    ],
)
def test_init_looks_at_the_data_to_fill_in_format_and_clients(
    rows: list[dict[str, object]], clients: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = command("init", "mine.yaml", "--data", "my rows.jsonl", "--model", "org/base", "--json", folder=tmp_path)
    assert ended.code == 0, ended.err
    made = check_config(read_config(tmp_path / "mine.yaml"))
    assert made.data.path == "my rows.jsonl"
    assert made.model.base_model == "org/base"
    assert made.data.format == json.loads(ended.out)["format"] == ("messages" if "messages" in rows[0] else "alpaca")
    found = made.data.clients.model_dump()
    assert {
        key: {k: found[key][k] for k in value} if isinstance(value, dict) else found[key]
        for key, value in clients.items()
    } == clients


def test_init_refuses_data_that_cannot_be_read_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for arguments in (["--data", "none.jsonl"], ["none/mine.yaml"]):
        ended = command("init", *arguments, folder=tmp_path)
        assert ended.code == 2
        assert not has_traceback(ended.err)
    assert list(tmp_path.iterdir()) == []


def test_the_template_of_init_is_plain_yaml_too() -> None:
    text = (Path(bundled.__file__).parent / "init.yaml").read_text()
    for word in ("MODEL", "DATA", "FORMAT", "LENGTH", "SPLIT", "BY", "NAME", "FILE"):
        text = text.replace(f"@{word}@", "x")
    assert "@" not in text
    assert set(yaml.safe_load(text)) == set(Config.model_fields)


# ---------------------------------------------------------------- the machine


def test_the_doctor_tells_versions_device_memory_and_disk_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    monkeypatch.setattr(doctor, "SIDE", 256)  # larger products of bfloat16 take seconds on many CPUs
    ended = command("doctor")
    assert (ended.code, ended.err) == (0, "")
    for word in ("python", "torch", "transformers", "peft", "device", "memory", "disk", "GFLOP/s", "cores"):
        assert word in ended.out, word
    as_json = command("doctor", "--json").out
    facts = json.loads(as_json)
    assert facts["versions"]["fedmira"] == importlib.metadata.version("fedmira")
    assert facts["disk_free_bytes"] > 0
    assert "hf_secret" not in ended.out + as_json


# ---------------------------------------------------------------- a large base


def test_work_of_a_text_grows_with_its_attention() -> None:
    measure = probe._Measure(turn=100.0)
    assert measure.work(100) == 200  # as much for attention as for the weights
    assert measure.tokens(measure.work(64)) == 64
    assert probe._Measure(float("inf")).work(100) == 100
    texts = [Encoded(tuple(range(80)), 4, ()), Encoded(tuple(range(200)), 150, ())]
    assert measure.fitting(texts, measure.work(80) + 1) == texts[:1]
    assert measure.fitting(texts, 10_000) == texts
    (short,) = measure.fitting(texts[1:], measure.work(100))
    assert (len(short.ids), short.labels) == (100, 1)  # its beginning, and something to predict


def test_with_a_large_base_passes_are_few_and_short(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every pass took seconds: fewer clients and examples than in a step, and two passes to count memory."""
    usual = preview.plan_study(load_config(config))
    tokens: list[int] = []
    steps = probe.local_phase

    def noted(*arguments: Any, **options: Any) -> Any:
        done = steps(*arguments, **options)
        tokens.append(done.tokens)
        return done

    for module in (cost, probe):
        monkeypatch.setattr(module, "LONG_S", 0.0)
        monkeypatch.setattr(module, "PROBE", 3)
    monkeypatch.setattr(probe, "TRAIN_S", 1e-9)
    monkeypatch.setattr(probe, "local_phase", noted)
    plan = preview.plan_study(load_config(config))
    assert tokens == [3, 3]  # of the probe, and of what is measured
    assert plan.speeds.trained > 0
    assert (plan.speeds.scored or 0) > 0
    assert (plan.speeds.answer or 0) > 0
    assert plan.memory["cohort"] == pytest.approx(usual.memory["cohort"], rel=0.2)  # from 3 and 6 tokens
    assert plan.work == usual.work
