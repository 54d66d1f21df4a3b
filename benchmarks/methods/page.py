"""Writes docs/results/methods.md from what measure.py has kept.

python benchmarks/methods/page.py [--page FILE] [--json FOLDER]
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import kept
from stored import table

from fedmira.reports.results import Results
from fedmira.reports.stats import MethodSummary, client_values, summarise

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TITLES = {"loss": "loss", "word_accuracy": "word accuracy", "rouge_l": "ROUGE-L"}
CLEAR = 0.05  # Holm-adjusted p below which a method counts as different from local
YARDSTICKS = ("untouched", "pooled")  # in the tables, not in the sentences
HEAD = """# Every method on two data sets

Made by `python benchmarks/methods/page.py` from what `benchmarks/methods/measure.py` has kept in benchmarks/results.

Each method is compared with training alone by `fedmira compare`: the same clients, base, splits, schedule, start, steps
and seeds, and {budget} runs of tuning with the first seed, by validation loss. Those are learning rates (the config's,
twice, half), or, where a method has a setting of its own, two rates and another value of that at the better one. Some
take more steps than the others: `pooled` all clients' one after another, `fedavg_ft` more after the last round,
`ditto`, `pfedme`, `apfl` and `fedrep` as their pages say.

Losses are nats per token of the answer on the test split: the mean over clients of each client's mean over seeds, with
its 95 % interval over clients. Better, equal, worse: clients, by their loss against training alone; p from a
signed-rank test over clients, Holm-adjusted over the rows. Worst client: the largest increase of a client's loss over
training alone. Bytes are of one client in one round, as counted in `metrics.jsonl`, padding of rows included. Seconds
are of one run beside other work, to be compared roughly; speed is measured [elsewhere](speed.md). What each method is:
[methods](../methods/README.md), and [which to choose](../choosing-a-method.md).
"""
NAMES = {"demo": "The demo", "ni": "Natural Instructions"}
ABOUT = {
    "demo": "Four invented languages, four clients each, who contradict their family in some words "
    "([the demo](demo.md)). All clients in every round.",
    "ni": "One public task for each client, 3 from each of 4 categories; half of the clients in a round; at most 6 "
    "written answers a client. The base was pretrained on a CPU in an hour, on other instances of such tasks too: what "
    "it writes says nothing of larger models. A client has trained in few rounds: the beginning of a run, not its end.",
}


def make_page(found: Mapping[str, kept.Kept], notes: str) -> str:
    """Write the page from what is kept of each setting, and from notes by hand."""
    budget = next((one["budget"] for one in found.values()), 3)
    parts = [HEAD.format(budget=budget).rstrip()]
    for name, title in NAMES.items():
        command = f"python benchmarks/methods/measure.py {name}"
        body = section(name, found[name]) if name in found else [f"Not measured yet; measure it by: `{command}`."]
        parts += [f"## {title}", f"    {command}", *body]
    return "\n\n".join([*parts, notes.rstrip()]) + "\n"


def section(name: str, found: kept.Kept) -> list[str]:
    """The set-up of a data set, its table, and what it shows."""
    training = found["training"]
    methods, results = found["methods"], kept.results_of(found)
    local = methods["local"]["runs"]
    setup = (
        f"{ABOUT[name]} Base {found['base']} in {found['dtype']}; {len(found['clients'])} clients, {found['sampled']} "
        f"a round, {found['rounds']} rounds of {training['local_steps']} steps of {training['batch_size']} examples, "
        f"{training['optimizer']}, learning rate {training['learning_rate']:g} where it was not tuned; seeds "
        f"{', '.join(local)}."
    )
    runs = [run for one in methods.values() for run in one["runs"].values()]
    machines = sorted({machine(run) for run in runs})
    commits = sorted({run["machine"]["commit"].removesuffix("-dirty") for run in runs})
    missing = [label for label in labels_of(name) if label not in methods]
    later = f" Not measured yet: {', '.join(missing)}." if missing else ""
    return [
        setup,
        f"Measured on {'; '.join(machines)}; commits {', '.join(commits)}.{later}",
        rows_of(found, results),
        "### What it shows",
        "\n".join(f"- {line}" for line in lessons(found, results)),
    ]


def machine(run: Mapping[str, Any]) -> str:
    where = run["machine"]
    return f"{where['cpu']}, {where['cores']} cores, one thread"


# ---------------------------------------------------------------- the table


def rows_of(found: kept.Kept, results: Results) -> str:
    """A line for every method."""
    metrics = found["metrics"]
    summaries = {metric: by_method(results, metric) for metric in metrics}
    worst = worst_of(results)
    head = ["", "settings, tuned in bold", *(TITLES[metric] for metric in metrics), "better / equal / worse", "p",
            "worst client", "bytes up", "bytes down", "seconds", "adapters"]  # fmt: skip
    lines = []
    for label, one in found["methods"].items():
        runs = list(one["runs"].values())
        against = summaries["loss"][label].against
        scores = [score(summaries[metric][label]) for metric in metrics]
        judged = ["", "", ""]
        if against is not None:
            chance = "" if against.p_holm is None else f"{against.p_holm:.2g}"
            judged = [f"{against.wins} / {against.ties} / {against.losses}", chance, signed(worst[label])]
        sent = [between([run[key] for run in runs]) for key in ("bytes_up", "bytes_down")]
        seconds = f"{statistics.median(run['seconds'] for run in runs):.0f}"
        lines.append([label, said(one), *scores, *judged, *sent, seconds, one["view"]])
    return table(head, lines)


def by_method(results: Results, metric: str) -> dict[str, MethodSummary]:
    return {one.method: one for one in summarise(results, metric=metric)}


def worst_of(results: Results) -> dict[str, float]:
    """The largest mean increase of a client's test loss over training alone, by method, in nats."""
    values = client_values(results, metric="loss")
    return {label: max(own[one] - values["local"][one] for one in own) for label, own in values.items()}


