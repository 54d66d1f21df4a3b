"""Every method that there is in one study: on the bundled demo and on Natural Instructions.

    python benchmarks/paper/every_method.py demo [--rounds 25] [--seeds 3]
    python benchmarks/paper/every_method.py ni [--rounds 6] [--seeds 3]
    python benchmarks/paper/every_method.py page

stores benchmarks/results/methods-demo.json or methods-ni.json and writes docs/results/methods.md from both; `page`
only writes it. Half an hour each on 2 cores that others used too. Natural Instructions and its base, nano, are looked
for in FEDMIRA_TEST_DATA (default: ../shared). Methods are found, not listed: a new one gets a row with its default
settings. On the demo some run a second time with a rank per client.
"""

import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

import fedmira
from fedmira.engine.events import Event
from fedmira.reports.results import Results, read_results
from fedmira.reports.stats import MethodSummary, summarise
from fedmira.study.events import RunBegun

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FEDMIRA_TEST_DATA") or ROOT.parent / "shared")
COUPLING = 0.25  # eta x lambda of every row of MIRA; the best on the demo's validation data, not searched for elsewhere
CATEGORIES, TASKS, STEPS = 4, 3, 4  # Natural Instructions: the first categories, a client for each of their first tasks
RANKS = (4, 8, 8, 16)  # of the demo's second study, one client after another
METRICS = {"demo": ("loss", "word_accuracy"), "ni": ("loss", "rouge_l")}
GROUP = {"demo": "family", "ni": "category"}  # the column that names a client's group
PROMPT_RATE = {"demo": 1e-2, "ni": 3.3e-3}  # the study's x 10/3: MIRA's authors give P-tuning 1e-3 where LoRA has 3e-4
SGD_RATE = 0.5  # of SCAFFOLD, which is refused with AdamW; not searched for
TITLES = {"loss": "loss", "word_accuracy": "word accuracy", "rouge_l": "ROUGE-L"}
CLEAR = 0.05  # Holm-adjusted p below which a method counts as different from local

Row = Mapping[str, Any]
Result = Mapping[str, Any]


What = StrEnum("What", ["demo", "ni", "page"])


# ---------------------------------------------------------------- the study


def entries(what: str) -> list[dict[str, Any]]:
    """One entry of `methods:` for every method, and more for MIRA and for FedPTuning."""
    groups = {"kind": "groups", "column": GROUP[what]}
    near: dict[str, dict[str, Any]] = {
        "mira": {"graph": groups},
        "mira-random": {"graph": {"kind": "random"}},
        "mira-uniform": {"graph": {"kind": "uniform"}},
        "mira-knn": {"graph": {"kind": "knn", "degree": 3}},
        "mira-learned": {"graph": {"kind": "learned", "degree": 3}},
        "mira-product": {"graph": groups, "space": "product"},
        "mira-exact": {"graph": groups, "solver": "exact"},
    }
    own: dict[str, list[dict[str, Any]]] = {
        "fedavg_ft": [{"steps": STEPS}] if what == "ni" else [{}],  # where a pass would be several rounds' worth
        "fedptuning": [{}, {"label": "fedptuning-rate", "learning_rate": PROMPT_RATE[what]}],
        "groupavg": [{"column": GROUP[what]}],
        "scaffold": [{"training": {"optimizer": "sgd", "learning_rate": SGD_RATE}}],
        "fedsophia": [{"form": "public"}],  # then a learning rate means what it means to AdamW: the longest step
        "mira": [{"label": label, "lambda": COUPLING, **settings} for label, settings in near.items()],
    }
    found = sorted(fedmira.method_names(), key=lambda name: name != "local")  # the yardstick first
    return [{"name": name, **settings} for name in found for settings in own.get(name, [{}])]


def mixed_entries(what: str) -> list[dict[str, Any]]:
    """What runs again with a rank per client: the mean of padded factors against means of products."""
    product = {"lambda": COUPLING, "space": "product", "graph": {"kind": "groups", "column": GROUP[what]}}
    names = ("local", "fedavg", "flexlora")
    return [*({"name": name} for name in names), {"name": "mira", "label": "mira-product", **product}]


