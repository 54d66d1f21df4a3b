"""How long the commands that compute nothing take, in units of what importing typer, pydantic and rich takes.

    python benchmarks/startup.py [--times N]

Every row is a separate process. The rows are measured in turn, N times, and compared within a turn, so that a busy
moment of the machine counts little. Writes benchmarks/results/startup.json and docs/results/startup.md.
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
LIBRARIES = "import typer, jinja2, rich.table"
ROW_OF_LIBRARIES = f'python -c "{LIBRARIES}"'
REPORT = "fedmira report of the demo"
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
        REPORT: [*fedmira, "report", str(study)],
        ROW_OF_LIBRARIES: [sys.executable, "-c", LIBRARIES],
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
    rows, machine = found["seconds"], found["machine"]
    units = {name: unit(seconds, rows[YARDSTICK]) for name, seconds in rows.items()}
    lines = [
        f"| `{name}` | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} "
        f"| {units[name]:.1f} |"
        for name, seconds in rows.items()
    ]
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
            f"{len(rows[YARDSTICK])} processes each, in turn; the last column is the median over turns of a row's time",
            f"divided by the first row's in the same turn. {machine['cpu']}, {machine['cores']} cores, Python",
            f"{machine['python']}. Modules and templates are compiled already, as after the first use of an installed",
            "package. A refused config has been checked whole, settings of the methods included.",
            "",
            f"The last row, {units[ROW_OF_LIBRARIES]:.1f} of the {units[REPORT]:.1f} of a report, imports no module of",
            "FedMira: typer reads the arguments, jinja2 makes the page, rich prints the tables. Typer 0.29 would check",
            "arguments with pydantic, which only a config needs here. numpy is imported only where a graph is laid out",
            "by forces (this one has groups), scipy where there are more than 31 clients.",
            "",
            "Made by `python benchmarks/startup.py`.",
            "",
        ]
    )


def unit(seconds: Sequence[float], yardstick: Sequence[float]) -> float:
    """Return the median over turns of a row's time in units of the yardstick's: a busy moment slows both."""
    return statistics.median(own / other for own, other in zip(seconds, yardstick, strict=True))


def main() -> None:
    """Run the demo for one round, measure, store and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=15, help="processes of each row")
    times = parser.parse_args().times
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every row compiles what it imports of this checkout
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "compiled")
        study = Path(folder) / "study"
        demo = [sys.executable, "-m", "fedmira", "run", "demo", "-q", f"output_dir={study}", "federation.rounds=1"]
        subprocess.run(demo, stdout=subprocess.DEVNULL, check=True)
        found = {"machine": describe(), "seconds": measure(commands(study), times)}
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