def score(one: MethodSummary) -> str:
    """Mean, and half of its 95 % interval."""
    return "n/a" if one.mean is None else f"{one.mean:.3f} ± {one.half_width or 0:.3f}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")


def said(one: Mapping[str, Any]) -> str:
    """Settings as in a config, on one line; what tuning chose is bold, the learning rate among it."""
    tried = one["tried"]
    tuned = {key for values in tried for key in values} - {"validation_loss"}
    values = {**one["settings"], "learning_rate": one["learning_rate"]}
    training = {key: value for key, value in values.pop("training", {}).items() if key != "learning_rate"}
    values |= {"training": training} if training else {}
    words = [written(key, value) for key, value in values.items() if key != "learning_rate" or key in tuned]
    return ", ".join(f"**{word}**" if word.partition(":")[0].strip("`") in tuned else word for word in words)


def written(key: str, value: Any) -> str:
    text: str = yaml.safe_dump({key: value}, default_flow_style=True, sort_keys=False, width=10_000)
    return f"`{text.strip()[1:-1]}`"


def between(ends: Sequence[Sequence[int]]) -> str:
    low, high = min(one[0] for one in ends), max(one[1] for one in ends)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# ---------------------------------------------------------------- what it shows, from the numbers


def lessons(found: kept.Kept, results: Results) -> list[str]:
    """Sentences that follow from any numbers."""
    methods = found["methods"]
    summaries = {metric: by_method(results, metric) for metric in found["metrics"]}
    trained = {label: one for label, one in summaries["loss"].items() if label not in YARDSTICKS}
    lines = [best(methods, trained), told_apart(trained), noise(trained)]
    lines += [scores_apart(trained, summaries[metric], metric) for metric in found["metrics"] if metric != "loss"]
    lines.append(harmless(results, trained))
    return lines


def mean(one: MethodSummary) -> float:
    assert one.mean is not None
    return one.mean


def names(some: Sequence[MethodSummary]) -> str:
    return ", ".join(f"{one.method} ({one.mean:.3f})" for one in sorted(some, key=mean)) or "none"


def best(methods: Mapping[str, Any], trained: Mapping[str, MethodSummary]) -> str:
    """The lowest mean loss of all, and of those with one adapter for all."""
    shared = [one for label, one in trained.items() if methods[label]["view"] == "global" and label != "groupavg"]
    lowest, of_one = sorted(trained.values(), key=mean)[:3], sorted(shared, key=mean)[:3]
    return (
        f"Lowest loss ({' and '.join(YARDSTICKS)} left out here and below): {names(lowest)}. With one adapter for all "
        f"clients: {names(of_one)}."
    )


def told_apart(trained: Mapping[str, MethodSummary]) -> str:
    """Who is better, worse or not told apart from training alone."""
    kinds: dict[str, list[MethodSummary]] = {"better": [], "worse": [], "not told apart": []}
    for one in trained.values():
        if (against := one.against) is not None and against.difference is not None:
            clear = against.p_holm is not None and against.p_holm < CLEAR
            kinds[("better" if against.difference < 0 else "worse") if clear else "not told apart"].append(one)
    judged = "; ".join(f"{kind} are {names(some)}" for kind, some in kinds.items())
    return f"Against training alone ({mean(trained['local']):.3f}), at p < {CLEAR}: {judged}."


def noise(trained: Mapping[str, MethodSummary]) -> str:
    """How far seeds lie apart, as a measure for differences between rows."""
    widths = {label: max(one.by_seed.values()) - min(one.by_seed.values()) for label, one in trained.items()}
    widest = max(widths, key=lambda label: widths[label])
    return (
        f"Seeds of one method lie up to {widths[widest]:.3f} apart ({widest}), in the median "
        f"{statistics.median(widths.values()):.3f}; a smaller difference between rows says little."
    )


def scores_apart(trained: Mapping[str, MethodSummary], scored: Mapping[str, MethodSummary], metric: str) -> str:
    """Where loss and a score disagree: rows below training alone in both."""
    least, local = mean(scored["local"]), mean(trained["local"])
    both = [one for label, one in trained.items() if mean(one) < local and mean(scored[label]) < least]
    return f"Lower loss than training alone, and yet lower {TITLES[metric]}: {names(both)}."


def harmless(results: Results, trained: Mapping[str, MethodSummary]) -> str:
    """Who makes no client worse than training alone by more than a seed does in the median."""
    worst = worst_of(results)
    kind = [one for label, one in trained.items() if label != "local" and worst[label] <= 0]
    return f"No client has a higher loss than alone: {names(kind)}."


def main(page: Path, folder: Path) -> None:
    stored = {name: path for name in NAMES if (path := folder / f"methods-{name}.json").is_file()}
    notes = (HERE / "notes.md").read_text(encoding="utf-8")
    page.write_text(make_page({name: in_order(name, kept.read(path)) for name, path in stored.items()}, notes), "utf-8")


def in_order(name: str, found: kept.Kept) -> kept.Kept:
    """Put the methods into the order of their config; each was kept when it was measured."""
    kept_ones = found["methods"]
    return {**found, "methods": {label: kept_ones[label] for label in labels_of(name) if label in kept_ones}}


def labels_of(name: str) -> list[str]:
    """Return the methods of a setting's config."""
    entries = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))["methods"]
    return [entry.get("label", entry["name"]) for entry in entries]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "methods.md")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    main(options.page, options.json)
