"""What comparisons found, kept in one JSON file for each setting: methods and seeds are added run by run.

The studies themselves may be deleted: what is kept is not measured again, and every figure of a page, its tests of
significance too, is computed from this file. Values are of each client, in the order of `clients`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe

from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.engine.events import Event
from fedmira.reports.record import read_object
from fedmira.reports.results import Results, Row, read_results
from fedmira.reports.stats import client_values, curve
from fedmira.study.compare import TUNING_FILE, compare
from fedmira.study.events import RunBegun
from fedmira.study.loading import load_compared

Kept = dict[str, Any]
SETTING = ("base", "dtype", "clients", "sampled", "rounds", "metrics", "training", "budget")
TRAINING = ("local_steps", "local_epochs", "batch_size", "optimizer", "learning_rate")
DIGITS = 7  # float32 has no more


def read(path: Path) -> Kept:
    """Return what is kept; nothing yet: no methods."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"methods": {}}


def is_kept(kept: Mapping[str, Any], label: str, seeds: Sequence[int]) -> bool:
    """Are all of these runs of a method there?"""
    runs = kept["methods"].get(label, {}).get("runs", {})
    return all(str(seed) in runs for seed in seeds)


def tell(event: Event) -> None:
    """Say which run has begun."""
    if isinstance(event, RunBegun):
        print(f"{event.facts.label}, seed {event.facts.seed}", flush=True)


def measure(
    config: Path, words: Sequence[str], label: str, *, seeds: Sequence[int], budget: int, folder: Path, path: Path
) -> None:
    """Compare one method of a config with training alone, and keep its runs; nothing is done where they are kept."""
    if is_kept(read(path), label, seeds) and is_kept(read(path), "local", seeds):
        return
    overrides = [*words, f"output_dir={folder}", f"seeds={list(seeds)}"]
    compared = load_compared(config, overrides, methods=[label], seeds=None, budget=budget)
    study = compare(compared, budget=budget, observer=tell)
    keep(study, path, labels=["local", label], seeds=seeds, budget=budget)


def keep(study: Path, path: Path, *, labels: Sequence[str], seeds: Sequence[int], budget: int) -> None:
    """Add the runs of a comparison to what is kept.

    A method whose settings have changed, by its tuning too, loses its earlier runs. Raises SystemExit if what is there
    was measured in another setting.
    """
    kept, folder, results = read(path), StudyFolder(study), read_results(study)
    runs = {(run.facts.label, run.facts.seed): run for run in folder.runs()}
    some = next(iter(runs.values()))
    config, facts = folder.config(), read_object(some.path / "clients.json")
    metrics = list(dict.fromkeys(("loss", *config.evaluation.metrics)))
    setting = {
        "base": Path(config.model.base_model).name,
        "dtype": some.facts.dtype,
        "clients": results.clients,
        "groups": [facts[client].get("group") for client in results.clients],
        "examples": [facts[client]["examples"]["train"] for client in results.clients],
        "sampled": some.facts.sampled,
        "rounds": config.federation.rounds,
        "metrics": metrics,
        "training": {key: getattr(config.training, key) for key in TRAINING},
        "budget": budget,
    }
    if changed := [key for key in SETTING if kept.get(key, setting[key]) != setting[key]]:
        raise SystemExit(
            f"{path} is of another setting ({', '.join(changed)}): move it away to measure everything anew"
        )
    tuning = study.parent / TUNING_FILE
    tried = json.loads(tuning.read_text(encoding="utf-8"))["methods"] if tuning.is_file() else {}
    for label in dict.fromkeys(labels):
        first = runs[label, seeds[0]].facts
        entry: Kept = {
            "method": first.method,
            "settings": dict(first.settings),
            "learning_rate": None if first.training is None else first.training["learning_rate"],
            "view": "personal" if first.personal else "global",
            "parameters": first.parameters,
        }
        earlier = kept["methods"].get(label, {})
        same = all(earlier.get(key) == value for key, value in entry.items())
        entry["tried"] = tried.get(label, {}).get("tried") or earlier.get("tried", [])
        entry["runs"] = dict(earlier.get("runs", {})) if same else {}
        for seed in seeds:
            of_seed = results.where(lambda row, seed=seed: row.seed == seed)  # type: ignore[misc]
            values: dict[str, list[float | None]] = {
                metric: [rounded(one) for one in client_values(of_seed, metric=metric)[label].values()]
                for metric in metrics
            }
            curves = (
                {"curves": curves_of(runs[label, seed], of_seed)}
                if config.evaluation.every < config.federation.rounds
                else {}
            )
            entry["runs"][str(seed)] = {**costs(runs[label, seed], results.clients), **curves, **values}
        kept["methods"][label] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**setting, "methods": kept["methods"]}, indent=1)
    path.write_text(flattened(text) + "\n", encoding="utf-8")


