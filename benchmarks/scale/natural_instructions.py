"""A full run of MIRA with 555 real clients: one task of Natural Instructions each.

    python benchmarks/scale/natural_instructions.py [--rounds 20] [--data FILE] [--base FOLDER] [--json FILE]

nano (6.9 M parameters), rank 8 on every linear layer, 10 % of the clients in a round (56), 5 local steps of 4 examples;
MIRA on the authors' random graph. Losses and ROUGE-L on the test split of every client. The process is watched from
outside (/proc/PID/status every 20 ms). It is a measurement of time and memory: the base has seen other instances of
these tasks, so what it learns here says little.
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from clients import between, disk, peaks, watch

SHARED = Path(os.environ.get("FEDMIRA_TEST_DATA", "../shared"))
METHODS = [{"name": "mira", "lambda": 0.1, "graph": {"kind": "random"}}]


def make_config(options: argparse.Namespace, folder: Path) -> Path:
    """Write the config of the study."""
    raw = {
        "seeds": [0],
        "output_dir": str(folder / "study"),
        "model": {"base_model": str(options.base), "dtype": "bfloat16", "device": "cpu"},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {
            "path": str(options.data),
            "format": "natural_instructions",
            "template": "alpaca",
            "max_length": 512,
            "split": {"validation": 0.1, "test": 0.1},
            "clients": {"by": "task"},
        },
        "federation": {"rounds": options.rounds, "participation": 0.1},
        "training": {"local_steps": 5, "batch_size": 4, "learning_rate": 1e-3},
        "methods": METHODS,
        "evaluation": {"every": 10, "metrics": ["loss", "rouge_l"], "max_new_tokens": 32},
    }
    path = folder / "config.json"  # JSON is YAML
    path.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return path


def scores(study: Path) -> dict[str, dict[str, float]]:
    """The mean over clients of each test metric, by method; the untouched base is every run's round 0."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted(study.glob("*/*/results.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["split"] == "test" and row["value"]:
                    name = "base" if row["round"] == "0" else row["method"]
                    found.setdefault(name, {}).setdefault(row["metric"], []).append(float(row["value"]))
    return {name: {metric: statistics.mean(values) for metric, values in one.items()} for name, one in found.items()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the study; seconds, bytes and scores."""
    said, samples = watch(str(make_config(options, folder)))
    rounds = [one for one in said if one["what"] == "round"]
    whole = peaks(samples, 0.0, float("inf"))
    study = folder / "study"
    return {
        "name": "natural-instructions",
        "clients": len(json.loads(next(study.glob("*/*/clients.json")).read_bytes())),
        "rounds": options.rounds,
        "sampled": statistics.median(one["answered"] for one in rounds),
        "methods": [method["name"] for method in METHODS],
        "seconds": between(said, "begin", "end"),
        "prepare_s": between(said, "begin", "start"),
        "round_s": statistics.median(one["measured"] for one in rounds),
        "training_s": statistics.median(one["training"] for one in rounds),
        "merge_s": statistics.median(one["merge"] for one in rounds if one["merge"]),
        "anon_peak": whole["RssAnon"],
        "file_peak": whole["RssFile"],
        "study_bytes": disk(study),
        "scores": scores(study),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data", type=Path, default=SHARED / "data/natural_instructions_555/tasks.jsonl.gz")
    parser.add_argument("--base", type=Path, default=SHARED / "models/nano")
    parser.add_argument("--folder", type=Path, default=None, help="where the study goes; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedmira-scale-", dir=options.folder) as name:
        row = measure(options, Path(name))
    print(json.dumps(row, indent=1))
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
