"""Search a method's settings by validation loss: points of a sweep that optuna proposes in the place of a grid.

Each trial is a study as a point of a sweep is, in a folder of its own; what is minimised is the mean validation loss
over clients of the method's final adapters, mean over seeds. Tests are never looked at. The proposals follow from the
losses alone (a tree-structured Parzen estimator with a fixed seed), so that a search that was stopped, or gets more
trials, finds its studies again and goes on.
"""

import importlib.util
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import Observer
from fedmira.errors import ConfigError
from fedmira.study.compare import check_container
from fedmira.study.loading import load_config
from fedmira.study.privacy import EACH_SPENDS
from fedmira.study.sweep import Axis, Commons, Grid, Point, Range, axes_of, points_of, write_table
from fedmira.study.trackers import check_trackers

HINT = "trials need optuna: pip install 'fedmira[optuna]'"
DIGITS = 3  # of a proposed number, so that it can be read and named
SEED = 0
FIRST = 5  # trials that are drawn at random before losses guide the search


def search(
    path: str | Path,
    grid: Grid,
    overrides: Sequence[str],
    *,
    trials: int,
    observer: Observer,
    overwrite: bool = False,
) -> tuple[list[dict[str, Any]], Point]:
    """Carry out `trials` studies; return the lines of their table, and the point of the lowest validation loss.

    grid: values to choose from, or a Range. Equal proposals are one study. Raises ConfigError, before anything is run:
    optuna is not installed, a setting that is nowhere, a bound that is not allowed, several methods beside `local`.
    """
    if trials < 1:
        raise ConfigError([f"--trials {trials}: must be at least 1"], "sweep")
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError([HINT], "sweep")
    config = load_config(path, overrides)
    if config.privacy is not None:
        raise ConfigError([f"privacy: {EACH_SPENDS}"], "sweep")
    axes = axes_of(grid, config)
    judged = [entry.folder for entry in config.methods if entry.name not in ("local", "untouched")]
    if len(judged) != 1:
        named = ", ".join(judged) or "none"
        raise ConfigError(
            [f"trials search the settings of one method beside 'local', and this config has: {named}"], "sweep"
        )
    for ends in zip(*(_ends(axis) for axis in axes), strict=False):  # a bound that is refused is told before any run
        points_of(config, [_only(axis, value) for axis, value in zip(axes, ends, strict=True)], str(path))
    check_trackers(config.report_to)
    check_container(Path(config.output_dir))
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SEED, n_startup_trials=FIRST))
    space = {axis.key: _distribution(optuna.distributions, axis.values) for axis in axes}
    found = dict[str, tuple[Point, float]]()
    with closing(Commons()) as commons:
        for _ in range(trials):
            trial = study.ask(space)
            values = [_rounded(trial.params[axis.key], axis.values) for axis in axes]
            (point,) = points_of(
                config, [_only(axis, value) for axis, value in zip(axes, values, strict=True)], str(path)
            )
            if point.name not in found:
                commons.carry_on(point, observer, overwrite=overwrite)
                found[point.name] = point, _loss(point, judged[0])
            loss = found[point.name][1]
            if math.isfinite(loss):
                study.tell(trial, loss)
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
    points = [point for point, _ in found.values()]
    best = min(found.values(), key=lambda one: one[1])[0]
    return write_table(points), best


def _ends(axis: Axis) -> Sequence[Any]:
    return (axis.values.low, axis.values.high) if isinstance(axis.values, Range) else axis.values


def _only(axis: Axis, value: Any) -> Axis:
    return replace(axis, values=(value,))


def _distribution(kinds: Any, values: Sequence[Any] | Range) -> Any:
    """Return optuna's space of a setting: numbers of a range, by their logarithm where it is wide, or a choice."""
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(list(values))
    if values.whole:
        return kinds.IntDistribution(values.low, values.high, log=values.wide)
    return kinds.FloatDistribution(values.low, values.high, log=values.wide)


def _rounded(value: Any, values: Sequence[Any] | Range) -> Any:
    """Round a proposed number to a few digits, inside its range."""
    if not isinstance(values, Range) or values.whole:
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), values.low), values.high)


def _loss(point: Point, label: str) -> float:
    """Return a method's mean validation loss over its seeds; infinite where one has none that is finite."""
    runs = [run.facts for run in StudyFolder(Path(point.config.output_dir)).runs()]
    losses = [facts.validation_loss for facts in runs if facts.label == label]
    known = [math.inf if loss is None or not math.isfinite(loss) else loss for loss in losses]
    return sum(known) / len(known)
