"""Privacy of a study: what does not go with it, the account of each run, and what run.json says of it in the end."""

import importlib.metadata
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmira.config.sections import Config, PrivacyConfig, TrainingConfig
from fedmira.data.batches import ClientData
from fedmira.engine.workplace import Workplace
from fedmira.errors import ConfigError, MethodError
from fedmira.methods.base import Cohort, Method
from fedmira.privacy.accountant import ACCOUNTANT, ADJACENCY, SAMPLING, check_installed, epsilon, worst
from fedmira.privacy.budget import KEY_FILE, Budget, Share, Terms, count_affordable, read_spent
from fedmira.study.client_privacy import Wrappers, upload_notes

EACH_LISTED = 64  # clients whose epsilons run.json has; of more it has the largest, as each takes a part of a second
EACH_SPENDS = "every trial trains on the same examples and spends its own epsilon, which nobody adds up; leave it out"
BY_VALIDATION = "chooses by losses on validation examples"


def check_privacy(config: Config) -> None:
    """Raise ConfigError for what does not go with privacy, and if the accountant is not installed."""
    if config.privacy is None:
        return
    check_installed()
    asks = {
        "evaluation.keep: best": config.evaluation.keep == "best",
        "federation.early_stopping": config.federation.early_stopping is not None,
    }
    if faults := [_unprotected(key) for key, found in asks.items() if found and not config.privacy.validation]:
        raise ConfigError(faults)


def _unprotected(what: str) -> str:
    return (
        f"privacy: {what} {BY_VALIDATION}, which costs privacy that nobody accounts for; take it out, or write "
        "privacy.validation: true if validation examples need no privacy"
    )


def held_back(config: Config, clients: Sequence[ClientData]) -> list[ClientData]:
    """Return the clients as a study may use them: with privacy, without validation examples unless it says so."""
    if config.privacy is None or config.privacy.validation:
        return list(clients)
    return [replace(client, validation=()) for client in clients]


def check_method(config: Config, method: Method, where: str) -> None:
    """Raise MethodError if a method looks at examples in a way that no budget pays for."""
    if config.privacy is None:
        return
    for why in _unfit(config.privacy, method):
        raise MethodError(f"{where}: privacy: method '{method.name}' {why}; leave it out")


def _unfit(section: PrivacyConfig, method: Method) -> Iterator[str]:
    regime = method.regime
    if regime.trainees == "pool":
        yield "trains on all data in one place, of which no client has a budget"
    if regime.gradients is None:
        yield "needs more of training examples than gradients, which alone are made private"
    if regime.tune is not None:
        yield "lets clients train, or choose, after the last round, which no budget pays for"
    if method.client.gate is not None:
        yield "keeps the mean of training prompts, which is not private"
    if (regime.scorings or regime.tolerance is not None) and not section.validation:
        yield f"{BY_VALIDATION}: write privacy.validation: true if these need no privacy, or"


def check_profile(config: Config) -> None:
    """Raise MethodError if a method asks for a profile of the clients' data, which is a mean over their examples."""
    if config.privacy is not None:
        raise MethodError("privacy: a profile of the clients' data is not private; take another graph than knn")


