"""Clients that come when a study is over: how good is what they start with, before and after their own steps?

    python benchmarks/questions/newcomers.py [--seeds 3] [--only-page] [--folder FOLDER] [--page FILE] [--json FILE]

The setting of ni.yaml, with two clients for each of its 8 tasks; a third one of each task comes after the last round,
with other instances, by `fedmira adapt`. Scores are kept in benchmarks/results/newcomers.json as they come. Writes
docs/results/newcomers.md.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import evidence
from evidence import ROOT, number
from machine import describe
from stored import table

import fedmira
from fedmira.disk.folders import StudyFolder
from fedmira.reports.averages import signed_rank_p
from fedmira.study.adapt import adapt

CONFIG = Path(__file__).with_name("ni.yaml")
METHODS = {
    "fedavg": "FedAvg's adapter",
    "task": "MIRA, true groups: the neighbours' mean",
    "learned": "MIRA, learned graph: the common start",
    "auto": "`lambda: auto`: its own choice of the means",
}
WORDS = ("data.clients={by: task, per_group: 2}", "data.subsample=1.0", "training.local_steps=3")
SHARE = 2 / 3  # of a task's instances, of the study; the rest is the newcomer's


def split_tasks(folder: Path) -> tuple[Path, list[Path]]:
    """Write the study's instances to one file, and those of each newcomer to one more."""
    lines = evidence.save_tasks(folder / "tasks.jsonl", categories=4, tasks=2).read_text(encoding="utf-8").splitlines()
    known, new = [], []
    for line in lines:
        task = json.loads(line)
        count = round(len(task["instances"]) * SHARE)
        known.append(json.dumps({**task, "instances": task["instances"][:count]}))
        path = folder / f"new-{task['task']}.jsonl"
        path.write_text(json.dumps({**task, "instances": task["instances"][count:]}) + "\n", encoding="utf-8")
        new.append(path)
    study = folder / "known.jsonl"
    study.write_text("\n".join(known) + "\n", encoding="utf-8")
    return study, new


def measure(folder: Path, seeds: int, path: Path) -> None:
    """Run the study, and adapt every newcomer to every run of it; what is in the file already is not done again."""
    known, new = split_tasks(folder)
    study = folder / "study"
    words = [*WORDS, *evidence.places(known), f"output_dir={study}", f"seeds={list(range(seeds))}"]
    config = fedmira.load_config(CONFIG, words)
    methods = tuple(entry for entry in config.methods if entry.folder in METHODS)
    if (study / "config.yaml").is_file():
        fedmira.resume(study)
    else:
        fedmira.run(config.model_copy(update={"methods": methods}))
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    done = {(row["method"], row["seed"], row["client"]) for row in rows}
    for run in StudyFolder(study).runs():
        for file in new:
            client = file.stem
            if (run.facts.label, run.facts.seed, client) in done:
                continue
            target = folder / "adapted" / run.facts.label / str(run.facts.seed)
            found = adapt(run.path, file, client=client, output=target, overwrite=True, observer=lambda event: None)
            losses = {score.what: score.test["loss"] for score in found.scores}
            row = {"method": run.facts.label, "seed": run.facts.seed, "client": client, "steps": found.steps}
            rows.append({**row, "examples": found.examples, "losses": losses})
            path.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(run.facts.label, run.facts.seed, client, losses, flush=True)


def means(rows: Sequence[Mapping[str, Any]], method: str, what: str) -> dict[str, float]:
    """Return each newcomer's mean over seeds of one of its adapters' test losses."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            losses.setdefault(row["client"], []).append(row["losses"][what])
    return {client: statistics.fmean(values) for client, values in losses.items()}


HEAD = """\
# Clients that come when the study is over

Made by `python benchmarks/questions/newcomers.py` on {cpu}, {cores} cores, commit {commit}.

The study: 8 tasks of Natural Instructions, 2 of each of 4 categories, each dealt to 2 clients; base `nano`. After its
last round one client more of each task comes, with {examples} training examples that nobody has seen, and is given an
adapter by `fedmira adapt`: its start, and what {steps} steps of its own make of it. Mean test loss over the {clients}
newcomers, each one's mean over {seeds} seeds; p: signed-rank test against training alone for as many steps from the
common start (with {clients} clients it cannot be below {least:.2g}).
"""


def page(stored: Mapping[str, Any]) -> str:
    """Write the page from what is kept."""
    rows, lines = stored["rows"], []
    for method, words in METHODS.items():
        alone, start, adapted, base = (
            means(rows, method, what) for what in ("alone", "start", "adapted", "untouched base")
        )
        if not alone:
            continue
        cells = [number(statistics.fmean(of.values())) for of in (base, start, alone, adapted)]
        differences = [adapted[client] - alone[client] for client in alone]
        better = sum(change < 0 for change in differences)
        p = evidence.chance(signed_rank_p(differences)) if any(differences) else ""
        lines.append([words, *cells, f"{better} of {len(differences)}", p])
    clients = len({row["client"] for row in rows})

    def span(key: str) -> str:
        return " to ".join(dict.fromkeys(str(pick(row[key] for row in rows)) for pick in (min, max)))

    head = HEAD.format(
        **{key: stored["machine"][key] for key in ("cpu", "cores", "commit")},
        examples=span("examples"),
        steps=span("steps"),
        clients=clients,
        seeds=len({row["seed"] for row in rows}),
        least=2 / 2**clients,
    )
    titles = [
        "start of the method",
        "untouched base",
        "start",
        "alone",
        "start and own steps",
        "better than alone",
        "p",
    ]
    return "\n".join([head, table(titles, lines), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-page", action="store_true", help="from what is kept")
    parser.add_argument("--folder", type=Path, default=Path("runs/newcomers"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "newcomers.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "newcomers.md")
    options = parser.parse_args()
    if not options.only_page:
        measure(options.folder, options.seeds, options.json)
    options.page.write_text(page(json.loads(options.json.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
