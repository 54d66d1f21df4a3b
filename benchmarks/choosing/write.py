"""Does a client that chooses its own pull do better than any fixed rule? Three settings, many controls, one page.

    python benchmarks/choosing/write.py [--only ni-8x4 ni-28 dolly-8x4] [--seeds 5] [--methods LABEL ...]
                                        [--only-page] [--folder FOLDER] [--page FILE] [--json FOLDER]

Each setting is a config beside this file, and a comparison without tuning (`fedmira compare CONFIG --budget 1`): all
methods have the same learning rate and steps, fedavg_ft one more epoch at the end. Runs are made seed by seed and kept
in benchmarks/results/choosing-SETTING.json; what is kept there is not run again. Writes docs/results/choosing.md.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import evidence
import kept
from evidence import Study, chance, number
from stored import table

HERE = Path(__file__).parent
ABOUT = {
    "ni-8x4": "Relatives exist: 8 tasks of Natural Instructions, each dealt at random to 4 clients, 18 examples each",
    "ni-28": "No relatives: 28 tasks of Natural Instructions, one client each, 24 examples each",
    "dolly-8x4": "Alike tasks: 8 categories of Dolly, each dealt at random to 4 clients, 5 to 28 examples each",
}
WORDS = {
    "local": "training alone",
    "fedavg": "one adapter for all",
    "fedavg_ft": "FedAvg, then everybody trains one epoch alone",
    "known-groups": "MIRA's step (8), pull 1/2 at upload, true groups, stored neighbours",
    "known-shuffled": "the same, groups of permuted clients",
    "learned-half": "half of the learned neighbours' mean at every fetch, no choice",
    "auto": "`lambda: auto`: learned and global",
}
PERSONAL = {"ditto": "Ditto (two gradients a step)", "pftt": "PFTT", "fedbone": "FedBone"}
ABLATIONS = {
    "auto-known": "auto, true groups and global",
    "auto-learned": "auto, learned only",
    "auto-global": "auto, global only",
    "auto-shuffled": "auto, the learned graph of permuted clients, and global",
    "auto-parabola": "auto, three alphas of each graph are scored",
    "auto-alone": "auto, by own validation alone (prior 0)",
    "auto-margin": "auto, only where better by a standard error (margin 1)",
    "auto-modules": "auto, attention and the rest choose apart",
}
MAIN = tuple(WORDS)
STUDIES = (
    Study("ni-8x4", HERE / "ni-8x4.yaml", labels=MAIN, more=(*PERSONAL, *ABLATIONS)),
    *(Study(name, HERE / f"{name}.yaml", labels=MAIN, more=tuple(PERSONAL)) for name in ("ni-28", "dolly-8x4")),
)


def worst(found: kept.Kept, label: str, seeds: Sequence[int]) -> float:
    """The largest increase of a client's mean test loss over training alone, in nats."""
    alone, other = (evidence.values(found, one, seeds) for one in ("local", label))
    return max(other[client] - alone[client] for client in alone)


def always_worse(found: kept.Kept, label: str, seeds: Sequence[int]) -> int:
    """How many clients have a higher test loss than training alone with every seed."""
    pairs = [
        zip(*(found["methods"][one]["runs"][str(seed)]["loss"] for one in ("local", label)), strict=True)
        for seed in seeds
    ]
    return sum(all(other > alone for alone, other in client) for client in zip(*pairs, strict=True))


