"""Fed-Sophia's claim is fewer rounds: rounds to a given loss, against FedAvg with AdamW and with SGD clients.

    python benchmarks/fedsophia/run.py

writes docs/results/fedsophia.md. The demo's tasks and base; one shared adapter; 3 seeds, and a learning rate that is
searched for each on another. Losses are over the validation splits of all clients.
"""

import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import fedmira
from fedmira.disk.folders import RunFolder

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "bench-fedsophia"
SEEDS, SEARCH_SEED, ROUNDS, BATCH = [0, 1, 2], 100, 25, 8
TARGETS = (2.5, 2.0, 1.8)  # nats per token, chosen before measuring: the demo's FedAvg ends at 1.7; rates by the last


@dataclass(frozen=True)
class Contender:
    """A method with its clients' optimizer, and the learning rates that are tried."""

    id: str
    title: str
    method: str
    training: tuple[str, ...]
    rates: tuple[float, ...]
    passes: float  # forward and backward, of a client in one local step


ADAM_RATES, SGD_RATES = (1e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2), (0.3, 0.5, 1.0, 2.0, 3.0, 10.0)
CONTENDERS = (
    Contender("adamw", "fedavg, AdamW, fresh each round", "{name: fedavg}", (), ADAM_RATES, 1),
    Contender("kept", "fedavg, AdamW, moments kept", "{name: fedavg}", ("keep_optimizer=true",), ADAM_RATES, 1),
    Contender("sgd", "fedavg, SGD", "{name: fedavg}", ("optimizer=sgd",), SGD_RATES, 1),
    Contender("sophia", "fedsophia", "{name: fedsophia, form: public}", (), ADAM_RATES, 1.1),
)


@dataclass(frozen=True)
class Curve:
    """One run. losses: after each round, infinite where a loss is not finite."""

    losses: tuple[float, ...]

    def rounds_to(self, target: float) -> float:
        """The first round that ends at or below a loss, infinite if none does."""
        return next((float(number) for number, loss in enumerate(self.losses, 1) if loss <= target), math.inf)


def curves(one: Contender, rate: float, seeds: Sequence[int]) -> list[Curve]:
    """Run a contender, or read what an earlier call has left."""
    place = RUNS / f"{one.id}-{rate:g}-seed{'s' * (len(seeds) > 1)}"
    overrides = [
        f"output_dir={place}",
        f"seeds={list(seeds)}",
        f"federation.rounds={ROUNDS}",
        f"methods=[{one.method}]",
        f"training.learning_rate={rate}",
        f"training.batch_size={BATCH}",
        *(f"training.{setting}" for setting in one.training),
        "evaluation.metrics=[loss]",
    ]
    begun = (place / "config.yaml").is_file()
    study = fedmira.resume(place) if begun else fedmira.run(fedmira.load_config("demo", overrides))
    found = []
    for run in study.runs:
        records = RunFolder(run.path).records()
        losses = [math.inf if record["validation_loss"] is None else record["validation_loss"] for record in records]
        found.append(Curve(tuple(losses)))
    return found


def search(one: Contender) -> dict[float, Curve]:
    """A run for each learning rate, the best first: fewest rounds to the last target, then the lowest last loss."""
    found = {rate: curves(one, rate, [SEARCH_SEED])[0] for rate in one.rates}
    order = sorted(found, key=lambda rate: (found[rate].rounds_to(TARGETS[-1]), found[rate].losses[-1]))
    return {rate: found[rate] for rate in order}


def spread(values: Sequence[float]) -> str:
    """Median and both ends."""
    middle, low, high = (f"{value:g}" for value in (statistics.median(values), min(values), max(values)))
    text = middle if low == high else f"{middle} ({low} to {high})"
    return text.replace("inf", "never")


