"""Does a client that chooses its own pull do better than any fixed rule? Three settings, many controls, one page.

    python benchmarks/choosing/write.py [--settings ni-8x4 ni-28 dolly-8x4] [--seeds 5] [--methods LABEL ...]
                                        [--only-page] [--folder FOLDER] [--page FILE] [--json FOLDER]

Each setting is a config beside this file, and a comparison without tuning (`fedmira compare CONFIG --budget 1`): all
methods have the same learning rate and steps, fedavg_ft one more epoch at the end. Runs are made seed by seed and kept
in benchmarks/results/choosing-SETTING.json; what is kept there is not run again. Writes docs/results/choosing.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmira.reports.results import Results
from fedmira.reports.stats import client_values, summarise

sys.path.insert(0, str(Path(__file__).parents[1]))
import kept
from stored import table

import fedmira

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SETTINGS = ("ni-8x4", "ni-28", "dolly-8x4")
ABOUT = {
    "ni-8x4": "Relatives exist: 8 tasks of Natural Instructions, each dealt at random to 4 clients, 18 examples each",
    "ni-28": "No relatives: 28 tasks of Natural Instructions, one client each, 36 examples each",
    "dolly-8x4": "Alike tasks: 8 categories of Dolly, each dealt at random to 4 clients, 5 to 28 examples each",
}
WORDS = {
    "local": "training alone",
    "fedavg": "one adapter for all",
    "fedavg_ft": "FedAvg, then everybody trains one epoch alone",
    "known-groups": "MIRA's step (8), pull 1/2 at upload, true groups, stored neighbours",
    "learned-half": "half of the learned neighbours' mean at every fetch, no choice",
    "auto": "`lambda: auto`: learned and global",
    "auto-known": "auto, true groups and global",
    "auto-global": "auto, global only",
    "auto-shuffled": "auto, the learned graph of permuted clients, and global",
    "auto-parabola": "auto, three alphas of each graph are scored",
    "auto-alone": "auto, by own validation alone (prior 0)",
}


def read(stored: kept.Kept, name: str) -> dict[str, Any]:
    """Return everything that the page says of a setting, of the seeds that every method has."""
    entries = stored["methods"]
    shared = set.intersection(*(set(entry["runs"]) for entry in entries.values()))
    seeds = sorted(map(int, shared))
    results = kept.results_of(stored, seeds)
    methods: dict[str, Any] = {}
    for label, entry in entries.items():
        runs = [entry["runs"][str(seed)] for seed in seeds]
        methods[label] = {key: sum(run[key] for run in runs) / len(runs) for key in ("tokens", "scored", "bytes")}
    for metric in stored["metrics"]:
        for baseline in ("local", "auto"):
            for item in summarise(results, metric=metric, baseline=baseline):
                one = methods[item.method].setdefault(metric, {"mean": item.mean, "half_width": item.half_width})
                if (against := item.against) is not None:
                    one[f"against_{baseline}"] = {
                        "difference": against.difference,
                        "wins": against.wins,
                        "losses": against.losses,
                        "p": against.p_holm,
                    }
    for label in entries:
        methods[label]["worst"] = worst(results, label)
        methods[label]["always_worse"] = always_worse(results, label)
    machines = {json.dumps(run["machine"]): run["machine"] for one in entries.values() for run in one["runs"].values()}
    return {
        "name": name,
        "seeds": len(seeds),
        "clients": len(stored["clients"]),
        "rounds": stored["rounds"],
        "methods": methods,
        "choices": choices([entries["auto"]["runs"][str(seed)] for seed in seeds]),
        "machines": list(machines.values()),
    }


def worst(results: Results, label: str) -> float:
    """The largest mean increase of a client's test loss over training alone, in nats."""
    values = client_values(results, metric="loss")
    return max(values[label][client] - values["local"][client] for client in values["local"])


def always_worse(results: Results, label: str) -> int:
    """How many clients have a higher test loss than training alone with every seed."""
    found: dict[str, dict[tuple[str, int], float]] = {"local": {}, label: {}}
    for row in results.rows:
        if row.method in found and row.split == "test" and row.metric == "loss" and row.round > 0:
            found[row.method][row.client, row.seed] = row.value
    clients = {client for client, _ in found["local"]}
    seeds = {seed for _, seed in found["local"]}
    return sum(all(found[label][client, seed] > found["local"][client, seed] for seed in seeds) for client in clients)


