"""Studies of any size, written by the project's own folders; the figures are drawn, not trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tests.run_facts import run_facts

import fedmira
from fedmira.disk.files import write_json
from fedmira.disk.folders import Result, RoundRecord, RunFolder, StudyFolder
from fedmira.disk.run_facts import State
from fedmira.graphs.graph import Graph

LEVELS = {"local": 0.62, "fedavg": 0.45, "mira": 0.70}  # mean final score


def make_study(
    path: Path,
    clients: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    rounds: int = 6,
    sampled: int = 4,
    graph: Graph | None = None,
    methods: Sequence[str] = ("local", "fedavg", "mira"),
    state: State = "complete",
) -> Path:
    """Write a study: loss and word accuracy of every client, a schedule, merges, and mira's graph."""
    folder = StudyFolder(path)
    folder.create(fedmira.load_config("demo", [f"output_dir={path}", f"federation.rounds={rounds}"]))
    table = {
        client: {
            "folder": client,
            "name": client,
            "group": None if groups is None else groups[place],
            "rank": 8,
            "examples": {"train": 10 + place % 5, "validation": 2, "test": 3},
            "trained_tokens": 40,
            "prompts_cut": 1 if place % 7 == 0 else 0,
        }
        for place, client in enumerate(clients)
    }
    for label in methods:
        run = folder.run(label, 0)
        facts = run_facts(
            method=label,
            label=label,
            seed=0,
            rounds=rounds,
            clients=len(clients),
            sampled=sampled,
            personal=label != "fedavg",
        )
        run.create(folder.config(), facts, table)
        if label == "mira" and graph is not None:
            _write_graph(run, graph, clients)
        _write_rounds(run, label, clients, rounds=rounds, sampled=sampled)
        run.update(replace(facts, state=state))
    return path


def _write_graph(run: RunFolder, graph: Graph, clients: Sequence[str]) -> None:
    whole = graph.weights.tocoo()
    edges = [
        [int(row), int(column), float(weight)]
        for row, column, weight in zip(whole.row, whole.col, whole.data, strict=True)
    ]
    written = {"kind": graph.kind, "note": graph.note, "clients": list(clients), "entries": whole.nnz, "edges": edges}
    write_json(run.path / "graph.json", written)


def _write_rounds(run: RunFolder, label: str, clients: Sequence[str], *, rounds: int, sampled: int) -> None:
    view = "global" if label == "fedavg" else "personal"
    schedule = np.random.default_rng(1)  # one for all methods
    draw = np.random.default_rng([2, len(label)])
    loss = np.full(len(clients), 4.0)
    run.append(None, [Result(client, 0, view, "validation", "loss", 4.0) for client in clients])
    run.append(None, [Result(client, 0, view, "test", "word_accuracy", 0.01) for client in clients])
    for turn in range(1, rounds + 1):
        chosen = np.sort(schedule.choice(len(clients), size=sampled, replace=False))
        before = loss[chosen] * draw.uniform(0.7, 0.9, sampled)
        moved = {"local": 0.0, "fedavg": 0.3}.get(label, float(draw.normal(-0.05, 0.1)))
        loss[chosen] = np.maximum(before + moved, 0.01)
        names = [clients[place] for place in chosen]
        record = RoundRecord(
            round=turn,
            clients=names,
            answered=names,
            train_loss=before.tolist(),
            steps=[5] * sampled,
            loss_before=before.tolist(),
            loss_after=loss[chosen].tolist(),
            validation_loss=float(loss.mean()),
            bytes_up=1000 * sampled,
            bytes_down=1000 * sampled,
            seconds_training=0.5,
            seconds_merge=0.01,
            seconds=0.75,
            tokens=100 * sampled,
        )
        results = [
            Result(client, turn, view, "validation", "loss", float(value))
            for client, value in zip(clients, loss, strict=True)
        ]
        run.append(record, results)
    scores = np.clip(draw.normal(LEVELS[label], 0.08, len(clients)), 0, 1)
    run.append(None, [Result(c, rounds, view, "test", "loss", float(v)) for c, v in zip(clients, loss, strict=True)])
    run.append(
        None, [Result(c, rounds, view, "test", "word_accuracy", float(v)) for c, v in zip(clients, scores, strict=True)]
    )
