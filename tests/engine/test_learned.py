"""A graph that is learned while a run goes on: it is durable, it is reported, and the data can tell one in advance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests import tiny
from tests.engine.house import RANKS, House, Ran, base, house, run

from fedmira.data.batches import ClientData
from fedmira.disk.folders import RunFolder
from fedmira.errors import MethodError
from fedmira.evaluation.embed import embed_prompts
from fedmira.methods import build
from fedmira.study.assemble import count_values

SETTINGS: dict[str, Any] = {"lambda": 0.3, "neighbours": "stored", "graph": {"kind": "learned", "degree": 2}}


def go(of: House, path: Path, settings: dict[str, Any], *, rounds: int) -> Ran:
    return run(of, build("mira", settings, of.cohort()), path, rounds=rounds)


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "space": "product"}, {**SETTINGS, "solver": "exact"}])
@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_was_stopped_learns_the_same_graph_and_rows(
    tmp_path: Path, settings: dict[str, Any], after: int
) -> None:
    some = house()
    whole = go(some, tmp_path / "whole", settings, rounds=3)
    go(some, tmp_path / "parts", settings, rounds=after)
    parts = go(some, tmp_path / "parts", settings, rounds=3)
    everyone = torch.arange(len(some))
    assert torch.equal(parts.serve(everyone).rows, whole.serve(everyone).rows)
    assert parts.ended.graph is not None
    assert whole.ended.graph is not None
    assert parts.ended.graph.fingerprint == whole.ended.graph.fingerprint


def test_the_learned_graph_joins_those_that_took_part_and_nobody_else(tmp_path: Path) -> None:
    some = house()
    found = go(some, tmp_path / "run", SETTINGS, rounds=3).ended.graph
    assert found is not None
    dense = found.weights.toarray()
    assert dense[:3, :3].any()
    assert not dense[3].any()  # client 3 was never sampled
    records = RunFolder(tmp_path / "run").records()
    assert [record["notes"]["learned_pairs"] for record in records] == sorted(
        record["notes"]["learned_pairs"] for record in records
    )


def test_a_round_writes_the_sketches_of_its_own_clients_only(tmp_path: Path) -> None:
    """A delta holds two clients' tables, whatever the number of clients."""
    own = [tiny.client(f"c{k}", train=2) for k in range(40)]
    many = house(clients=own, ranks=RANKS * 10)
    go(many, tmp_path / "run", SETTINGS, rounds=3)
    with safe_open(tmp_path / "run/checkpoints/round-000003/state.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    assert shapes["table.sketch"][0] == shapes["table.seen"][0] == shapes["rows"][0]
    assert shapes["rows"][0] <= 3


def test_prompts_alike_are_embedded_alike_whoever_shares_the_pass() -> None:
    one, other = tiny.client("one", train=5, seed=1), tiny.client("other", train=3, seed=2)
    together = embed_prompts(base(), [one, other, replace(one, id="again")])
    np.testing.assert_allclose(together[0], together[2])
    np.testing.assert_allclose(together[:1], embed_prompts(base(), [one]), rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2
    unanswered = [replace(e, ids=(*e.ids[: e.prompt_length], *reversed(e.ids[e.prompt_length :]))) for e in one.train]
    turned = replace(one, train=tuple(unanswered))
    np.testing.assert_allclose(embed_prompts(base(), [turned]), together[:1], rtol=1e-4, atol=1e-5)  # answers unseen


def test_the_vector_of_a_client_is_the_mean_over_its_prompts_however_many_they_are() -> None:
    one, other = tiny.client("one", train=1, seed=1), tiny.client("other", train=1, seed=2)
    once, both, thrice = (replace(one, train=train) for train in (one.train, one.train + other.train, one.train * 3))
    found = embed_prompts(base(), [once, both, thrice, other])
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], (found[0] + found[3]) / 2, rtol=1e-5, atol=1e-6)


def test_values_of_a_column_are_counted_as_shares() -> None:
    def client(**counts: int) -> ClientData:
        return replace(tiny.client("c", train=1), counts={"topic": counts})

    found = count_values([one.counts for one in (client(a=1, b=3), client(b=2), client())], "topic")
    np.testing.assert_allclose(found, [[0.25, 0.75], [0, 1], [0, 0]])
    with pytest.raises(MethodError, match=r"'topics'.*did you mean 'topic'"):
        count_values([client(a=1).counts], "topics")