def shares_of(examples: Mapping[str, int], training: TrainingConfig) -> dict[str, Share]:
    """Return how each client trains in a round. examples: to train on, of each."""
    shares = {}
    for client, count in examples.items():
        per_step = min(training.batch_size * training.gradient_accumulation_steps, count)
        steps = training.local_steps or (training.local_epochs or 0) * -(-count // per_step)
        shares[client] = Share(count, per_step, steps)
    return shares


def counts_of(clients: Sequence[ClientData]) -> dict[str, int]:
    """Return how many examples each client trains on."""
    return {client.id: len(client.train) for client in clients}


def terms_of(section: PrivacyConfig, method: Method) -> Terms:
    """Return what a run promises, as plain values."""
    gradients = method.regime.gradients or 1
    return Terms(section.epsilon, section.delta, float(section.noise_multiplier), section.clip, gradients)


def study_notes(
    config: Config,
    label: str,
    methods: Mapping[int, Method],
    training: TrainingConfig,
    clients: Sequence[ClientData],
    cohorts: Mapping[int, Cohort],
    wrappers: Wrappers,
) -> list[str]:
    """Return the notes of all seeds' runs of a method, each once; raises as privacy_notes does."""
    schedules = ((method, cohorts[seed].schedule) for seed, method in methods.items())
    counts = counts_of(clients)
    notes = (privacy_notes(config, label, method, training, counts, schedule) for method, schedule in schedules)
    schedules_of = {seed: cohort.schedule for seed, cohort in cohorts.items()}
    uploads = upload_notes(config, label, methods, wrappers, schedules_of)
    return [*dict.fromkeys(note for some in notes for note in some), *uploads]


def privacy_notes(
    config: Config,
    label: str,
    method: Method,
    training: TrainingConfig,
    examples: Mapping[str, int],
    schedule: Sequence[np.ndarray],
) -> list[str]:
    """Say how far the budget of a run reaches, where not to the last round. examples: to train on, of each client.

    Raises MethodError as count_rounds does.
    """
    section = config.privacy
    affordable = count_rounds(config, label, method, training, examples, schedule)
    if section is None or affordable is None:
        return []
    notes = []
    if affordable < len(schedule):
        notes.append(
            f"{label}: the privacy budget is spent after round {affordable} of {len(schedule)}; the run ends there"
        )
    most = max(examples.values())
    if section.delta * most >= 1:
        notes.append(
            f"{label}: privacy.delta = {section.delta:g} is not below 1 / {most}, one over the examples of the largest "
            "client: it would allow to publish a whole example"
        )
    return notes


def count_rounds(
    config: Config,
    label: str,
    method: Method,
    training: TrainingConfig,
    examples: Mapping[str, int],
    schedule: Sequence[np.ndarray],
) -> int | None:
    """Return how many rounds of a schedule the budget pays for; None where there is none to pay.

    examples: to train on, of each client, in the order of the schedule's positions. Raises MethodError if it does not
    pay for one, or the method looks at examples in ways that it does not pay for.
    """
    check_method(config, method, label)
    section = config.privacy
    if section is None or method.regime.trainees == "nobody":
        return None
    ids = tuple(examples)
    named = [[ids[k] for k in sampled.tolist()] for sampled in schedule]
    affordable, first = count_affordable(terms_of(section, method), shares_of(examples, training), named)
    if not affordable:
        raise MethodError(
            f"{label}: one round takes a client's epsilon to {first:.3g} at delta = {section.delta:g}, above "
            f"privacy.epsilon = {section.epsilon:g}; raise noise_multiplier, take fewer local steps or smaller batches"
        )
    return affordable


def budget_of(
    config: Config,
    method: Method,
    training: TrainingConfig,
    workplace: Workplace,
    folder: Path,
    *,
    threads: int,
    data: Callable[[], Sequence[str]],
) -> Budget | None:
    """Return the account of one run, which is in its folder; None where there is no privacy, or nobody trains.

    data: gives a fingerprint of each client's examples.
    """
    if config.privacy is None or method.regime.trainees == "nobody":
        return None
    base = workplace.base
    conditions = [
        config.model_dump_json(),
        *data(),
        *(f"{name} {importlib.metadata.version(name)}" for name in ("fedmira", "torch", "transformers", "numpy")),
        f"{platform.node()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        f"{base.dtype} {threads} {workplace.cohort} {workplace.at_once} {workplace.recompute}",
    ]
    if base.device.type != "cpu":  # where sums may come out otherwise every time
        conditions.append(secrets.token_hex(16))
    return Budget(
        folder, terms_of(config.privacy, method), shares_of(counts_of(workplace.clients), training), conditions
    )


def account(config: Config, method: Method, clients: Sequence[ClientData], folder: Path) -> Mapping[str, Any] | None:
    """Return what run.json says of the privacy of a run that has ended; None where there was none."""
    section = config.privacy
    if section is None:
        return None
    spent = read_spent(folder)
    distinct = worst(spent.values())
    facts: dict[str, Any] = {
        "epsilon": max((epsilon(one, section.delta) for one in distinct), default=0.0),
        "delta": section.delta,
        "budget": section.epsilon,
        "noise_multiplier": section.noise_multiplier,
        "clip": section.clip,
        "gradients": method.regime.gradients,
        "steps": max((sum(one.values()) for one in spent.values()), default=0),
        "adjacency": ADJACENCY,
        "sampling": SAMPLING,
        "accountant": f"{ACCOUNTANT}, dp-accounting {importlib.metadata.version('dp-accounting')}",
        "validation": section.validation,
    }
    if len(clients) <= EACH_LISTED:
        facts["epsilons"] = {client.id: epsilon(spent.get(client.id, {}), section.delta) for client in clients}
    return facts


def forget_key(folder: Path) -> None:
    """Remove the key of a run's noise, which nobody needs once the run has ended."""
    (folder / KEY_FILE).unlink(missing_ok=True)
