"""The Python face of FedMira: run or resume a study, read back its results and adapters.

A study is one config: the same data, base model and schedule for every method and seed. Everything that can be wrong is
checked before a folder is made; what a run has saved is never overwritten. What a call needs beside the folders is
imported when it is called. Configs are loaded in loading.py, which imports less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmira.disk.client_names import read_client_names
from fedmira.disk.folders import RunFolder, StudyFolder, find_study
from fedmira.engine.events import Observer, silent
from fedmira.errors import ConfigError, StoreError, resume_command
from fedmira.names import shown_name

if TYPE_CHECKING:
    import pandas as pd

    from fedmira.config.sections import Config
    from fedmira.disk.run_facts import RunFacts
    from fedmira.export.merged_model import Merged
    from fedmira.methods import MethodModule


@dataclass(frozen=True)
class Run:
    """One method with one seed, as it is on disk."""

    path: Path

    @property
    def facts(self) -> RunFacts:
        """run.json: state, method, settings, seed, versions, base fingerprint, cohort, threads, bytes, seconds."""
        return RunFolder(self.path).facts

    @property
    def config(self) -> Config:
        """The config of this run alone."""
        return StudyFolder(self.path).config()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """metrics.jsonl: one record per finished round."""
        return RunFolder(self.path).records()

    @property
    def clients(self) -> dict[str, str]:
        """Each client's id, which names its folder, and its name in the data."""
        return dict(read_client_names(self.path).by_id)

    def adapters(self, client: str) -> Path:
        """The PEFT folder of one client, given by name or id.

        Raises StoreError naming the clients there are, or those that may be meant.
        """
        there = sorted(path.parent.name for path in (self.path / "adapters").glob("*/adapter_config.json"))
        names = read_client_names(self.path)
        found = names.find(client, there)  # never the path of another folder, such as ../../other
        if found is None:
            known = f"there are: {names.listed(there)}" if there else "there are none yet: the run is not complete"
            hint = names.near(client, there)
            raise StoreError(f"no adapter of client '{shown_name(client)}' in '{self.path}'{hint}; {known}")
        return self.path / "adapters" / found


@dataclass(frozen=True)
class Study:
    """A config and its runs, as they are on disk."""

    path: Path

    @property
    def config(self) -> Config:
        return StudyFolder(self.path).config()

    @property
    def runs(self) -> list[Run]:
        return [Run(folder.path) for folder in StudyFolder(self.path).runs()]

    @property
    def results(self) -> pd.DataFrame:
        """All rows of results.csv: client, method, seed, round, view, split, metric, value."""
        import pandas as pd

        from fedmira.reports.results import read_results

        return pd.DataFrame(read_results(self.path).rows)


def run(config: Config, *, observer: Observer = silent, overwrite: bool = False) -> Study:
    """Run every method with every seed of a config into its output_dir.

    overwrite: replace a study that is already there; otherwise that is an error. Raises a FedMiraError before anything
    is written if data, model, methods or the folder cannot work.
    """
    from fedmira.study.trackers import check_trackers

    check_trackers(config.report_to)
    folder = StudyFolder(Path(config.output_dir))
    folder.check_free(overwrite=overwrite)
    from fedmira.study.run import start

    start(folder, config, observer, overwrite=overwrite)
    return Study(folder.path)


def resume(path: str | Path, overrides: Sequence[str] = (), *, observer: Observer = silent) -> Study:
    """Go on with a study, or with only one of its runs, where the newest intact checkpoints are.

    overrides: `federation.rounds=N`, only upwards; runs that were complete then go on too. `federation.cohort=N`, only
    downwards, after a run that was out of memory: other last digits from there on. `federation.engine`, `workers` and
    `address`: it goes on elsewhere. Raises StoreError if there is nothing to resume, ConfigError for any other
    override.
    """
    folder, only = find_study(Path(path))
    from fedmira.study.loading import check

    config = check(folder.config().model_dump(by_alias=True), str(folder.path / "config.yaml"))
    config, overrides_left = _elsewhere(config, overrides)
    for override in overrides_left:
        key, _, value = override.partition("=")
        number = int(value) if value.isdecimal() else -1
        at_most = min((run.facts.cohort for run in folder.runs()), default=1)
        grows = key == "federation.rounds" and number >= config.federation.rounds
        shrinks = key == "federation.cohort" and 1 <= number <= at_most
        if not grows and not shrinks:
            raise ConfigError(
                [
                    f"'{override}': on resume only federation.rounds may change, from {config.federation.rounds} up, "
                    f"federation.cohort, from {at_most} down, and federation.engine, workers and address; anything "
                    "else is a new study"
                ],
                "overrides",
            )
        changed = config.federation.model_copy(update={key.partition(".")[2]: number})
        config = config.model_copy(update={"federation": changed})
    from fedmira.study.trackers import check_trackers

    check_trackers(config.report_to)
    from fedmira.study.run import go_on

    go_on(folder, config, observer, only=only, rewrite=bool(overrides))
    return Study(folder.path)


