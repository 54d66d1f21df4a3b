"""Every method on the demo and on Natural Instructions, each tuned by the same number of runs.

    python benchmarks/methods/measure.py demo [ni] [--only LABEL ...] [--budget 3] [--folder FOLDER]
    python benchmarks/methods/page.py

Each method of demo.yaml or ni.yaml is compared as `fedmira compare CONFIG --budget 3` does, one after another, and
kept in benchmarks/results/methods-NAME.json; what is kept there is not measured again. Natural Instructions and their
base, nano, are looked for in FEDMIRA_TEST_DATA (default: ../shared).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import kept
from evidence import ROOT, places, save_tasks

import fedmira
from fedmira.config.sections import Config

HERE = Path(__file__).parent
SETTINGS = ("demo", "ni")
CATEGORIES, TASKS = 4, 3  # of Natural Instructions: the first categories, a client for each of their first tasks
BUDGET = 3


def words_of(name: str, folder: Path) -> list[str]:
    """Return what is changed in a setting's config: where its data and base are."""
    if name == "demo":
        return []
    tasks = save_tasks(folder / "tasks.jsonl", categories=CATEGORIES, tasks=TASKS, in_turn=False)
    return places(tasks)


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
