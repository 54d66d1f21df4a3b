"""Write docs/results/first-real-runs.md from the run folders of the two configs beside this file.

fedmira run benchmarks/first_real_runs/dolly.yaml
fedmira run benchmarks/first_real_runs/natural_instructions.yaml
python benchmarks/first_real_runs/write.py [RUNS]        # the folder that holds first-ni and first-dolly
"""

import json
import sys
from pathlib import Path

import fedmira
from fedmira.reports.results import read_results
from fedmira.reports.stats import MethodSummary, summarise, summarise_base

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = {"first-ni": ("Natural Instructions", "natural_instructions"), "first-dolly": ("Dolly-15k", "dolly")}


def cell(one: MethodSummary | None) -> str:
    """Mean and half interval."""
    return "n/a" if one is None or one.mean is None else f"{one.mean:.3f} ± {one.half_width:.3f}"


def section(study: fedmira.Study, title: str, config: str) -> str:
    """One data set: counts, results for all clients and for those ever sampled, costs."""
    results = read_results(study.path)
    runs = {run.facts.label: run for run in study.runs}
    first = next(iter(runs.values()))
    clients = json.loads((first.path / "clients.json").read_text(encoding="utf-8"))
    ever = {name for record in first.rounds for name in record["clients"]}
    some = results.where(lambda row: row.client in ever)
    examples = sum(sum(one["examples"].values()) + one["dropped"] for one in clients.values())
    lines = []
    for label in [None, *runs]:
        cells = []
        for metric in ("loss", "rouge_l"):
            for part in (results, some):
                if label is None:
                    cells.append(cell(summarise_base(part, metric=metric)))
                else:
                    cells.append(cell(next(one for one in summarise(part, metric=metric) if one.method == label)))
        against = ""
        if label is not None and label != "local":
            compared = next(one for one in summarise(some, metric="loss") if one.method == label).against
            assert compared is not None
            p = "n/a" if compared.p_holm is None else f"{compared.p_holm:.2g}"
            against = f"{compared.wins} / {compared.ties} / {compared.losses}, p = {p}"
        lines.append(f"| {label or 'untouched base'} | {' | '.join(cells)} | {against} |")
    costs = []
    for label, run in runs.items():
        facts, rounds = run.facts, run.rounds
        training = sum(record["seconds_training"] for record in rounds)
        tokens = sum(record["tokens"] for record in rounds)
        each = rounds[0]["bytes_up"] / len(rounds[0]["clients"]) / 1e6
        before = [value for record in rounds for value in record["loss_before"] if value is not None]
        after = [value for record in rounds for value in record["loss_after"] if value is not None]
        pull = facts.pull_percent
        pulled = f"{pull[1]:.1f} ({pull[0]:.0f} to {pull[2]:.0f})" if pull else ""
        costs.append(
            f"| {label} | {sum(record['seconds'] for record in rounds) / 60:.1f} | {training / 60:.1f} "
            f"| {tokens / training:,.0f} | {each:.2f} | {pulled} "
            f"| {sum(before) / len(before):.3f} → {sum(after) / len(after):.3f} |"
        )
    facts = first.facts
    return f"""## {title}

    fedmira run benchmarks/first_real_runs/{config}.yaml

{len(clients)} clients, {examples} examples ({sum(one["examples"]["train"] for one in clients.values())} to train on, \
{min(one["examples"]["train"] for one in clients.values())} to \
{max(one["examples"]["train"] for one in clients.values())} a client; \
{sum(one["trained_tokens"] for one in clients.values())} trained tokens). Truncation at 512 tokens: \
{sum(one["prompts_cut"] for one in clients.values())} prompts cut at their start, \
{sum(one["answers_cut"] for one in clients.values())} answers cut at their end, \
{sum(one["dropped"] for one in clients.values())} dropped. {facts.sampled} clients a round; {len(ever)} of \
{len(clients)} were ever sampled. Test split, mean ± half of the 95 % t-interval over clients, one seed.

| method | loss, all {len(clients)} | loss, ever sampled | ROUGE-L, all | ROUGE-L, ever sampled | \
loss against local, ever sampled (better / equal / worse) |
|---|---|---|---|---|---|
{chr(10).join(lines)}

| method | minutes, rounds | of these training | tokens trained per second | MB up = down, a client and round \
| pull per cent: mean (range) | validation loss of the sampled, before → after the merge |
|---|---|---|---|---|---|---|
{chr(10).join(costs)}

Base {facts.base_model} in {facts.dtype}, rank 8 on all linear layers ({facts.parameters:,} parameters a \
client), {facts.threads} threads, \
torch {facts.versions["torch"]}, transformers {facts.versions["transformers"]}.
"""


def main() -> None:
    """Write the page from the study folders that are there."""
    runs = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs"
    parts = [section(fedmira.Study(runs / name), *NAMES[name]) for name in NAMES if (runs / name).is_dir()]
    head = (HERE / "head.md").read_text(encoding="utf-8")
    (ROOT / "docs" / "results" / "first-real-runs.md").write_text(head + "\n" + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