def save_tasks(folder: Path) -> Path:
    """Write the tasks of the first categories to one file, as they are in the shared data."""
    source = SHARED / "data/natural_instructions/tasks.jsonl.gz"
    if not source.is_file():
        raise SystemExit(f"no Natural Instructions at '{source}': set FEDMIRA_TEST_DATA to the folder of shared data")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        tasks = [(json.loads(line)["category"], line) for line in file]
    kept: list[str] = []
    for place, (_, lines) in enumerate(groupby(tasks, key=lambda task: task[0])):
        if place < CATEGORIES:
            kept += [line for _, line in lines][:TASKS]
    path = folder / "tasks.jsonl"
    path.write_text("".join(kept), encoding="utf-8")
    return path


def load(what: str, rounds: int, seeds: int, folder: Path, *, mixed: bool = False) -> Any:
    """Return the config of a study in `folder`."""
    chosen = mixed_entries(what) if mixed else entries(what)
    overrides = [
        f"output_dir={folder / ('mixed' if mixed else 'study')}",
        f"seeds={list(range(seeds))}",
        f"federation.rounds={rounds}",
        f"methods={json.dumps(chosen)}",
        f"evaluation.metrics={json.dumps(METRICS[what])}",
        f"evaluation.every={rounds}",
    ]
    if what == "demo":
        if mixed:
            overrides += ["lora.r=8", f"lora.ranks={json.dumps([*RANKS * 4])}"]
        return fedmira.load_config("demo", overrides)
    overrides += [
        f"data.path={save_tasks(folder)}",
        f"model.base_model={SHARED / 'models/nano'}",
        "data.clients.first=null",
        "data.split.validation=0.02",
        "federation.participation=0.5",
        "training.local_epochs=null",
        f"training.local_steps={STEPS}",
        "training.batch_size=4",
        "evaluation.max_new_tokens=16",
        "evaluation.max_examples=6",
    ]
    return fedmira.load_config(ROOT / "benchmarks/first_real_runs/natural_instructions.yaml", overrides)


def tell(event: Event) -> None:
    """Say which run has begun."""
    if isinstance(event, RunBegun):
        print(f"{event.facts.label}, seed {event.facts.seed}", file=sys.stderr, flush=True)


def measure(what: str, rounds: int, seeds: int, folder: Path) -> dict[str, Any]:
    """Run the studies of a data set; return what the page needs."""
    began, where = time.monotonic(), describe()  # the code may change while it runs
    config = load(what, rounds, seeds, folder)
    study = fedmira.run(config, observer=tell)
    facts = study.runs[0].facts
    result = {
        "name": f"methods-{what}",
        "command": f"python benchmarks/paper/every_method.py {what} --rounds {rounds} --seeds {seeds}",
        "where": where,
        "metrics": list(METRICS[what]),
        "rounds": rounds,
        "seeds": list(range(seeds)),
        "base": config.model.base_model.removeprefix(f"{SHARED}/"),
        "training": config.training.model_dump(include={"local_steps", "batch_size", "optimizer", "learning_rate"}),
        "clients": facts.clients,
        "sampled": facts.sampled,
        "dtype": facts.dtype,
        "threads": facts.threads,
        "rows": summaries(study, METRICS[what]),
    }
    if what == "demo":
        mixed = fedmira.run(load(what, rounds, seeds, folder, mixed=True), observer=tell)
        result |= {"ranks": list(RANKS), "mixed": summaries(mixed, METRICS[what])}
    return result | {"seconds": round(time.monotonic() - began, 1)}


def describe() -> str:
    """Say at which commit, on what machine and with what libraries."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"commit {commit}; {machine}; Python {platform.python_version()}, torch {torch.__version__}"


# ---------------------------------------------------------------- what it found


def of_seed(results: Results, seed: int) -> Results:
    """Return the results of one seed."""
    return results.where(lambda row: row.seed == seed)


def summaries(study: fedmira.Study, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for every entry of a study, in its order."""
    results = read_results(study.path)
    seeds = sorted({row.seed for row in results.rows})
    by_seed = {seed: of_seed(results, seed) for seed in seeds}
    whole = {metric: by_method(results, metric) for metric in metrics}
    alone = {(metric, seed): by_method(own, metric) for metric in metrics for seed, own in by_seed.items()}
    rows = []
    for label in dict.fromkeys(run.facts.label for run in study.runs):
        scores = {
            metric: {"mean": whole[metric][label].mean, "seeds": [alone[metric, seed][label].mean for seed in by_seed]}
            for metric in metrics
        }
        own = [run for run in study.runs if run.facts.label == label]
        rows.append({**costs(own), "scores": scores, "against": against(whole["loss"][label])})
    return rows


