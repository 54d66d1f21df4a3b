"""A defect of MIRA's public code replayed: what if the server's reply never reaches the client?

    python benchmarks/paper/lost_reply.py [--seeds 0 1 2] [--clients 16] [--rounds 10] [--lambda 0.25]
                                          [--dtype bfloat16] [--data FILE] [--base FOLDER] [--study FOLDER]
                                          [--page FILE] [--json FILE]

One study with the same settings for `local`, `mira`, `mira` with `reply: lost`, and `fedavg`: real tasks of Natural
Instructions, one a client, with the base nano; half of the clients in a round, so that a client comes back about four
times. Losses and ROUGE-L on the clients' test splits. Writes docs/results/lost_reply.md and
benchmarks/results/lost-reply.json; an existing study is resumed, or only read.

Source: the public code of MIRA (arXiv:2410.15524) at commit 2bf90c7: what the server decides in round t is saved in the
folder of round t + 1, and a client that returns reads that of t, its own upload.
"""

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fedmira
from fedmira.config.faults import check_config
from fedmira.reports.results import Results, read_results
from fedmira.reports.stats import MethodSummary, summarise, summarise_base

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("FEDMIRA_TEST_DATA", "../shared"))
METRICS = ("loss", "rouge_l")
NAMES = {"local": "local", "mira": "mira", "mira-lost": "mira, `reply: lost`", "fedavg": "fedavg"}
PAIRS = (("mira", "local"), ("mira-lost", "local"), ("fedavg", "local"), ("mira-lost", "mira"))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the config of the study, as YAML would have it."""
    mira = {"name": "mira", "lambda": options.coupling, "graph": {"kind": "groups", "column": "category"}}
    return {
        "seeds": options.seeds,
        "output_dir": str(options.study),
        "model": {"base_model": str(options.base), "dtype": options.dtype, "device": "cpu"},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {
            "path": str(options.data),
            "format": "natural_instructions",
            "template": "alpaca",
            "max_length": 512,
            "split": {"validation": 0.05, "test": 0.1},
            "clients": {"by": "task", "first": options.clients, "groups": "category"},
        },
        "federation": {"rounds": options.rounds, "participation": 0.5},
        "training": {"local_steps": 4, "batch_size": 4, "learning_rate": 2e-3, "weight_decay": 0.01},
        "methods": [{"name": "local"}, mira, {**mira, "label": "mira-lost", "reply": "lost"}, {"name": "fedavg"}],
        "evaluation": {"every": options.rounds, "metrics": list(METRICS), "max_new_tokens": 32},
    }


def run(options: argparse.Namespace) -> fedmira.Study:
    """Run the study, or resume it. Raises SystemExit if it has other settings."""
    config = check_config(settings(options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mira: reply: lost")  # that is what is looked at
        if not (options.study / "config.yaml").is_file():
            return fedmira.run(config)
        study = fedmira.Study(options.study)
        if dump(study.config) != dump(config):
            raise SystemExit(f"{options.study}: a study with other settings; remove it, or give another --study")
        states = [one.facts.state for one in study.runs]
        whole = states == ["complete"] * len(config.methods) * len(config.seeds)
        return study if whole else fedmira.resume(options.study)


def dump(config: fedmira.Config) -> dict[str, Any]:
    """Return a config as plain values, without the places of its files."""
    raw = config.model_dump(mode="json", by_alias=True, exclude={"output_dir"})
    raw["model"]["base_model"], raw["data"]["path"] = (
        Path(one).name for one in (config.model.base_model, config.data.path)
    )
    return raw


# ---------------------------------------------------------------- what came out


def find(study: fedmira.Study) -> dict[str, Any]:
    """Return everything that the page says, as it is stored."""
    results, config = read_results(study.path), study.config
    runs = {(run.facts.label, run.facts.seed): run for run in study.runs}
    records = {key: run.rounds for key, run in runs.items()}
    equal = [
        alone["train_loss"] == lost["train_loss"] and alone["loss_before"] == lost["loss_before"]
        for seed in config.seeds
        for alone, lost in zip(records["local", seed], records["mira-lost", seed], strict=True)
    ]
    facts = runs["mira", config.seeds[0]].facts
    return {
        "name": "lost-reply",
        "settings": dump(config),
        "clients": facts.clients,
        "sampled": facts.sampled,
        "pull_percent": statistics.mean(
            pull[1] for seed in config.seeds if (pull := runs["mira", seed].facts.pull_percent)
        ),
        "rounds_equal": [sum(equal), len(equal)],
        "base": {metric: asdict(one) for metric in METRICS if (one := summarise_base(results, metric=metric))},
        "methods": {name: measured(results, name) for name in NAMES},
        "around_the_merge": {name: around([records[name, seed] for seed in config.seeds]) for name in NAMES},
        "pairs": [[name, other, compared(results, name, other)] for name, other in PAIRS],
    }


def of_seed(results: Results, seed: int) -> Results:
    """Return the results of one seed."""
    return results.where(lambda row: row.seed == seed)


def measured(results: Results, name: str) -> dict[str, Any]:
    """Return a method's summary of each metric, and its mean over clients of each seed."""
    found = {}
    for metric in METRICS:
        each = [
            summary(of_seed(results, seed), metric, name).mean for seed in sorted({row.seed for row in results.rows})
        ]
        found[metric] = {**asdict(summary(results, metric, name)), "seed_means": each}
    return found


def summary(results: Results, metric: str, name: str, baseline: str = "local") -> MethodSummary:
    return next(one for one in summarise(results, metric=metric, baseline=baseline) if one.method == name)


