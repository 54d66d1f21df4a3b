"""Test loss against epsilon, by method: does stronger noise make clients want more of their neighbours?

    python benchmarks/privacy/measure.py [--noise none 0.5 1 2 4] [--json benchmarks/results/privacy.json] [WORD ...]

A study for each noise multiplier, `none` without privacy; further words change the config, as of `fedmira run`. A study
that is there already goes on.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedmira
from fedmira.disk.folders import StudyFolder
from fedmira.reports.results import read_results
from fedmira.reports.stats import client_values

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe

HERE = Path(__file__).parent


def measure(noise: str, words: Sequence[str]) -> dict[str, Any]:
    """Carry out the study of one noise multiplier; return each method's epsilon, and the loss of each client."""
    config = fedmira.load_config(HERE / "ni.yaml", words)
    folder = Path(config.output_dir) / f"noise-{noise}"
    privacy = "privacy=null" if noise == "none" else f"privacy.noise_multiplier={noise}"
    if (folder / "config.yaml").is_file():
        fedmira.resume(folder)
    else:
        fedmira.run(fedmira.load_config(HERE / "ni.yaml", [*words, privacy, f"output_dir={folder}"]))
    values = client_values(read_results(folder), metric="loss")
    spent = {run.facts.label: (run.facts.privacy or {}).get("epsilon") for run in StudyFolder(folder).runs()}
    return {
        "noise": noise,
        "methods": {
            label: {"epsilon": spent[label], "loss": list(losses.values())}
            for label, losses in values.items()
            if label in spent
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="+", default=["none", "0.5", "1", "2", "4"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*", metavar="WORD", help="key=value of the config")
    options = parser.parse_args()
    rows = []
    for noise in options.noise:
        row = measure(noise, options.words)
        rows.append(row)
        for label, found in row["methods"].items():
            epsilon = "without privacy" if found["epsilon"] is None else f"epsilon {found['epsilon']:.2f}"
            print(f"noise {noise}, {label}: {epsilon}, loss {statistics.fmean(found['loss']):.4f}", flush=True)
    if options.json:
        result = {"name": "privacy", "machine": describe(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