def choices(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return by round, the last choice last, the mean alpha, and the share of it from the first graph."""
    lines: list[dict[str, float]] = []
    for rounds in zip(*(run["choices"] for run in runs), strict=True):
        count, total, learned = (sum(part) for part in zip(*rounds, strict=True))
        lines.append({"alpha": total / count, "learned": learned / total if total else 0.0})
    return lines


def section(name: str, found: kept.Kept) -> str:
    """Write what came out of one setting."""
    labels = [label for label in MAIN if label in found["methods"]]
    seeds = evidence.seeds_of(found, labels)
    runs = [found["methods"]["auto"]["runs"][str(seed)] for seed in seeds]
    pulls = [f"{line['alpha']:.2f} ({100 * line['learned']:.0f} %)" for line in choices(runs)]
    parts = [
        f"## {ABOUT[name]}",
        f"{len(found['clients'])} clients, {found['rounds']} rounds, {counted(seeds)}.",
        methods_table(found, labels),
        finding(found, labels),
        "Mean alpha of `auto` by round, and what went to the learned graph; the last after the last round:",
        ", ".join(pulls) + ".",
        traffic(found, seeds),
    ]
    for title, more in (("Other personal methods", PERSONAL), ("What of the choice is needed", ABLATIONS)):
        if some := [label for label in more if label in found["methods"]]:
            labels = ["local", "auto", *some]
            said = f"The same setting, {counted(evidence.seeds_of(found, labels))}."
            parts += [f"### {title}", said, methods_table(found, labels)]
            if more is PERSONAL:
                parts.append(finding(found, labels))
    return "\n\n".join(parts)


def counted(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"


def methods_table(found: kept.Kept, labels: Sequence[str]) -> str:
    """Write a line for each method: its loss, against training alone and against `auto`."""
    words, seeds = {**WORDS, **PERSONAL, **ABLATIONS}, evidence.seeds_of(found, labels)
    extra = next(metric for metric in ("exact_match", "rouge_l") if metric in found["metrics"])
    alone, auto = (evidence.summaries(found, labels, baseline=one) for one in ("local", "auto"))
    scores = evidence.summaries(found, labels, metric=extra)
    rows = []
    for label in labels:
        against, minus = alone[label].against, auto[label].against
        compared = against is not None
        rows.append(
            [
                words[label],
                evidence.interval(alone[label]),
                *evidence.against(against),
                number(worst(found, label, seeds)) if compared else "",
                str(always_worse(found, label, seeds)) if compared else "",
                number(minus.difference) if minus is not None else "",
                chance(minus.p_holm) if minus is not None else "",
                number(scores[label].mean),
            ]
        )
    head = ["", "test loss, nats", "better / equal / worse than alone", "p", "worst client", "worse with every seed",
            "minus auto", "p", "exact match" if extra == "exact_match" else "ROUGE-L"]  # fmt: skip
    return table(head, rows)


def finding(found: kept.Kept, labels: Sequence[str]) -> str:
    """Say whether `auto` has a lower loss than each other method."""
    items = evidence.summaries(found, labels, baseline="auto")
    lower: dict[str, list[str]] = {"lower than": [], "not told apart from": [], "higher than": []}
    for label in [one for one in labels if one != "auto"]:
        against = items[label].against
        assert against is not None
        clear = against.p_holm is not None and against.p_holm < 0.01
        kind = "not told apart from" if not clear else "lower than" if (against.difference or 0) > 0 else "higher than"
        lower[kind].append(f"`{label}`")
    said = [f"{kind} {', '.join(names)}" for kind, names in lower.items() if names]
    return f"At p < 0.01 the loss of `auto` is {'; '.join(said)}."


def traffic(found: kept.Kept, seeds: Sequence[int]) -> str:
    """Say what is scored and sent for a choice."""

    def total(label: str, key: str) -> float:
        return float(sum(found["methods"][label]["runs"][str(seed)][key] for seed in seeds))

    share, sent = total("auto", "scored") / total("auto", "tokens"), total("auto", "bytes") / total("fedavg", "bytes")
    return f"`auto`: {share:.2f} tokens scored for each one trained on, {sent:.2f} times the bytes of fedavg."


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
client: the largest increase of a client's loss over training alone, in nats. Base and data are small: what counts is
the order of the methods on the same clients, not their losses.
"""


def page(found: Mapping[str, kept.Kept], spent: Mapping[str, Any] | None) -> str:
    """Write the page from what is kept. spent: of cost.py."""
    head = HEAD.format(machines=evidence.machines(found)).rstrip()
    parts = [head, *(section(name, one) for name, one in found.items()), *([costs(spent)] if spent else [])]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = evidence.options(__doc__ or "", "choosing", STUDIES)
    evidence.measure(STUDIES, options)
    spent = options.results / "choosing-cost.json"
    text = page(
        evidence.read(STUDIES, options), json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else None
    )
    options.file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
