"""Every method on the demo and on Natural Instructions, each tuned by the same number of runs.

    python benchmarks/methods/measure.py demo [ni] [--only LABEL ...] [--budget 3] [--folder FOLDER]
    python benchmarks/methods/page.py

Each method of demo.yaml or ni.yaml is compared as `fedmira compare CONFIG --budget 3` does, one after another, and
kept in benchmarks/results/methods-NAME.json; what is kept there is not measured again. Natural Instructions and their
base, nano, are looked for in FEDMIRA_TEST_DATA (default: ../shared).
"""

import argparse
import gzip
import json
import os
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import kept

import fedmira
from fedmira.config.sections import Config

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = Path(os.environ.get("FEDMIRA_TEST_DATA") or ROOT.parent / "shared")
SETTINGS = ("demo", "ni")
CATEGORIES, TASKS = 4, 3  # of Natural Instructions: the first categories, a client for each of their first tasks
BUDGET = 3


def save_tasks(folder: Path) -> Path:
    """Write the tasks of the first categories to one file, as they are in the shared data."""
    source = SHARED / "data/natural_instructions/tasks.jsonl.gz"
    if not source.is_file():
        raise SystemExit(f"no Natural Instructions at '{source}': set FEDMIRA_TEST_DATA to the folder of shared data")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        tasks = [(json.loads(line)["category"], line) for line in file]
    chosen: list[str] = []
    for place, (_, lines) in enumerate(groupby(tasks, key=lambda task: task[0])):
        if place < CATEGORIES:
            chosen += [line for _, line in lines][:TASKS]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tasks.jsonl"
    path.write_text("".join(chosen), encoding="utf-8")
    return path


def words_of(name: str, folder: Path) -> list[str]:
    """Return what is changed in a setting's config: where its data and base are."""
    if name == "demo":
        return []
    return [f"data.path={save_tasks(folder)}", f"model.base_model={SHARED / 'models/nano'}"]


def load(name: str, folder: Path) -> Config:
    """Return a setting's config."""
    return fedmira.load_config(HERE / f"{name}.yaml", [*words_of(name, folder), f"output_dir={folder / name}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these methods; default: all of the config")
    parser.add_argument("--budget", type=int, default=BUDGET, help="runs of tuning for each method")
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    for name in options.settings:
        config = load(name, options.folder)
        for label in options.only or [entry.folder for entry in config.methods]:
            kept.measure(
                HERE / f"{name}.yaml",
                words_of(name, options.folder),
                label,
                seeds=config.seeds,
                budget=options.budget,
                folder=options.folder / name,
                path=options.json / f"methods-{name}.json",
            )


if __name__ == "__main__":
    main()