def compared(results: Results, name: str, other: str) -> dict[str, Any]:
    """Return the paired comparison of two methods, over clients, on each metric."""
    some = results.where(lambda row: row.method in (name, other))
    return {metric: asdict(summary(some, metric, name, other))["against"] for metric in METRICS}


def around(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    """Return the mean validation loss of sampled clients before and after the merge, over rounds and seeds."""
    records = [record for run in runs for record in run]
    return [
        statistics.mean(value for record in records for value in record[key] if value is not None)
        for key in ("loss_before", "loss_after")
    ]


# ---------------------------------------------------------------- the page

TEXT = """# A reply that is lost

Made by `python benchmarks/paper/lost_reply.py` at commit {commit} on {date}; {cpu}, threads {threads}, torch {torch}.

In the public code of MIRA the server's step never reaches a client that returns: it is saved for the next round and
read from the last, so that the client goes on from its own upload. `reply: lost` of [mira](../methods/mira.md) replays
that. Everything else is the same here for all: {clients} tasks of Natural Instructions, one a client, {sampled} of them
in each of {rounds} rounds of {steps} steps of {batch} examples; MIRA on the graph of the tasks' categories with
eta lambda = {coupling:g}, a mean pull of {pull:.0f} % a round. Seeds {seeds}.

Scored is what the server holds of a client after the last round. With the reply lost that is the client's own training
pulled once, at its last merge: no pull adds up over rounds.

Test split; mean over clients, each client's mean over seeds, and half of the 95 % t-interval over clients; in brackets
the least and the most mean of a seed.

{table}

## Pair by pair

The first minus the second, client by client: mean, half of its 95 % t-interval, clients better / equal / worse, and the
p of Wilcoxon's signed-rank test, not corrected for there being {tests}.

{pairs}

## Did the reply arrive?

Losses in training and before the merge are the same numbers with the reply lost as in training alone, in {equal} of
{all_rounds} rounds. Mean validation loss of the sampled clients, before and after the merge:

{around}

{verdict}

A base of 7 M parameters, one set of tasks, one coupling: it says what the defect does, not what the published runs used
or would have given.
"""


def cell(one: Mapping[str, Any]) -> str:
    """Mean and half interval, and the seeds' ends where they are known."""
    if one["mean"] is None:
        return "n/a"
    half = "" if one["half_width"] is None else f" ± {one['half_width']:.3f}"
    ends = one.get("seed_means")
    return f"{one['mean']:.3f}{half}" + (f" ({min(ends):.3f} to {max(ends):.3f})" if ends else "")


def judged(one: Mapping[str, Any]) -> list[str]:
    """Cells of one comparison."""
    half = "" if one["half_width"] is None else f" ± {one['half_width']:.3f}"
    chance = one["reason"] if one["p"] is None else f"{one['p']:.2g}"
    return [f"{one['difference']:+.3f}{half}", f"{one['wins']} / {one['ties']} / {one['losses']}", chance]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def verdict(found: Mapping[str, Any]) -> str:
    """Say in words what the loss of the reply did to the test loss."""
    (one,) = (pair["loss"] for name, other, pair in found["pairs"] if (name, other) == ("mira-lost", "mira"))
    if one["p"] is None or one["p"] >= 0.05:
        return "On the test loss, MIRA with the reply lost and MIRA as it is written cannot be told apart here."
    kind = "better" if one["difference"] > 0 else "worse"
    return (
        f"On the test loss MIRA as it is written is {kind} here than with the reply lost by "
        f"{abs(one['difference']):.3f} nats a token (of the clients {one['losses']} do better with it, {one['wins']} "
        "worse)."
    )


def page(found: Mapping[str, Any]) -> str:
    """Return the text of docs/results/lost_reply.md."""
    used, machine = found["settings"], found["machine"]
    rows = [["untouched base", *(cell(found["base"][metric]) for metric in METRICS)]]
    rows += [[title, *(cell(found["methods"][name][metric]) for metric in METRICS)] for name, title in NAMES.items()]
    pairs = [
        [f"{NAMES[name]} against {NAMES[other]}", metric, *judged(one[metric])]
        for name, other, one in found["pairs"]
        for metric in METRICS
    ]
    around_rows = [
        [NAMES[name], *(f"{value:.3f}" for value in ends)] for name, ends in found["around_the_merge"].items()
    ]
    return TEXT.format(
        commit=machine["commit"].replace("-dirty", " with changes on top"),
        date=machine["date"],
        cpu=machine["cpu"],
        threads=machine["threads"],
        torch=machine["versions"]["torch"],
        clients=found["clients"],
        sampled=found["sampled"],
        rounds=used["federation"]["rounds"],
        steps=used["training"]["local_steps"],
        batch=used["training"]["batch_size"],
        coupling=next(one["lambda"] for one in used["methods"] if one["name"] == "mira"),
        pull=found["pull_percent"],
        seeds=used["seeds"],
        table=table(["method", "loss, nats a token", "ROUGE-L"], rows),
        tests=len(pairs),
        pairs=table(["pair", "metric", "difference", "better / equal / worse", "p"], pairs),
        equal=found["rounds_equal"][0],
        all_rounds=found["rounds_equal"][1],
        around=table(["method", "before", "after"], around_rows),
        verdict=verdict(found),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, default=16, help="the first tasks of the file, ten a category")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lambda", type=float, default=0.25, dest="coupling")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--data", type=Path, default=SHARED / "data/natural_instructions/tasks.jsonl.gz")
    parser.add_argument("--base", type=Path, default=SHARED / "models/nano")
    parser.add_argument("--study", type=Path, default=Path("runs/bench-lost-reply"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/lost_reply.md")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/lost-reply.json")
    options = parser.parse_args()
    found = {**find(run(options)), "machine": describe()}
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found)
    options.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
