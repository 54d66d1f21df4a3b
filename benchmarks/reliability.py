"""What FedMira withstands, counted: runs the tests of faults and writes their figures, with machine and commit.

    python benchmarks/reliability.py [--figures FILE]

Takes half an hour on 2 cores. FILE: figures that `pytest -m slow tests/faults --figures FILE` has written already; of
a test that ran twice the newest count. Writes benchmarks/results/reliability.json and docs/results/reliability.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STORED = HERE / "results" / "reliability.json"
PAGE = ROOT / "docs" / "results" / "reliability.md"
TESTS = ("-m", "slow", "tests/faults")


def measure(file: Path) -> None:
    """Run the tests; they append their figures to a file. Raises SystemExit if one fails."""
    words = [sys.executable, "-m", "pytest", *TESTS, "--figures", str(file)]
    if subprocess.run(words, cwd=ROOT, check=False).returncode:
        raise SystemExit("a test failed: nothing is written")


def read_figures(file: Path) -> list[dict[str, Any]]:
    """Return the figures by file: of a test that ran twice the newest; cases of one test are added up."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        newest[line["test"], line["what"]] = line
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in newest.values():
        test = line["test"].partition("[")[0]
        one = found.setdefault((test, line["what"]), {"test": test, "what": line["what"], "count": 0, "found": {}})
        one["count"] += line["count"]
        for name, value in line["found"].items():
            old = one["found"].get(name, 0)
            one["found"][name] = old + value if isinstance(value, int) else max(old, value)
    return sorted(found.values(), key=lambda one: str(one["test"]).partition("::")[0])


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def page(stored: Mapping[str, Any]) -> str:
    """Return the page's text."""
    machine: Mapping[str, Any] = stored["machine"]
    figures: Sequence[Mapping[str, Any]] = stored["figures"]
    rows = [
        f"| {one['what']} | {one['count']:,} | "
        + "; ".join(f"{name}: {shown(value)}" for name, value in one["found"].items())
        + f" | `{one['test'].replace('tests/faults/', '')}` |"
        for one in figures
    ]
    return "\n".join(
        [
            "# What FedMira withstands",
            "",
            f"Made by `python benchmarks/reliability.py` at commit {machine['commit']} on {machine['date']}; "
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, Python {machine['python']}, torch "
            f"{machine['versions']['torch']}.",
            "",
            "Each row is what a test did, how often, and what came of it; all of these tests passed. They are in "
            "`tests/faults`, and `make test-slow` runs them. [SECURITY.md](../../SECURITY.md) says what is promised.",
            "",
            "| what | times | found | test |",
            "|---|---|---|---|",
            *rows,
            "",
            "Kills are SIGKILL. Messages are changed from a sound one: bytes, lengths, keys, parts, the tensor's "
            "header, numbers. Drift of a client is how far its adapter ends from where it ends by training alone; "
            "figures are the worst honest client's, of the worst one's in the clean run.",
            "",
        ]
    )


def main() -> None:
    """Measure or read, store, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, help="figures that are there already")
    given: Path | None = parser.parse_args().figures
    with tempfile.TemporaryDirectory() as folder:
        file = given or Path(folder) / "figures.jsonl"
        if given is None:
            measure(file)
        found = {"machine": describe(), "figures": read_figures(file)}
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
