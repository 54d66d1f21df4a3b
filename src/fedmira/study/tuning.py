"""What is tuned of a method before it is compared, and by how many runs: the same number for every method.

A budget of B runs a method, with one seed: first learning rates, then, where the method's own setting has v values to
try (`TUNED` in its file), the other v - 1 values at the best rate. These get the last v - 1 runs, but half of the
budget at most: a poor learning rate hides everything else. What an entry sets itself is not tuned; but where it has an
optimizer of its own, tuning begins at the learning rate beside it. The lowest mean validation loss over clients wins,
of equal ones the earlier; a loss that is not finite never does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmira.config.sections import Config, MethodEntry
from fedmira.methods import load

# Of the config's learning rate, the first ones where the budget is small.
FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25, 8.0, 0.125, 16.0, 0.0625)


@dataclass(frozen=True)
class Candidate:
    """One run of the tuning: an entry of the tuning study, and what it tries. loss: its validation loss, once known."""

    entry: MethodEntry
    values: Mapping[str, Any]
    loss: float | None = None


@dataclass(frozen=True)
class Tuned:
    """A method whose settings are chosen. candidates: all that were tried, with their losses."""

    entry: MethodEntry
    candidates: Sequence[Candidate]


def with_values(entry: MethodEntry, values: Mapping[str, Any], label: str | None = None) -> MethodEntry:
    """Return an entry with other values; `learning_rate` is the method's own where it has one."""
    raw = entry.as_written
    own = load(entry.name).Config.model_fields
    for key, value in values.items():
        if key == "learning_rate" and key not in own:
            raw["training"] = {**raw.get("training", {}), key: value}
        else:
            raw[key] = value
    return MethodEntry.model_validate(raw if label is None else {**raw, "label": label})


def knob_of(entry: MethodEntry) -> tuple[str, Sequence[Any]] | None:
    """Return the setting of a method that is tuned, and its values; None: it has none, or the entry sets it."""
    tuned: Mapping[str, Sequence[Any]] = getattr(load(entry.name), "TUNED", {})
    return next(((key, values) for key, values in tuned.items() if key not in entry.settings), None)


def rates_of(entry: MethodEntry, config: Config, budget: int) -> list[float]:
    """Return the learning rates to try; none where the entry sets its own for the optimizer of all."""
    module = load(entry.name)
    own = module.Config.model_fields.get("learning_rate")
    given = {} if entry.training is None else entry.training.given
    if "learning_rate" in entry.settings or ("learning_rate" in given and "optimizer" not in given):
        return []
    usual = None if own is None else own.default  # None: the config's
    middle = config.training_of(entry).learning_rate if usual is None else usual
    knob = knob_of(entry)
    count = budget if knob is None else max((budget + 1) // 2, budget - len(knob[1]) + 1)
    return [middle * factor for factor in FACTORS[:count]]


def first_candidates(config: Config, budget: int) -> dict[str, list[Candidate]]:
    """Return by label the entries of the first tuning study: learning rates, everything else as it is."""
    found: dict[str, list[Candidate]] = {}
    for entry in config.methods:
        rates = rates_of(entry, config, budget)
        found[entry.folder] = _numbered(entry, [{"learning_rate": rate} for rate in rates if len(rates) > 1])
    return found


def second_candidates(
    config: Config, first: Mapping[str, Sequence[Candidate]], budget: int
) -> dict[str, list[Candidate]]:
    """Return by label the entries of the second: other values of a method's own setting, at its best learning rate."""
    found: dict[str, list[Candidate]] = {}
    for entry in config.methods:
        knob = knob_of(entry)
        if knob is None or budget == 1:
            found[entry.folder] = []
            continue
        key, values = knob
        tried = best_of(first[entry.folder])
        base = {} if tried is None else dict(tried.values)
        usual = load(entry.name).Config().model_dump(by_alias=True)[key]
        others = [value for value in values if tried is None or value != usual]
        room = max(0, budget - len(first[entry.folder]))
        found[entry.folder] = _numbered(entry, [{**base, key: value} for value in others[:room]])
    return found


def best_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate with the lowest validation loss; None where there is none that is finite."""
    finite = [one for one in candidates if one.loss is not None and math.isfinite(one.loss)]
    return min(finite, key=lambda one: one.loss if one.loss is not None else math.inf, default=None)


def choose(config: Config, tried: Mapping[str, Sequence[Candidate]]) -> list[Tuned]:
    """Return every method with the settings that its best candidate had; as it is where nothing was tried."""
    chosen = []
    for entry in config.methods:
        best = best_of(tried[entry.folder])
        chosen.append(Tuned(entry if best is None else with_values(entry, best.values), tried[entry.folder]))
    return chosen


def _numbered(entry: MethodEntry, values: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """Return candidates with labels of their own: a folder's name cannot hold every value."""
    stem = entry.folder[:56]
    return [Candidate(with_values(entry, some, f"{stem}-{number}"), some) for number, some in enumerate(values, 1)]
