"""Compare methods on equal terms: the same data, splits, schedule and start, each tuned by the same number of runs.

    OUTPUT/tuning/learning-rate   a study: every learning rate of every method, with the first seed
    OUTPUT/tuning/settings        a study: other values of a method's own setting, at its best learning rate
    OUTPUT/tuning.json            what was tried, its validation losses, and what was chosen
    OUTPUT/comparison             the comparison, with every seed: report.html, summary.json, adapters
    OUTPUT/matrix                 every adapter on every client's test split, where that was asked for

Each is a study as `fedmira run` makes it. What is complete is used again, what was stopped goes on, and methods and
seeds may be added. Data and base are loaded, and the untouched base is scored, once for all three.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmira.config.sections import PLACES, Config, MethodEntry
from fedmira.disk.files import make_folder, write_json
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import Observer
from fedmira.errors import ConfigError, StoreError
from fedmira.methods import recipe_of
from fedmira.reports.crossing import write_crossings
from fedmira.reports.record import read_study
from fedmira.study.assemble import keep_positions
from fedmira.study.matrix import check_matrix, write_matrices
from fedmira.study.privacy import EACH_SPENDS
from fedmira.study.run import Common, go_on, lasting, saved_facts, start
from fedmira.study.trackers import check_trackers
from fedmira.study.tuning import Candidate, Tuned, best_of, choose, first_candidates, second_candidates

LEARNING_RATE, SETTINGS = "tuning/learning-rate", "tuning/settings"
COMPARISON, TUNING_FILE, MATRICES = "comparison", "tuning.json", "matrix"


def with_methods(config: Config, entries: Sequence[MethodEntry], folder: Path, **changes: Any) -> Config:
    """Return the config with other methods and another folder."""
    return config.model_copy(update={"methods": list(entries), "output_dir": str(folder), **changes})


def compare(config: Config, *, budget: int, observer: Observer, overwrite: bool = False, matrix: bool = False) -> Path:
    """Tune and compare the methods of a checked config; return the folder of the comparison.

    budget: runs of tuning that each method gets; 1 = none is tuned. overwrite: replace what is in the folder. matrix:
    test every adapter on every client. Raises StoreError if the folder is a study, or holds a comparison of other
    settings; ConfigError if there are too many clients for a matrix.
    """
    check_trackers(config.report_to)
    if config.privacy is not None and budget > 1:
        raise ConfigError([f"privacy: {EACH_SPENDS}, or compare with a budget of 1"], "compare")
    config = keep_positions(config, [recipe_of(entry) for entry in config.methods])
    output = Path(config.output_dir)
    check_container(output)
    with lasting(None) as common:
        if matrix:  # said before anything is trained
            check_matrix(len(common.prepare(config, observer).federation))
        tried = _tune(config, output, budget, common, observer, overwrite=overwrite)
        tuned = choose(config, tried)
        if budget > 1:
            _write_tuning(output, config, budget, tuned)
        final = with_methods(config, [one.entry for one in tuned], output / COMPARISON)
        carry_on(final, common, observer, overwrite=overwrite)
        if matrix:
            folder = StudyFolder(output / COMPARISON)
            write_matrices(folder, common.prepare(folder.config(), observer, saved_facts(folder)), observer)
            write_crossings(read_study(folder.path), output / MATRICES)
        return output / COMPARISON


def _tune(
    config: Config, output: Path, budget: int, common: Common, observer: Observer, *, overwrite: bool
) -> dict[str, Sequence[Candidate]]:
    """Carry out the two tuning studies; return by label what was tried, with its losses."""
    tried: dict[str, Sequence[Candidate]] = {entry.folder: [] for entry in config.methods}
    if budget == 1:
        return tried
    evaluation = config.evaluation.model_copy(update={"metrics": ["loss"]})
    report = config.report.model_copy(update={"examples": False})
    less = {"seeds": config.seeds[:1], "evaluation": evaluation, "report": report, "report_to": []}
    # with every metric of the comparison, so that the studies of the tuning need not score the base again
    common.wanted = config.evaluation.metrics
    for place in (LEARNING_RATE, SETTINGS):
        first = place == LEARNING_RATE
        found = first_candidates(config, budget) if first else second_candidates(config, tried, budget)
        entries = [one.entry for some in found.values() for one in some]
        if not entries:
            continue
        study = with_methods(config, entries, output / place, **less)
        carry_on(study, common, observer, overwrite=overwrite)
        losses = {run.facts.label: run.facts.validation_loss for run in StudyFolder(output / place).runs()}
        for label, some in found.items():
            known = [replace(one, loss=losses[one.entry.folder]) for one in some]
            tried[label] = [*tried[label], *known]
    return tried


def check_container(output: Path) -> None:
    """Raise StoreError if a folder for several studies is a study itself."""
    if (output / "config.yaml").is_file():
        raise StoreError(f"output_dir '{output}' holds a study of its own; choose another output_dir=...")


def carry_on(config: Config, common: Common, observer: Observer, *, overwrite: bool) -> None:
    """Begin a study, or go on with the one that is there, for methods and seeds that it may not have yet.

    Raises StoreError if it differs in anything else.
    """
    folder = StudyFolder(Path(config.output_dir))
    if overwrite or not folder.is_begun:
        folder.check_free(overwrite=overwrite)
        start(folder, config, observer, overwrite=overwrite, common=common)
        return
    stored = folder.config()
    if differences := _differences(stored, config):
        raise StoreError(
            f"'{folder.path}' holds a study with other settings ({', '.join(differences)}); only methods and seeds may "
            "be added: take another output_dir=..., or --overwrite"
        )
    labels = [entry.folder for entry in config.methods]
    more = [entry for entry in stored.methods if entry.folder not in labels]
    seeds = [*config.seeds, *(seed for seed in stored.seeds if seed not in config.seeds)]
    whole = config.model_copy(update={"methods": [*config.methods, *more], "seeds": seeds})
    go_on(folder, whole, observer, only=None, rewrite=True, common=common)


def _differences(stored: Config, config: Config) -> list[str]:
    """Name what differs between a stored study and one that would go on with it; new methods and seeds do not count."""
    mine, theirs = (one.model_dump(mode="json", by_alias=True) for one in (config, stored))
    for section in (mine["federation"], theirs["federation"]):
        for key in PLACES:  # where it is computed changes no result
            section.pop(key)
    free = ("methods", "seeds", "output_dir", "report_to")
    for one in (mine, theirs):  # grows with a method of virtual tokens; if that cuts texts, data differs: see run.go_on
        del one["data"]["positions_ahead"]
    found = [key for key in mine if key not in free and mine[key] != theirs[key]]
    entries = {entry.folder: entry.model_dump(by_alias=True) for entry in stored.methods}
    for entry in config.methods:
        own = entry.model_dump(by_alias=True)
        if entries.get(entry.folder, own) != own:
            found.append(f"method '{entry.folder}'")
    return found


def _write_tuning(output: Path, config: Config, budget: int, tuned: Sequence[Tuned]) -> None:
    """Write what was tried and chosen."""
    methods: dict[str, Mapping[str, Any]] = {}
    for one in tuned:
        tried = [{**candidate.values, "validation_loss": candidate.loss} for candidate in one.candidates]
        best = best_of(one.candidates)
        methods[one.entry.folder] = {"tried": tried, "chosen": {} if best is None else dict(best.values)}
    make_folder(output)
    write_json(output / TUNING_FILE, {"budget": budget, "seed": config.seeds[0], "methods": methods})
