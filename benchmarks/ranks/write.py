"""FlexLoRA's question: are clients of mixed ranks better together than all of them at the smallest rank?

    python benchmarks/ranks/write.py [--only smallest uniform ...] [--seeds 5] [--methods LABEL ...]
                                     [--only-page] [--folder FOLDER] [--page FILE] [--json FOLDER]

A study of ni.yaml for each distribution of ranks, and one with rank 8 for all. Runs are kept in
benchmarks/results/mixed-ranks-DISTRIBUTION.json; what is kept there is not run again. Writes
docs/results/mixed-ranks.md.

Source: FlexLoRA (arXiv:2402.11505), table 1 and section 4; the shares are those of its public code.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import evidence
import kept
from evidence import Study, chance, number
from stored import table

from fedmira.reports.averages import holm, mean, signed_rank_p

CONFIG = Path(__file__).with_name("ni.yaml")
DRAWS = ("uniform", "heavy-tail-light", "normal", "heavy-tail-strong")
EQUAL, MIXED = ("local", "fedavg", "flexlora"), ("local", "flexlora", "hetlora", "raflora")
STUDIES = (
    Study("smallest", CONFIG, labels=EQUAL),
    *(Study(draw, CONFIG, (f"lora.ranks={draw}",), labels=MIXED) for draw in DRAWS),
)
HEAD = """\
# Mixed ranks

Made by `python benchmarks/ranks/write.py`; {machines}.

FlexLoRA's paper lets each client have the rank that it can afford, from four types: 8 everywhere, 30 everywhere, 30 in
attention and 200 elsewhere, 200 everywhere. The types are drawn in four distributions, and compared with rank 8 for
all, the rank of the weakest. Here on the base `nano` (width 256, so that 200 is nearly full rank), {clients} tasks of
Natural Instructions, a client each, {sampled} in a round, {rounds} rounds of {steps} steps of {batch} examples, one
learning rate ({rate:g}) for all, {seeds} seeds. lora_alpha is 16 for every rank, as in the public code: a larger rank
has a smaller scale.

Test loss in nats: means over clients of each client's mean over seeds. p: signed-rank test over clients, against
flexlora with rank 8 for all, Holm-adjusted over the rows of the table; minus is better.
"""


def compared(found: Mapping[str, kept.Kept]) -> dict[tuple[str, str], dict[str, float]]:
    """Return for each row the clients' differences from flexlora with the smallest rank for all."""
    shared = min(len(one["methods"][label]["runs"]) for one in found.values() for label in one["methods"])
    seeds = range(shared)
    yardstick = evidence.values(found["smallest"], "flexlora", seeds)
    return {
        (draw, label): {
            client: value - yardstick[client] for client, value in evidence.values(one, label, seeds).items()
        }
        for draw, one in found.items()
        for label in one["methods"]
        if (draw, label) != ("smallest", "flexlora")
    }


def page(found: Mapping[str, kept.Kept]) -> str:
    """Write the page from what is kept."""
    one = found["smallest"]
    training, differences = one["training"], compared(found)
    chances = holm({f"{draw} {label}": signed_rank_p(list(of.values())) for (draw, label), of in differences.items()})
    rows = []
    for draw, some in found.items():
        labels = [label for label in dict.fromkeys((*EQUAL, *MIXED)) if label in some["methods"]]
        items = evidence.summaries(some, labels)
        scores = evidence.summaries(some, labels, metric="rouge_l")
        for label in labels:
            of = differences.get((draw, label))
            line = ["8 for all" if draw == "smallest" else draw, label, evidence.interval(items[label])]
            line += ["", "", ""] if of is None else [
                number(mean(of.values())),
                f"{sum(value < 0 for value in of.values())} / {sum(value > 0 for value in of.values())}",
                chance(chances[f"{draw} {label}"]),
            ]  # fmt: skip
            rows.append([*line, number(scores[label].mean)])
    head = ["ranks", "", "test loss", "minus flexlora, 8 for all", "clients better / worse", "p", "ROUGE-L"]
    text = HEAD.format(
        machines=evidence.machines(found),
        clients=len(one["clients"]),
        sampled=one["sampled"],
        rounds=one["rounds"],
        steps=training["local_steps"],
        batch=training["batch_size"],
        rate=training["learning_rate"],
        seeds=min(len(entry["runs"]) for some in found.values() for entry in some["methods"].values()),
    )
    return "\n".join([text, table(head, rows), ""])


def main() -> None:
    options = evidence.options(__doc__ or "", "mixed-ranks", STUDIES)
    tasks = evidence.save_tasks(options.folder / "tasks.jsonl", categories=8, tasks=3)
    evidence.measure(STUDIES, options, evidence.places(tasks))
    options.file.write_text(page(evidence.read(STUDIES, options)), encoding="utf-8")


if __name__ == "__main__":
    main()
