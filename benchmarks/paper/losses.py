"""MIRA's figure 3, table III and table I, reduced to 2 CPU cores: losses over 60 rounds, and by type of task.

    python benchmarks/paper/losses.py [--only ni dolly] [--seeds 5] [--methods LABEL ...]
                                      [--only-page] [--folder FOLDER] [--page FILE] [--json FOLDER]

Two configs beside this file say what is reduced; `fedmira run mira-paper` has the paper's own settings, for a GPU. The
learning rate of each method, FedPTuning's too, is the best of three by validation with the first seed. Runs are kept in
benchmarks/results/paper-losses-DATA.json. Writes docs/results/paper-losses.md.

Source: MIRA (arXiv:2410.15524), figure 3, tables I and III.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import evidence
import kept
from evidence import SHARED, Study, number
from stored import table

HERE = Path(__file__).parent
TITLES = {"ni": "Natural Instructions (figure 3, table III)", "dolly": "Dolly (table I)"}
METHODS = {
    "local": "training alone",
    "fedit": "FedIT",
    "fedptuning": "FedPTuning",
    "mira-paper": "MIRA, pull of the public code (0.25 %)",
    "mira-strong": "MIRA, pull 1/2",
    "mira-auto": "MIRA, `lambda: auto`",
}
SHOWN = (0, 6, 12, 18, 24, 36, 48, 60)  # rounds
STUDIES = tuple(Study(name, HERE / f"losses-{name}.yaml", tuned=3) for name in TITLES)
HEAD = """\
# MIRA's losses, by round and by type of task

Made by `python benchmarks/paper/losses.py`; {machines}.

The paper's claims (figure 3, tables I and III): FedIT is ahead early; MIRA overtakes it after about a third of 60
rounds and ends lower; FedPTuning is far behind both. Here its experiment is reduced to a base of 6.9 M parameters
(`nano`), {clients} clients, {sampled} in a round, and a few local steps in place of five epochs. Learning rates are
tuned, {budget} runs for each method. Losses are nats per token of the answer; the paper's are divided by the batch in
part, so orders can be compared and values cannot. Everybody's own adapter is scored on everybody's own examples.
"""


def curve(found: kept.Kept, label: str, kind: str) -> dict[int, float]:
    """Return round -> mean over seeds of the mean loss over clients."""
    by_round: dict[int, list[float]] = {}
    for run in found["methods"][label]["runs"].values():
        for turn, loss in run["curves"][kind]:
            by_round.setdefault(turn, []).append(loss)
    return {turn: statistics.fmean(losses) for turn, losses in sorted(by_round.items())}


def trained(found: kept.Kept, label: str, last: int, over: int = 6) -> float:
    """Return the mean loss of local training in the rounds up to this one."""
    points = curve(found, label, "train")
    return statistics.fmean(loss for turn, loss in points.items() if last - over < turn <= last)


def crossing(found: kept.Kept, one: str, other: str) -> str:
    """Say from which scored round on one method stays below another."""
    first, second = (curve(found, label, "validation") for label in (one, other))
    later = None
    for turn in sorted(first, reverse=True):
        if first[turn] >= second[turn]:
            break
        later = turn
    return "never" if later is None else f"from round {later} on"


def by_group(found: kept.Kept, labels: Sequence[str]) -> str:
    """Write the mean test loss of the clients of each type of task, over seeds."""
    groups = list(dict.fromkeys(found["groups"]))
    rows = []
    for group in groups:
        places = [place for place, one in enumerate(found["groups"]) if one == group]
        cells = []
        for label in labels:
            runs = found["methods"][label]["runs"].values()
            cells.append(statistics.fmean(run["loss"][place] for run in runs for place in places))
        lowest = min(cells)
        rows.append([str(group), *(f"**{number(one)}**" if one == lowest else number(one) for one in cells)])
    return table(["test loss by type of task", *(METHODS[label] for label in labels)], rows)


def section(name: str, found: kept.Kept) -> str:
    """Write what came out of one data set."""
    labels = [label for label in METHODS if label in found["methods"]]
    seeds = evidence.seeds_of(found, labels)
    items = evidence.summaries(found, labels)
    scores = evidence.summaries(found, labels, metric="rouge_l") if "rouge_l" in found["metrics"] else {}
    against = evidence.summaries(found, labels, baseline="fedit") if "fedit" in labels else {}
    rows = []
    for label in labels:
        line = [METHODS[label], f"{found['methods'][label]['learning_rate']:g}", evidence.interval(items[label])]
        line += evidence.against(items[label].against)
        line += evidence.against(against[label].against) if against else ["", ""]
        rows.append([*line, *([evidence.interval(scores[label])] if scores else [])])
    head = ["", "learning rate", "test loss", "better / equal / worse than alone", "p", "than FedIT", "p"]
    parts = [
        f"## {TITLES[name]}",
        f"{len(found['clients'])} clients, {found['sampled']} a round, {found['rounds']} rounds, {len(seeds)} seeds.",
        table([*head, *(["ROUGE-L"] if scores else [])], rows),
    ]
    turns = [turn for turn in SHOWN if turn in curve(found, labels[0], "validation")]
    curves = [
        [METHODS[label], *(number(curve(found, label, "validation")[turn], 2) for turn in turns)] for label in labels
    ]
    parts += ["Validation loss of all clients after a round:", table(["", *map(str, turns)], curves)]
    late = [turn for turn in turns if turn]
    losses = [[METHODS[label], *(number(trained(found, label, turn), 2) for turn in late)] for label in labels]
    parts += ["Loss in local training, mean of six rounds up to this one:", table(["", *map(str, late)], losses)]
    miras = [label for label in labels if label.startswith("mira")]
    if "fedit" in labels:
        said = [f"{METHODS[label]}: {crossing(found, label, 'fedit')}" for label in miras]
        parts.append(f"Validation loss below FedIT's, to the end: {'; '.join(said)}.")
    return "\n\n".join([*parts, by_group(found, labels)])


def page(found: Mapping[str, kept.Kept]) -> str:
    """Write the page from what is kept."""
    one = next(iter(found.values()))
    head = HEAD.format(
        machines=evidence.machines(found),
        clients=len(one["clients"]),
        sampled=one["sampled"],
        budget=one["budget"],
    )
    return "\n\n".join([head.rstrip(), *(section(name, one) for name, one in found.items())]) + "\n"


def main() -> None:
    options = evidence.options(__doc__ or "", "paper-losses", STUDIES)
    tasks = evidence.save_tasks(options.folder / "tasks.jsonl", categories=8, tasks=3)
    dolly = SHARED / "data/dolly/databricks-dolly-15k.jsonl.gz"
    for study, path in zip(STUDIES, (tasks, dolly), strict=True):
        evidence.measure([study], options, evidence.places(path))
    options.file.write_text(page(evidence.read(STUDIES, options)), encoding="utf-8")


if __name__ == "__main__":
    main()
