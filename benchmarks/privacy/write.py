"""Test loss against epsilon, by method: does stronger noise make clients want more of their neighbours?

    python benchmarks/privacy/write.py [--only none 1 3] [--seeds 3] [--methods LABEL ...]
                                       [--only-page] [--folder FOLDER] [--page FILE] [--json FOLDER]

A study of ni.yaml for each noise multiplier, `none` without privacy. Runs are kept in
benchmarks/results/loss-and-epsilon-NOISE.json; what is kept there is not run again. Writes
docs/results/loss-and-epsilon.md.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import evidence
import kept
from evidence import Study, chance, number
from stored import table

CONFIG = Path(__file__).with_name("ni.yaml")
NOISES = ("none", "1", "3")
METHODS = {
    "local": "training alone",
    "untouched": "the base, untrained",
    "mira-01": "MIRA, pull 0.1 to the clients of the same task",
    "mira-05": "MIRA, pull 0.5 to the clients of the same task",
    "fedavg": "FedAvg",
}
PULLS = ("mira-01", "mira-05", "fedavg")  # from little of the others to nothing but all of them
STUDIES = tuple(
    Study(noise, CONFIG, ("privacy=null" if noise == "none" else f"privacy.noise_multiplier={noise}",), seeds=3)
    for noise in NOISES
)
HEAD = """\
# Loss against epsilon

Made by `python benchmarks/privacy/write.py`; {machines}.

Record-level DP-SGD in each client's phase ([privacy](../privacy.md)): gradients of each example clipped to norm 1,
Gaussian noise of the multiplier in the first column, Poisson sampling; epsilon by the PLD accountant, add-or-remove one
example, delta 1e-4, of a client that takes part in all {rounds} rounds of {steps} steps of about {batch} of its {train}
examples. The base is `nano` (6.9 M parameters) in float32, rank 8 on all linear layers; 4 tasks of Natural
Instructions, each dealt at random to 3 of {clients} clients; {seeds} seeds. Nothing was tuned: learning rate {rate:g}
everywhere, the same for every noise. The base is not private here, and needs not be: it has seen none of the examples.

Test loss in nats: means over clients of each client's mean over seeds. Better / equal / worse, p: against training
alone with the same noise, Wilcoxon's signed-rank test over {clients} clients (its smallest p is {least:.2g}), with
Holm's correction.
"""


def epsilon_of(found: kept.Kept) -> str:
    """Return the epsilon of all clients of a study that train, which took part equally."""
    spent = {run.get("epsilon") for entry in found["methods"].values() for run in entry["runs"].values()}
    values = sorted(value for value in spent if value)  # where nobody trains nothing is spent
    return "\N{INFINITY}" if not values else " to ".join(dict.fromkeys(f"{one:.2f}" for one in (values[0], values[-1])))


def rows(noise: str, found: kept.Kept) -> list[list[str]]:
    """Return the lines of one noise multiplier."""
    labels = [label for label in METHODS if label in found["methods"]]
    items = evidence.summaries(found, labels)
    lines = []
    for label in labels:
        against = items[label].against
        difference = "" if against is None else number(against.difference)
        place = [noise, epsilon_of(found)] if label == labels[0] else ["", ""]
        lines.append([*place, METHODS[label], evidence.interval(items[label]), difference, *evidence.against(against)])
    return lines


def finding(found: Mapping[str, kept.Kept]) -> str:
    """Say which pull is best at each noise, and how the gain over training alone changes with it."""
    said, gains = [], []
    for noise, one in found.items():
        items = evidence.summaries(one, [label for label in PULLS if label in one["methods"]])
        best = min((item for label, item in items.items() if label in PULLS), key=lambda item: item.mean or 0.0)
        against = best.against
        assert against is not None
        p = chance(against.p_holm)
        gains.append(-(against.difference or 0.0))
        said.append(
            f"- noise {noise}: {METHODS[best.method]}, {number(against.difference)} nats against training alone (p {p})"
        )
    change = "as much as" if gains[-1] == gains[0] else "more than" if gains[-1] > gains[0] else "less than"
    return "\n".join(
        [
            "Lowest loss among those that take something of others:",
            "",
            *said,
            "",
            f"With the strongest noise the others bring {change} without any: {number(gains[-1])} nats beside "
            f"{number(gains[0])}.",
        ]
    )


def costs(spent: Mapping[str, Any]) -> str:
    """Say what a private step takes, as benchmarks/speed/private.py has measured it."""
    head = ["unit", "numbers of an adapter", "steps", "pairs", "private / plain, median", "from to"]
    rows = [
        [
            f"({row['unit']}) {row['title']}",
            f"{row['parameters']:,}",
            str(row["steps"]),
            str(len(row["seconds_plain"])),
            number(row["ratio"], 2),
            " to ".join(number(one, 2) for one in row["spread"]),
        ]
        for row in spent["rows"]
    ]
    where = spent["machine"]
    return "\n".join(
        [
            "## What a private step costs",
            "",
            "Seconds of a local phase with private gradients, each example a row of its own, over those of the plain",
            "one on the same batches, one after the other in pairs, by `python benchmarks/speed/private.py`;",
            f"{where['cpu']}, {where['cores']} cores, commit {where['commit']}. Wanted: at most 4.",
            "",
            table(head, rows),
            "",
        ]
    )


def page(found: Mapping[str, kept.Kept], spent: Mapping[str, Any] | None = None) -> str:
    """Write the page from what is kept. spent: of benchmarks/speed/private.py."""
    one = next(iter(found.values()))
    training, clients = one["training"], len(one["clients"])
    text = HEAD.format(
        machines=evidence.machines(found),
        rounds=one["rounds"],
        steps=training["local_steps"],
        batch=training["batch_size"],
        train=" to ".join(dict.fromkeys(str(pick(one["examples"])) for pick in (min, max))),
        clients=clients,
        seeds=len(evidence.seeds_of(one, list(one["methods"]))),
        rate=training["learning_rate"],
        least=2 / 2**clients,
    )
    head = ["noise multiplier", "epsilon", "", "test loss, nats", "minus alone", "better / equal / worse", "p"]
    lines = [line for noise, one in found.items() for line in rows(noise, one)]
    return "\n".join([text, table(head, lines), "", finding(found), "", *([costs(spent)] if spent else [])])


def main() -> None:
    options = evidence.options(__doc__ or "", "loss-and-epsilon", STUDIES)
    tasks = evidence.save_tasks(options.folder / "tasks.jsonl", categories=4, tasks=1)
    evidence.measure(STUDIES, options, evidence.places(tasks))
    cost = options.results / "private.json"
    spent = json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else None
    options.file.write_text(page(evidence.read(STUDIES, options), spent), encoding="utf-8")


if __name__ == "__main__":
    main()