def row(one: Contender, rate: float, found: Sequence[Curve]) -> str:
    """One line of the table."""
    last = statistics.mean(curve.losses[-1] for curve in found)
    reached = " | ".join(spread([curve.rounds_to(target) for curve in found]) for target in TARGETS)
    return f"| {one.title} | {rate:g} | {reached} | {last:.3f} | {one.passes:g} |"


def tried(one: Contender, found: dict[float, Curve]) -> str:
    """One line of the table of learning rates."""
    cells = []
    for rate in one.rates:
        text = f"{rate:g}: {spread([found[rate].rounds_to(TARGETS[-1])])}, {found[rate].losses[-1]:.3f}"
        cells.append(f"**{text}**" if rate == next(iter(found)) else text)
    return f"| {one.title} | {' | '.join(cells)} |"


PAGE = """# Fed-Sophia: fewer rounds?

Made by `{command}` at {where}. Seeds {seeds}.

The tasks and the base of the [demo](demo.md): 16 clients in four languages, all present in every round of 5 local
steps of {batch} examples, one adapter for all. Fed-Sophia's settings are its defaults but for `form: public`, so that a
learning rate is the longest step of one number, as it nearly is with AdamW. FedAvg's clients clip gradients at norm 1;
Fed-Sophia's do not.

Rounds until the mean validation loss of all clients (nats per token) is at most the number above; median of {count}
seeds and both ends; never: not within {rounds} rounds. Passes: forward and backward, of a client in one local step.

| | learning rate | {targets} | loss after round {rounds} | passes |
|---|---|{rule}---|---|
{table}

{verdict}

## Learning rates

Rounds to {last} and the loss after round {rounds}, on seed {search} alone; in bold what the table above uses.

| |{blank}
|---|{wide}
{rates}

One task, one base, one number of local steps, and only the learning rate was searched: rho and the betas are Sophia's
own, which were found for pretraining.
"""


def verdict(medians: dict[str, float]) -> str:
    """Say who needed how many rounds to the last target. medians: title -> rounds."""
    best = {kind: min(v for k, v in medians.items() if k.startswith(kind)) for kind in ("fedsophia", "fedavg")}
    words = {kind: "more than " + str(ROUNDS) if value == math.inf else f"{value:g}" for kind, value in best.items()}
    if best["fedsophia"] == best["fedavg"]:
        outcome = "no difference"
    else:
        outcome = "fewer" if best["fedsophia"] < best["fedavg"] else "not fewer"
    return (
        f"To {TARGETS[-1]} the best of Fed-Sophia needs {words['fedsophia']} rounds, the best of FedAvg "
        f"{words['fedavg']}: {outcome}."
    )


def main() -> None:
    """Search, run, write the page."""
    torch.set_num_threads(1)  # the base is so small that a second thread costs more than it brings
    searched = {one: search(one) for one in CONTENDERS}
    best = {one: next(iter(found)) for one, found in searched.items()}
    runs = {one: curves(one, rate, SEEDS) for one, rate in best.items()}
    medians = {
        one.title: statistics.median(curve.rounds_to(TARGETS[-1]) for curve in found) for one, found in runs.items()
    }
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = PAGE.format(
        command=f"python {Path(__file__).relative_to(ROOT)}",
        where=f"commit {commit.stdout.strip()}; {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, float32, one thread",
        seeds=SEEDS,
        count=len(SEEDS),
        rounds=ROUNDS,
        batch=BATCH,
        targets=" | ".join(str(target) for target in TARGETS),
        rule="---|" * len(TARGETS),
        table="\n".join(row(one, best[one], found) for one, found in runs.items()),
        verdict=verdict(medians),
        blank=" |" * len(ADAM_RATES),
        wide="---|" * len(ADAM_RATES),
        last=TARGETS[-1],
        search=SEARCH_SEED,
        rates="\n".join(tried(one, found) for one, found in searched.items()),
    )
    (ROOT / "docs" / "results" / "fedsophia.md").write_text(page, encoding="utf-8")
    print(page, file=sys.stderr)


if __name__ == "__main__":
    main()
