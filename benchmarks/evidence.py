"""A page of evidence: studies that are measured run by run and kept, and what its tables are made of.

A page's script lists its studies, reads its options here, measures what is not kept yet, and writes the page from what
is kept. Kept runs are in benchmarks/results/PAGE-STUDY.json (kept.py); a study's folder goes once all of it is kept.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kept

import fedmira
from fedmira.reports.stats import Comparison, MethodSummary, client_values, summarise

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("FEDMIRA_TEST_DATA") or ROOT.parent / "shared")
FEW = 3
CLEAR = 0.05  # adjusted p below which two methods are told apart


@dataclass(frozen=True)
class Study:
    """A config with changes, and its methods by label: all of them where none are named.

    more: further methods, with the first FEW seeds alone. tuned: runs of tuning for each method, with the first seed;
    1: none. seeds: at most so many of those asked for.
    """

    name: str
    config: Path
    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    tuned: int = 1
    seeds: int | None = None


@dataclass(frozen=True)
class Options:
    """What a page's command was given."""

    page: str
    only: Sequence[str]
    methods: Sequence[str]
    seeds: int
    only_page: bool
    folder: Path
    results: Path
    file: Path

    def path(self, study: Study) -> Path:
        """Where the runs of a study are kept."""
        return self.results / f"{self.page}-{study.name}.json"


def options(description: str, page: str, studies: Sequence[Study]) -> Options:
    """Read a page's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [study.name for study in studies]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STUDY", help=", ".join(names))
    parser.add_argument("--methods", nargs="+", default=[], metavar="LABEL", help="of these studies; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only-page", action="store_true", help="write the page from what is kept; measure nothing")
    parser.add_argument("--folder", type=Path, default=Path("runs") / page, help="of the studies")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results", help="where results are kept")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / f"{page}.md")
    found = parser.parse_args()
    return Options(page, found.only, found.methods, found.seeds, found.only_page, found.folder, found.json, found.page)


def measure(studies: Sequence[Study], options: Options, words: Sequence[str] = ()) -> None:
    """Measure what is not kept yet, seed by seed, so that every study has some seeds early; `more` comes last.

    words: of all configs.
    """
    if options.only_page:
        return
    chosen = [one for one in studies if one.name in options.only]
    for last in (False, True):
        for seed, study in product(range(options.seeds), chosen):
            if seed >= (FEW if last else study.seeds or options.seeds):
                continue
            overrides = [*words, *study.words]
            labels = [entry.folder for entry in fedmira.load_config(study.config, overrides).methods]
            of_study = [*(study.labels or labels), *(study.more if seed < FEW else ())]
            part = study.more if last else study.labels or labels
            wanted = [one for one in part if one in (options.methods or part)]
            tuned = study.tuned > 1  # tuning is of the first seed: later seeds need the folder that it is in
            folder = options.folder / study.name / ("all" if tuned else f"seed-{seed}")
            seeds = list(range(seed + 1)) if tuned else [seed]
            for label in wanted:
                kept.measure(
                    study.config,
                    overrides,
                    label,
                    seeds=seeds,
                    budget=study.tuned,
                    folder=folder,
                    path=options.path(study),
                )
            found = kept.read(options.path(study))
            if not tuned and all(kept.is_kept(found, label, [seed]) for label in of_study):
                shutil.rmtree(folder, ignore_errors=True)


def read(studies: Sequence[Study], options: Options) -> dict[str, kept.Kept]:
    """Return what is kept of each study that has been begun."""
    return {study.name: kept.read(path) for study in studies if (path := options.path(study)).is_file()}


def seeds_of(found: kept.Kept, labels: Sequence[str]) -> list[int]:
    """The seeds that all of these methods have."""
    return sorted(map(int, set.intersection(*(set(found["methods"][label]["runs"]) for label in labels))))


def summaries(
    found: kept.Kept, labels: Sequence[str], *, metric: str = "loss", baseline: str = "local"
) -> dict[str, MethodSummary]:
    """Return each method's figures on a metric, over the seeds that all of them have, compared with the baseline."""
    some = {**found, "methods": {label: found["methods"][label] for label in dict.fromkeys([baseline, *labels])}}
    results = kept.results_of(some, seeds_of(found, list(some["methods"])))
    return {item.method: item for item in summarise(results, metric=metric, baseline=baseline)}


def values(found: kept.Kept, label: str, seeds: Sequence[int], metric: str = "loss") -> dict[str, float]:
    """Return each client's mean over seeds under one method."""
    some = {**found, "methods": {label: found["methods"][label]}}
    return client_values(kept.results_of(some, seeds), metric=metric)[label]


def machines(found: Mapping[str, kept.Kept]) -> str:
    """Say what all these runs were measured on."""
    lines = {
        f"{run['machine']['cpu']}, {run['machine']['cores']} cores, commit {run['machine']['commit']}": None
        for one in found.values()
        for entry in one["methods"].values()
        for run in entry["runs"].values()
    }
    return "; ".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(item: MethodSummary) -> str:
    """Write a mean over clients and its 95 % interval."""
    return number(item.mean) if item.half_width is None else f"{number(item.mean)} ± {number(item.half_width)}"


def chance(value: float | None) -> str:
    return "" if value is None else f"{value:.1g}"


def against(item: Comparison | None) -> list[str]:
    """Write a comparison as two cells: better / equal / worse clients, and the adjusted p."""
    return ["", ""] if item is None else [f"{item.wins} / {item.ties} / {item.losses}", chance(item.p_holm)]


def places(data: Path) -> list[str]:
    """Return what changes in a config: its data, and the base nano where the shared models are."""
    return [f"data.path={data}", f"model.base_model={SHARED / 'models/nano'}"]


def save_tasks(path: Path, *, categories: int, tasks: int, in_turn: bool = True, most: int | None = None) -> Path:
    """Write Natural Instructions' first tasks of its first categories to one file, as they are in the shared data.

    in_turn: one task of each category after another, so that the first n tasks are of different categories.
    most: no more tasks than these.
    """
    source = SHARED / "data/natural_instructions/tasks.jsonl.gz"
    if not source.is_file():
        raise SystemExit(f"no Natural Instructions at '{source}': set FEDMIRA_TEST_DATA to the folder of shared data")
    by_category: dict[str, list[str]] = {}
    with gzip.open(source, "rt", encoding="utf-8") as file:
        for line in file:
            by_category.setdefault(json.loads(line)["category"], []).append(line)
    chosen = [lines[:tasks] for lines in list(by_category.values())[:categories]]
    order = zip(*chosen, strict=True) if in_turn else chosen
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join([line for lines in order for line in lines][:most]), encoding="utf-8")
    return path