def _elsewhere(config: Config, overrides: Sequence[str]) -> tuple[Config, Sequence[str]]:
    """Return a config with the overrides of where it is computed, and the other overrides."""
    from fedmira.config.sections import PLACES
    from fedmira.config.yaml_text import apply_overrides
    from fedmira.study.loading import check

    keys = tuple(f"federation.{key}=" for key in PLACES)
    places = [override for override in overrides if override.startswith(keys)]
    if not places:
        return config, overrides
    raw = config.model_dump(by_alias=True)
    if "federation.engine=local" in places:
        raw["federation"] |= dict.fromkeys(PLACES[1:])  # which are Ray's
    apply_overrides(raw, places)
    return check(raw, "overrides"), [override for override in overrides if override not in places]


def load_run(path: str | Path) -> Run:
    """Open one run folder. Raises StoreError if it is none."""
    RunFolder(Path(path)).facts  # noqa: B018 - reading checks it
    return Run(Path(path))


def load_method(name: str) -> MethodModule:
    """Import a method by id or dotted path."""
    from fedmira.methods import load

    return load(name)


def method_names() -> list[str]:
    """List the ids of the methods in the tree."""
    from fedmira.methods import names

    return names()


def report(path: str | Path) -> Path:
    """Write report.html and summary.json of a study (or of the study a run belongs to); return the report's path."""
    study, _ = find_study(Path(path))
    from fedmira.reports.render import write_report

    return write_report(study.path)


def export(run: str | Path | Run, *, client: str | None = None, out: str | Path = "adapters") -> list[Path]:
    """Copy the PEFT folders of one client (a name or an id), or of all, to `out/<id>`; return the copies.

    Raises StoreError if the run has no such adapter, it holds a pickle, or a copy would overwrite something.
    """
    sources = _adapters(run, client)
    targets = [Path(out) / source.name for source in sources]
    from fedmira.export.peft_folder import copy_adapters

    copy_adapters(sources, targets)
    return targets


def merge(
    run: str | Path | Run, *, client: str | None = None, out: str | Path = "merged", dtype: str | None = None
) -> list[Merged]:
    """Merge the adapter of one client (a name or an id), or of each, into the base; write models to `out/<id>`.

    dtype: float32, bfloat16 or float64; None = as in the run. What is written was loaded again and compared.
    Raises StoreError, ConfigError or ModelError, before any weights are loaded wherever that can be known.
    """
    sources = _adapters(run, client)
    opened = Run(sources[0].parent.parent)
    targets = [Path(out) / source.name for source in sources]
    from fedmira.export.merged_model import merge_adapters
    from fedmira.study.adapting import quantisation_of

    model = opened.config.model
    return merge_adapters(
        sources,
        targets,
        facts=opened.facts,
        revision=model.revision,
        dtype=dtype,
        quantisation=quantisation_of(model),
    )


def _adapters(run: str | Path | Run, client: str | None) -> list[Path]:
    """Return the adapter folder of one client, or of all. Raises StoreError if there is none."""
    opened = run if isinstance(run, Run) else load_run(run)
    if client is not None:
        return [opened.adapters(client)]
    found = sorted(path for path in (opened.path / "adapters").glob("*") if path.is_dir())
    if not found:
        raise StoreError(f"'{opened.path}' has no adapters yet; finish it with: {resume_command(opened.path)}")
    return found