def costs(run: RunFolder, clients: Sequence[str]) -> Kept:
    """Return what a run took, and on what machine; bytes_up and _down: of a client in a round, the least and most.

    never: places of the clients that no round sampled, if there are any.
    """
    records, where = run.records(), describe()
    seen = {client for record in records for client in record["clients"]}
    never = [place for place, client in enumerate(clients) if client not in seen]
    sent = {key: [record[key] // len(record["clients"]) for record in records] for key in ("bytes_up", "bytes_down")}
    return {
        "machine": {key: where[key] for key in ("cpu", "cores", "threads", "commit", "date")},
        **{key: [min(values), max(values)] for key, values in sent.items()},
        "bytes": sum(record["bytes_up"] + record["bytes_down"] for record in records),
        "seconds": round(run.facts.seconds or 0.0, 1),
        "tokens": sum(record["tokens"] for record in records),
        "scored": sum(record.get("scored", 0) for record in records),
        **({"never": never} if never and records else {}),
        **({} if run.facts.privacy is None else {"epsilon": run.facts.privacy["epsilon"]}),
        **({"choices": choices(run)} if run.facts.figures is not None and "alpha" in run.facts.figures else {}),
    }


def curves_of(run: RunFolder, results: Results) -> Kept:
    """Return [round, loss] of a run: `train` of its sampled clients, `validation` of all, where it was scored."""
    label = run.facts.label
    train = [(record["round"], math.fsum(record["train_loss"]) / len(record["train_loss"])) for record in run.records()]
    validation = curve(results).get(label, [])
    return {
        name: [[turn, rounded(loss)] for turn, loss in points]
        for name, points in (("train", train), ("validation", validation))
    }


def choices(run: RunFolder) -> list[list[float]]:
    """Return by round, the last choice last: clients that chose, the sum of their alphas, that of graph 0 alone."""
    assert run.facts.figures is not None
    lines = []
    for figures in [*(record["figures"] for record in run.records()), run.facts.figures]:
        pairs = [
            (alpha, graph) for alpha, graph in zip(figures["alpha"], figures["graph"], strict=True) if alpha is not None
        ]
        lines.append([len(pairs), sum(alpha for alpha, _ in pairs), sum(alpha for alpha, graph in pairs if graph == 0)])
    return [[float(f"{one:.{DIGITS}g}") for one in line] for line in lines]


def rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")


def flattened(text: str) -> str:
    """Write a list of plain values on one line: a value of each of many clients would be a line each."""
    return re.sub(
        r"\[[^][{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text
    )


def results_of(kept: Mapping[str, Any], seeds: Sequence[int] | None = None) -> Results:
    """Return the test results of all runs that are kept, or of these seeds, as a study's results.csv has them."""
    rows = []
    for label, entry in kept["methods"].items():
        for seed, run in entry["runs"].items():
            if seeds is not None and int(seed) not in seeds:
                continue
            for metric in kept["metrics"]:
                for client, value in zip(kept["clients"], run[metric], strict=True):
                    number = math.nan if value is None else float(value)
                    place = (client, label, int(seed), kept["rounds"], entry["view"], "test", metric)
                    rows.append(Row(*place, number))
    return Results(rows)
