"""How long the commands that compute nothing take, in units of what importing typer, pydantic and rich takes.

    python benchmarks/startup.py [--times N]

Every row is a process of its own. The rows are measured in turn, N times, so that a busy moment of the machine falls on
all of them; what counts is the median. Writes benchmarks/results/startup.json and docs/results/startup.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STORED = HERE / "results" / "startup.json"
PAGE = ROOT / "docs" / "results" / "startup.md"
YARDSTICK = 'python -c "import typer, pydantic, rich"'
AIM = 3  # times the yardstick


def commands(study: Path) -> dict[str, list[str]]:
    """Return what is measured: the text of a row -> its command."""
    fedmira = [sys.executable, "-m", "fedmira"]
    return {
        YARDSTICK: [sys.executable, "-c", "import typer, pydantic, rich"],
        'python -c "import fedmira"': [sys.executable, "-c", "import fedmira"],
        "fedmira --help": [*fedmira, "--help"],
        "fedmira methods": [*fedmira, "methods"],
        "fedmira run demo with an unknown key": [*fedmira, "run", "demo", "federation.round=2"],
        "fedmira run demo with a wrong setting of mira": [*fedmira, "run", "demo", "methods.2.lambda=-1"],
        "fedmira report of the demo": [*fedmira, "report", str(study)],
    }


def measure(rows: Mapping[str, Sequence[str]], times: int) -> dict[str, list[float]]:
    """Return the seconds of every row, one after another, `times` times; a first turn fills the caches."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(times + 1):
        for name, command in rows.items():
            began = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def page(found: Mapping[str, Any]) -> str:
    """Return the text of docs/results/startup.md."""
    medians = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    lines = [
        f"| `{name}` | {median:.2f} | {min(found['seconds'][name]):.2f} to {max(found['seconds'][name]):.2f} "
        f"| {median / medians[YARDSTICK]:.1f} |"
        for name, median in medians.items()
    ]
    machine, times = found["machine"], len(found["seconds"][YARDSTICK])
    return "\n".join(
        [
            "# Time to the first answer",
            "",
            "Help, lists, reports, refused configs and shell completion do not import torch, transformers, peft,",
            "datasets or pandas: a test starts each in a process and looks. The unit is the time that Python needs to",
            f"import typer, pydantic and rich, which the command line is made with. The aim: at most {AIM} times that.",
            "",
            "| command | s, median | s, from to | times the first row |",
            "|---|---|---|---|",
            *lines,
            "",
            f"{times} processes each, in turn; {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}.",
            "A refused config has been checked whole, settings of the methods included. A report also reads the study,",
            "compiles its templates and lays out the task graph, for which it needs numpy.",
            "",
            "Made by `python benchmarks/startup.py`.",
            "",
        ]
    )


def main() -> None:
    """Run the demo for one round, measure, store and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=15, help="processes of each row")
    times = parser.parse_args().times
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        demo = [sys.executable, "-m", "fedmira", "run", "demo", "-q", f"output_dir={study}", "federation.rounds=1"]
        subprocess.run(demo, stdout=subprocess.DEVNULL, check=True)
        found = {"machine": describe(), "seconds": measure(commands(study), times)}
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
