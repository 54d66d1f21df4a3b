"""Pairs that a merge adds to the base: exact, durable, counted, caught up with, refused where they do not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests import tiny
from tests.engine.house import House, house, run
from tests.laws.worlds import WORLDS
from tests.parity.pairing import stacked_logits
from torch import Tensor

from fedmira.adapters import Pairs
from fedmira.adapters.added import BaseVersions, fold
from fedmira.data.batches import collate
from fedmira.engine.ledger import Ledger, restore
from fedmira.engine.round import message_of, play
from fedmira.engine.simulated import Simulated
from fedmira.errors import ShapeError, WireError
from fedmira.export.peft_folder import export_adapter
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Message, Method, State


def alike() -> House:
    """Clients of one rank, for whom FedEx-LoRA is exact."""
    return house(ranks=(2, 2, 2, 2))


def fedex() -> Method:
    return build("fedex_lora", {}, alike().cohort())


def opened(of: House, method: Method, folder: Path) -> Ledger:
    """What is durable, as a fresh process reads it."""
    state = of.federation.first_state(3, method)
    ledger = Ledger(of.federation, state, torch.zeros(len(of), dtype=torch.float64))
    restore(folder / "checkpoints", ledger, Simulated(of.workplace, of.federation, method, of.training))
    return ledger


@pytest.mark.parametrize("kind", WORLDS)
def test_base_and_shared_factors_are_the_mean_of_the_products(kind: str) -> None:
    world = WORLDS[kind]()
    method, ids = fedex(), torch.tensor([0, 2, 3])  # all of rank 2
    scene = world.start(method)
    played = play(method, scene.ledger, scene.clients, ids, scene.clock)
    shares = world.weights(ids) / world.weights(ids).sum()
    uploads = world.adapters(ids, played.uploads.rows)
    shared = scene.ledger.state.adapters.take(torch.zeros(1, dtype=torch.int64), rows=played.change.rows)
    assert played.change.base is not None
    for leaf in world.layout.parts[0].leaves[::2]:
        wanted = torch.einsum("k,koi->oi", shares, uploads.product(leaf.module))
        a, b = played.change.base[leaf.module]
        torch.testing.assert_close(shared.product(leaf.module)[0] + b @ a, wanted, rtol=1e-10, atol=1e-12)
        assert float((b @ a).norm()) > 1e-6 * float(wanted.norm())


def test_a_run_that_was_stopped_has_the_same_base_and_rows(tmp_path: Path) -> None:
    of, everyone = alike(), torch.arange(4)
    whole = run(of, fedex(), tmp_path / "whole")
    run(of, fedex(), tmp_path / "parts", rounds=2)
    parts = run(of, fedex(), tmp_path / "parts")
    mine, theirs = parts.serve(everyone), whole.serve(everyone)
    assert torch.equal(mine.rows, theirs.rows)
    assert mine.added.keys() == theirs.added.keys() == {name for name, _, _ in of.workplace.base.shapes}
    assert all(
        torch.equal(a, b) for name in mine.added for a, b in zip(mine.added[name], theirs.added[name], strict=True)
    )
    assert parts.results == whole.results
    without = [{key: value for key, value in record.items() if "seconds" not in key} for record in parts.records]
    assert without == [
        {key: value for key, value in record.items() if "seconds" not in key} for record in whole.records
    ]


def test_a_checkpoint_holds_the_new_version_alone_where_that_is_less(tmp_path: Path) -> None:
    """As much as all versions together would be written again in every round otherwise."""
    run(alike(), fedex(), tmp_path / "run")
    sizes = {}
    for manifest in sorted((tmp_path / "run" / "checkpoints").glob("*/manifest.json")):
        facts = json.loads(manifest.read_bytes())
        names = load_file(manifest.parent / "base.safetensors")
        sizes[facts["round"]] = facts["full"], {name.split(".")[0] for name in names}
    assert sizes[2] == (True, {"1", "2"})
    assert sizes[3] == (False, {"3"})


def test_a_merge_that_adds_nothing_is_no_version(tmp_path: Path) -> None:
    of = alike()
    method = replace(fedex(), merge=lambda *given: replace(fedex().merge(*given), base={}))
    run(of, method, tmp_path / "run", rounds=2)
    assert opened(of, method, tmp_path / "run").state.base == ()


def test_a_damaged_change_of_the_base_leads_back_to_the_round_before(tmp_path: Path) -> None:
    of = alike()
    run(of, fedex(), tmp_path / "run")
    ledger = opened(of, fedex(), tmp_path / "run")
    assert (ledger.round, len(ledger.state.base), ledger.known.tolist()) == (3, 3, [2, 2, 1, 0])
    newest = tmp_path / "run" / "checkpoints" / "round-000003" / "base.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    ledger = opened(of, fedex(), tmp_path / "run")
    assert (ledger.round, len(ledger.state.base), ledger.known.tolist()) == (2, 2, [0, 1, 1, 0])
    again = run(of, fedex(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert torch.equal(again.rows, run(of, fedex(), tmp_path / "run").rows)


def test_each_client_pays_for_the_versions_that_it_does_not_have(tmp_path: Path) -> None:
    """Rounds of (0, 1), (1, 2), (0, 1): 0 then misses two, 1 one; of two uploads a version has rank 2, one less."""
    of = alike()
    plain = run(of, replace(fedex(), merge=lambda *given: replace(fedex().merge(*given), base=None)), tmp_path / "a")
    added = run(of, fedex(), tmp_path / "b")
    version = sum(4 * 2 * (inputs + outputs) for _, inputs, outputs in of.workplace.base.shapes)
    more = [
        mine["bytes_down"] - theirs["bytes_down"] for mine, theirs in zip(added.records, plain.records, strict=True)
    ]
    assert more == [0, version * (1 + 1), version * (2 + 1)]
    assert [record["bytes_up"] for record in added.records] == [record["bytes_up"] for record in plain.records]


def test_a_client_that_misses_a_version_is_sent_it_and_one_with_a_gap_refuses(tmp_path: Path) -> None:
    of = alike()
    run(of, fedex(), tmp_path / "run")
    ledger = opened(of, fedex(), tmp_path / "run")
    message = message_of(fedex(), ledger, ledger.state, torch.arange(4), Clock(4))
    sent = [message.take(slice(k, k + 1)).base for k in range(4)]
    assert [len(base.pairs) for base in sent if base is not None] == [1, 1, 2, 3]
    newest = sent[0]
    assert newest is not None
    caught_up = newest.after(ledger.state.base[:2])
    assert all(mine is theirs for mine, theirs in zip(caught_up, ledger.state.base, strict=True))
    with pytest.raises(WireError, match="changes of the base from 3 on, and 1 are known here"):
        newest.after(ledger.state.base[:1])


@pytest.mark.parametrize(("name", "added"), [("fedex_lora", 3 * 2), ("flora", 3 * 2 * 2)])
def test_an_exported_adapter_gives_on_the_untouched_base_what_the_run_had(
    name: str, added: int, tmp_path: Path
) -> None:
    """One PEFT folder with the sum of both ranks, against the adapter over the changed base."""
    of = alike()
    served = run(of, build(name, {}, of.cohort()), tmp_path / "run").serve(torch.tensor([1]))
    base = of.workplace.base
    export_adapter(
        tmp_path / "adapter",
        fold(served),
        base_model="tiny",
        target_modules=[name for name, _, _ in base.shapes],
        fan_in_fan_out=base.transposed,
        card={"client": "c1"},
    )
    texts = [of.clients[1].test]
    batch = collate(texts, pad_id=base.pad_id)
    logits = stacked_logits(base, served, batch)
    plain = stacked_logits(base, replace(served, added={}), batch)
    model = PeftModel.from_pretrained(tiny.model("gpt2", dtype=torch.float32), str(tmp_path / "adapter")).eval()
    assert model.peft_config["default"].r == 2 + added
    for place, text in enumerate(texts[0]):
        expected = model(input_ids=torch.tensor([text.ids])).logits[0].detach()
        torch.testing.assert_close(logits[0, place, : len(text.ids)], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain[0, place, : len(text.ids)], expected, rtol=1e-5, atol=1e-6)


def pair(outputs: int, inputs: int, *, rank: int = 1) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, inputs), torch.ones(outputs, rank)


@pytest.mark.parametrize(
    ("pairs", "error", "words"),
    [
        ({"transformer.h.9": pair(48, 16)}, ShapeError, "pairs are for adapted modules: transformer.h.0.attn.c_attn"),
        ({"transformer.h.0.attn.c_attn": pair(16, 48)}, ShapeError, r"need \[q, 16\] and \[48, q\]"),
        ({"transformer.h.0.attn.c_attn": pair(48, 16, rank=0)}, ShapeError, "with q >= 1"),
        (
            {"transformer.h.0.attn.c_attn": (torch.full((1, 16), torch.nan), torch.ones(48, 1))},
            WireError,
            "are not finite; nothing was replaced",
        ),
    ],
)
def test_pairs_that_do_not_fit_the_base_are_refused_before_anything_is_written(
    tmp_path: Path, pairs: Pairs, error: type[Exception], words: str
) -> None:
    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        return replace(fedex().merge(state, ids, returned, weights, clock), base=pairs)

    with pytest.raises(error, match=words):
        run(alike(), replace(fedex(), merge=merge), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*/manifest.json"))


def test_nobody_is_sent_anything_where_all_is_known() -> None:
    pairs: Pairs = {"m": pair(2, 3)}
    base = BaseVersions((pairs, pairs), torch.tensor([2, 0]))
    assert base.take(slice(0, 1)).pairs == ()
    assert (base.bytes_missing, base.take(slice(0, 1)).bytes_missing) == ([0, 2 * 4 * 5], [0])