def by_method(results: Results, metric: str) -> dict[str, MethodSummary]:
    return {one.method: one for one in summarise(results, metric=metric)}


def against(one: MethodSummary) -> dict[str, Any] | None:
    """Wins, ties and losses of a method against local, by clients, on the test loss; None for local itself."""
    if one.against is None:
        return None
    return {key: getattr(one.against, key) for key in ("wins", "ties", "losses", "difference", "p_holm")}


def costs(runs: Sequence[fedmira.Run]) -> dict[str, Any]:
    """What the runs of one entry, seed by seed, have in common: settings, bytes of a client and round."""
    facts, records = [run.facts for run in runs], [record for run in runs for record in run.rounds]
    first = facts[0]
    sent = {key: [record[key] // len(record["clients"]) for record in records] for key in ("bytes_up", "bytes_down")}
    return {
        "label": first.label,
        "method": first.method,
        "settings": first.settings,
        "view": "personal" if first.personal else "global",
        "parameters": first.parameters,
        **{key: [min(values), max(values)] for key, values in sent.items()},
        "seeds": [one.seed for one in facts],
    }


# ---------------------------------------------------------------- the page

HEAD = """# Every method on two data sets

Made by `benchmarks/paper/every_method.py` from what it stored in benchmarks/results.

One study for each data set: same clients, base, schedule, steps, optimizer and learning rate for every method, and no
setting was searched for one of them. So a row says how a method does as it comes, not how well it could do. Two get
more than the others: `pooled` takes all clients' steps one after another, and the clients of `fedavg_ft` go on after
the last round, for a pass over their data or as many steps as given. `fedptuning-rate` has a learning rate of its own,
larger than LoRA's by as much as in the public code of MIRA.

Losses are nats per token of the answer on the test split, the mean over clients of each client's mean over seeds; in
brackets the lowest and highest seed. Better, equal, worse: clients, by their loss against training alone; p from a
signed-rank test over clients, Holm-adjusted over the rows. Bytes are of one client in one round, as counted in
`metrics.jsonl`, padding of rows included. Time is measured [elsewhere](speed.md): this machine had other work too. What
each method is: [methods](../methods/README.md).
"""
MISSING = "Not measured yet; measure it by: `{command}`."
NAMES = {"demo": "The demo", "ni": "Natural Instructions"}
ABOUT = {
    "demo": "Four invented languages, four clients each, who contradict their family in some words "
    "([the demo](demo.md)).",
    "ni": f"One public task for each client, {TASKS} from each of {CATEGORIES} categories; at most 6 written answers a "
    "client. The base was pretrained on a CPU in an hour, on other instances of such tasks too: what it writes says "
    "nothing of larger models. A client has trained in few rounds: this is the beginning of a run, not its end.",
}


def make_page(found: Mapping[str, Result]) -> str:
    """Write the page from the stored results of the data sets."""
    parts = [HEAD.rstrip()]
    for what, name in NAMES.items():
        command = f"python benchmarks/paper/every_method.py {what}"
        body = section(what, found[what]) if what in found else [MISSING.format(command=command)]
        parts += [f"## {name}", *body]
    return "\n\n".join(parts) + "\n"


def section(what: str, result: Result) -> list[str]:
    """The set-up of a data set, its tables, and what they show."""
    training, seeds = result["training"], result["seeds"]
    setup = (
        f"{ABOUT[what]} Base {result['base']} in {result['dtype']}; {result['clients']} clients, {result['sampled']} a "
        f"round, {result['rounds']} rounds of {training['local_steps']} steps of {training['batch_size']} examples, "
        f"{training['optimizer']}, learning rate {training['learning_rate']:g}; seeds {seeds}."
    )
    where = f"Measured at {result['where']}, threads: {result['threads']}; {result['seconds'] / 60:.0f} minutes."
    parts = [f"    {result['command']}", setup, where, table(result["rows"], result["metrics"])]
    if "mixed" in result:
        ranks = ", ".join(str(rank) for rank in result["ranks"])
        again = f" Measured again at {result['mixed_where']}." if "mixed_where" in result else ""
        parts += [
            f"The same with ranks {ranks}, {ranks}, ... in the place of 8 for all. Bytes are of a client on "
            f"average: each sends and gets what its rank has room for.{again}",
            table(result["mixed"], result["metrics"]),
        ]
    return [*parts, "### What it shows", "\n".join(f"- {line}" for line in lessons(result))]


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A line for every row."""
    titles = [TITLES[metric] for metric in metrics]
    head = ["", "settings", *titles, "better / equal / worse", "p", "bytes up", "bytes down", "adapters"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        compared = row["against"]
        judged = "" if compared is None else f"{compared['wins']} / {compared['ties']} / {compared['losses']}"
        chance = "" if compared is None or compared["p_holm"] is None else f"{compared['p_holm']:.2g}"
        scores = [score(row["scores"][metric]) for metric in metrics]
        sent = [between(row["bytes_up"]), between(row["bytes_down"])]
        lines.append([row["label"], said(row["settings"]), *scores, judged, chance, *sent, row["view"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score(one: Mapping[str, Any]) -> str:
    """Mean, and in brackets the lowest and highest seed."""
    if one["mean"] is None:
        return "n/a"
    ends = sorted(one["seeds"])
    return f"{one['mean']:.3f} ({ends[0]:.3f} to {ends[-1]:.3f})" if len(ends) > 1 else f"{one['mean']:.3f}"


def said(settings: Mapping[str, Any]) -> str:
    """Settings as in a config, on one line."""
    if not settings:
        return ""
    text: str = yaml.safe_dump(dict(settings), default_flow_style=True, sort_keys=False, width=10_000)
    return f"`{text.strip().strip('{}') if text.count('{') == 1 else text.strip()[1:-1]}`"


def between(ends: Sequence[int]) -> str:
    low, high = ends
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# ---------------------------------------------------------------- what it shows, from the numbers


def lessons(result: Result) -> list[str]:
    """Sentences that follow from any numbers."""
    rows = {row["label"]: row for row in result["rows"]}
    trained = [row for row in result["rows"] if row["method"] not in ("untouched", "pooled")]
    lines = [
        best(trained),
        told_apart(trained),
        noise(trained),
        *(scores_apart(trained, one) for one in result["metrics"]),
    ]
    lines += [graphs(rows), forms(rows), shared(rows), prompts(rows), curvature(rows)]
    if "mixed" in result:
        means = "With a rank per client, a mean of padded factors against means of products"
        lines.append(f"{means}: {names(result['mixed'])}.")
    return [line for line in lines if line]


def loss(row: Row) -> float:
    return float(row["scores"]["loss"]["mean"])


def names(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['label']} ({loss(row):.3f})" for row in sorted(rows, key=loss)) or "none"


def best(rows: Sequence[Row]) -> str:
    """The lowest mean loss of all, and of those with one adapter for all."""
    one_for_all = [row for row in rows if row["view"] == "global" and row["method"] != "groupavg"]
    first, other = min(rows, key=loss), min(one_for_all, key=loss)
    return (
        f"Lowest loss, `pooled` and `untouched` left out here and in the next three lines: {names([first])}. With one "
        f"adapter for all clients: {names([other])}."
    )


def told_apart(rows: Sequence[Row]) -> str:
    """Who is better, worse or not told apart from training alone."""
    kinds: dict[str, list[Row]] = {"better": [], "worse": [], "not told apart": []}
    for row in rows:
        if one := row["against"]:
            clear = one["p_holm"] is not None and one["p_holm"] < CLEAR
            kinds[("better" if one["difference"] < 0 else "worse") if clear else "not told apart"].append(row)
    local = next(row for row in rows if row["label"] == "local")
    judged = "; ".join(f"{kind} are {names(some)}" for kind, some in kinds.items())
    return f"Against training alone ({loss(local):.3f}), at p < {CLEAR}: {judged}."


def scores_apart(rows: Sequence[Row], metric: str) -> str:
    """Where loss and a score disagree: rows below training alone in both."""
    local = next(row for row in rows if row["label"] == "local")
    least = local["scores"][metric]["mean"]
    both = [row for row in rows if loss(row) < loss(local) and row["scores"][metric]["mean"] < least]
    return f"Lower loss than training alone, and yet lower {TITLES[metric]}: {names(both)}." if metric != "loss" else ""


def noise(rows: Sequence[Row]) -> str:
    """How far seeds lie apart, as a measure for differences between rows."""
    widths = {row["label"]: max(row["scores"]["loss"]["seeds"]) - min(row["scores"]["loss"]["seeds"]) for row in rows}
    widest = max(widths, key=lambda label: widths[label])
    return (
        f"Seeds of one method lie up to {widths[widest]:.3f} apart ({widest}), in the median "
        f"{statistics.median(widths.values()):.3f}; a smaller difference between rows says little."
    )


def graphs(rows: Mapping[str, Row]) -> str:
    """MIRA's graphs by loss, and the mean within groups beside the pull within groups."""
    some = [rows[label] for label in ("mira", "mira-random", "mira-uniform", "mira-knn", "mira-learned")]
    mean = f"A mean within the groups in the place of a pull: {names([rows['groupavg']])}"
    return f"MIRA by its graph (mira: known groups): {names(some)}. {mean}."


def forms(rows: Mapping[str, Row]) -> str:
    """What MIRA's forms beyond the paper change."""
    said = {"mira-product": "space: product", "mira-exact": "solver: exact"}
    changes = [f"by {loss(rows[label]) - loss(rows['mira']):+.3f} with `{form}`" for label, form in said.items()]
    return f"On the same graph with the same coupling, MIRA's loss changes {' and '.join(changes)}."


def shared(rows: Mapping[str, Row]) -> str:
    """One adapter on all data in one place, beside FedAvg; FedAvg fine-tuned; FlexLoRA where ranks are equal."""
    some = [rows[label] for label in ("pooled", "fedavg", "fedavg_ft", "flexlora")]
    return f"One adapter from all data, in one place and by means, and fine-tuned: {names(some)}."


def prompts(rows: Mapping[str, Row]) -> str:
    """What a prompt encoder sends, and what it gets for it."""
    share = rows["fedptuning"]["bytes_up"][1] / rows["fedavg"]["bytes_up"][1]
    some = [row for row in rows.values() if row["method"] in ("fedptuning", "fedavg")]
    return f"A prompt encoder is {share:.2f} times what LoRA at this rank sends; losses: {names(some)}."


def curvature(rows: Mapping[str, Row]) -> str:
    """Fed-Sophia beside FedAvg at the same learning rate."""
    ours, plain = rows["fedsophia"], rows["fedavg"]
    return (
        f"Fed-Sophia at FedAvg's learning rate: {loss(ours):.3f} against {loss(plain):.3f}. [Rounds to a loss]"
        "(fedsophia.md) are measured elsewhere, with a rate of its own."
    )


# ---------------------------------------------------------------- the command


def main(
    what: Annotated[What, typer.Argument(help="the data set, or only the page")],
    rounds: Annotated[int | None, typer.Option(min=1, help="default: 25 on the demo, 6 on ni")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="how many, from 0 on")] = 3,
    results: Annotated[Path, typer.Option(help="folder of the stored JSON")] = ROOT / "benchmarks" / "results",
    page: Annotated[Path, typer.Option(help="the page that is written")] = ROOT / "docs" / "results" / "methods.md",
    folder: Annotated[Path | None, typer.Option(help="where the studies go; default: a temporary folder")] = None,
) -> None:
    """Run every method on a data set, store what was found, and write the page."""
    if what is not What.page:
        with tempfile.TemporaryDirectory(prefix="fedmira-every-method-", dir=folder) as place:
            result = measure(what.value, rounds or {"demo": 25, "ni": 6}[what.value], seeds, Path(place))
        results.mkdir(parents=True, exist_ok=True)
        path = results / f"{result['name']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    stored = {name: path for name in NAMES if (path := results / f"methods-{name}.json").is_file()}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in stored.items()}
    page.write_text(make_page(found), encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    typer.run(main)
