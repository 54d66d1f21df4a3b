"""Adapters of methods that add to the base, from a study: merged, and talked to, they are what the run had."""

import csv
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import small_study
from tests.small_study import command
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedmira
from fedmira.cli.chat import open_chat
from fedmira.data.batches import Encoded
from fedmira.engine.events import silent
from fedmira.export.merged_model import TOLERANCES
from fedmira.study import face
from fedmira.study.assemble import prepare
from fedmira.study.face import Run

METHODS = ("fedex_lora", "flora")
QUESTION, NEW = "w3 w5 w9 w4", 6


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    base, data = small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")
    methods = [{"name": name} for name in METHODS]
    training = {"local_steps": 4, "batch_size": 2, "learning_rate": 0.3}  # so that answers change
    raw = small_study.settings(base, data, folder / "study", methods=methods, training=training)
    ended = command("run", small_study.save_config(folder / "config.yaml", raw), "-q")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(params=[METHODS[0], pytest.param(METHODS[1], marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, here: Path) -> Run:
    return fedmira.load_run(here / "study" / request.param / "seed-3")


def by_peft(here: Path, run: Run, client: str) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "base"), str(run.adapters(client)))


def loss_of(model: Any, examples: Sequence[Encoded]) -> float:
    """Mean nats per token of the answers."""
    total, tokens = 0.0, 0
    for example in examples:
        first, ids = example.prompt_length, torch.tensor(example.ids)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum"))
        tokens += len(ids) - first
    return total / tokens


def test_peft_gives_the_losses_of_the_run(here: Path, run: Run) -> None:
    clients = prepare(fedmira.load_config(here / "config.yaml"), silent).workplace.clients
    with (run.path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["split"], row["metric"]) == ("test", "loss")]
    found = {row["client"]: float(row["value"]) for row in rows if row["round"] == str(small_study.ROUNDS)}
    plain = {row["client"]: float(row["value"]) for row in rows if row["round"] == "0"}
    for client in clients:
        loss = loss_of(by_peft(here, run, client.id), client.test)
        assert loss == pytest.approx(found[client.id], rel=1e-5)
        assert not math.isclose(loss, plain[client.id], rel_tol=1e-3)


def test_a_merged_model_has_the_logits_of_the_exported_folder(here: Path, run: Run, tmp_path: Path) -> None:
    (made,) = face.merge(run, client="ada", out=tmp_path)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        expected = by_peft(here, run, "ada").eval()(input_ids=ids).logits.double()
        whole = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()(input_ids=ids).logits
    assert float((whole.double() - expected).abs().max() / expected.abs().max()) < TOLERANCES["float32"]
    assert made.effect > 1e-2


def test_chat_answers_as_peft_does(here: Path, run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    model = by_peft(here, run, "ada").eval()
    answers = {}
    for name, one in (("base", model.get_base_model()), ("ada", model)):
        with model.disable_adapter() if name == "base" else nullcontext():
            written = one.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )
        answers[name] = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert open_chat(run.path, client="ada", folders=[], max_new_tokens=NEW).ask(QUESTION) == answers
    assert answers["ada"] != answers["base"]