def choices(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return by round, the last choice last, the mean alpha, and the share of it from the first graph."""
    lines: list[dict[str, float]] = []
    for rounds in zip(*(run["choices"] for run in runs), strict=True):
        count, total, learned = (sum(part) for part in zip(*rounds, strict=True))
        lines.append({"alpha": total / count, "learned": learned / total if total else 0.0})
    return lines


# ---------------------------------------------------------------- the page


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("-", "\u2212")


def chance(value: float | None) -> str:
    return "" if value is None else f"{value:.1g}"


def section(found: Mapping[str, Any]) -> str:
    """Write what came out of one setting."""
    methods = found["methods"]
    extra = next(metric for metric in ("exact_match", "rouge_l") if metric in methods["local"])
    rows = []
    for label in [one for one in WORDS if one in methods]:
        one = methods[label]
        alone, auto = one["loss"].get("against_local", {}), one["loss"].get("against_auto", {})
        rows.append(
            [
                WORDS[label],
                f"{number(one['loss']['mean'])} ± {number(one['loss']['half_width'])}",
                "" if not alone else f"{alone['wins']} / {alone['losses']}",
                "" if not alone else number(one["worst"]),
                "" if not alone else str(one["always_worse"]),
                chance(alone.get("p")),
                number(auto.get("difference")),
                chance(auto.get("p")),
                number(one[extra]["mean"]),
            ]
        )
    head = ["", "test loss, nats", "better / worse than alone", "worst client", "worse with every seed", "p",
            "minus auto", "p", "exact match" if extra == "exact_match" else "ROUGE-L"]  # fmt: skip
    pulls = [f"{line['alpha']:.2f} ({100 * line['learned']:.0f} %)" for line in found["choices"]]
    seeds = found["seeds"]
    return "\n".join(
        [
            f"## {ABOUT[found['name']]}",
            "",
            f"{found['clients']} clients, {found['rounds']} rounds, {seeds} {'seed' if seeds == 1 else 'seeds'}.",
            "",
            table(head, rows),
            "",
            "Mean alpha of `auto` by round, and what went to the learned graph; the last after the last round:",
            "",
            ", ".join(pulls) + ".",
            "",
            traffic(methods),
        ]
    )


def traffic(methods: Mapping[str, Any]) -> str:
    """Say what is scored and sent for a choice."""
    lines = []
    for label in (one for one in ("auto", "auto-parabola") if one in methods):
        one = methods[label]
        share, sent = one["scored"] / one["tokens"], one["bytes"] / methods["fedavg"]["bytes"]
        lines.append(
            f"- {label}: {share:.2f} tokens scored for each one trained on, {sent:.2f} times the bytes of fedavg."
        )
    return "\n".join(lines)


def costs(found: Mapping[str, Any]) -> str:
    """Write what a choice takes of a round, as cost.py has measured it."""
    head = [
        "local epochs",
        "candidates scored",
        "tokens scored for each one trained on",
        "of the local phase",
        "of the round",
    ]
    rows = [
        [
            str(row["epochs"]),
            "all nine" if row["scored"] == "all" else "five, and a parabola",
            f"{row['tokens']:.2f}",
            f"{100 * row['share_of_training']:.0f} %",
            f"{100 * row['share_of_round']:.0f} %",
        ]
        for row in found["rows"]
    ]
    return "\n".join(
        [
            "## What a choice takes of a round",
            "",
            "Seconds inside the same rounds, of the first setting with a tenth of the examples for validation, by",
            "`python benchmarks/choosing/cost.py`. Wanted: under 10 %.",
            "",
            table(head, rows),
        ]
    )


HEAD = """\
# A pull that each client chooses

Made by `python benchmarks/choosing/write.py`; {machines}.

The base is `nano` (6.9 M parameters) in float32, rank 8 on all linear layers; a third of the clients in a round, one
local epoch. Nothing was tuned: all methods have the same learning rate, FedAvg-FT one more epoch than the others. Means
over clients, each client's own mean over seeds first; intervals are over clients. p: Wilcoxon's signed-rank test over
clients, against training alone, and of each method against `auto`, with Holm's correction over the methods. Worst
client: the largest increase of a client's loss over training alone, in nats.
"""


def page(found: Sequence[Mapping[str, Any]], spent: Mapping[str, Any] | None) -> str:
    """Write the page from what is stored. spent: of cost.py."""
    machines = "; ".join(
        dict.fromkeys(
            f"{machine['cpu']}, {machine['cores']} cores, commit {machine['commit']}"
            for one in found
            for machine in one["machines"]
        )
    )
    parts = [*map(section, found), *([] if spent is None else [costs(spent)])]
    return "\n".join([HEAD.format(machines=machines), "\n\n".join(parts), ""])


def file_of(name: str) -> str:
    return f"choosing-{name}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="of the configs; default: all")
    parser.add_argument("--only-page", action="store_true", help="from stored results")
    parser.add_argument("--folder", type=Path, default=Path("runs/choosing"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "choosing.md")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    for name in [] if options.only_page else options.settings:
        path = HERE / f"{name}.yaml"
        labels = options.methods or [entry.folder for entry in fedmira.load_config(path).methods]
        for seed in range(options.seeds):
            for label in labels:
                folder = options.folder / name / f"seed-{seed}"
                kept.measure(path, [], label, seeds=[seed], budget=1, folder=folder, path=options.json / file_of(name))
    paths = {name: path for name in SETTINGS if (path := options.json / file_of(name)).is_file()}
    found = [read(kept.read(path), name) for name, path in paths.items()]
    spent = options.json / "choosing-cost.json"
    text = page(found, json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else None)
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
