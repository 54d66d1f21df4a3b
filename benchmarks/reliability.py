"""What FedMira withstands, counted: runs the tests of faults and writes their figures, with machine and commit.

    python benchmarks/reliability.py [PART ...] [--figures FILE]

PART: faults (half an hour on 2 cores), kills (of studies in simulation, a quarter of an hour), epsilon (kills of
private studies, a quarter of an hour), secrets (a few minutes); default: all. Figures of other parts stay as they are.
FILE: figures that `pytest -m slow TESTS --figures FILE` has written already; of a test that ran twice the newest count.
Writes benchmarks/results/reliability.json and docs/results/reliability.md.
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
KILLS = "tests/faults/test_kill.py"
SECRETS = "tests/faults/test_secrets.py"
PARTS: Mapping[str, Sequence[str]] = {  # words of pytest
    "faults": ("-m", "slow", "tests/faults", f"--ignore={KILLS}", f"--ignore={SECRETS}"),
    "kills": ("-m", "slow", KILLS, "--kills", "200"),
    "epsilon": (
        "-m",
        "slow",
        "tests/study/test_private.py",
        "tests/study/test_client_privacy.py",
        "-k",
        "hundred_kills",
    ),
    "secrets": ("-m", "slow or not slow", SECRETS),
}


def measure(parts: Sequence[str], file: Path) -> None:
    """Run the tests of some parts; they append their figures to a file. Raises SystemExit if one fails."""
    for part in parts:
        words = [sys.executable, "-m", "pytest", *PARTS[part], "--figures", str(file)]
        if subprocess.run(words, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"a test of '{part}' failed: nothing is written")


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


def laid_over(new: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return new figures, and the old ones of tests that have no new ones."""
    tests = {one["test"] for one in new}
    kept = [one for one in old if one["test"] not in tests]
    return sorted([*new, *kept], key=lambda one: str(one["test"]).partition("::")[0])


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def row(figure: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """Return a line of the page's table. machine: where figures that do not say so were counted."""
    where = {**machine, **figure.get("measured", {})}
    found = "; ".join(f"{name}: {shown(value)}" for name, value in figure["found"].items())
    test = figure["test"].removeprefix("tests/").removeprefix("faults/")
    return f"| {figure['what']} | {figure['count']:,} | {found} | `{test}` | {where['commit']}, {where['date']} |"


def page(stored: Mapping[str, Any]) -> str:
    """Return the page's text."""
    machine: Mapping[str, Any] = stored["machine"]
    figures: Sequence[Mapping[str, Any]] = stored["figures"]
    return "\n".join(
        [
            "# What FedMira withstands",
            "",
            f"Made by `python benchmarks/reliability.py` on {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_gb']} GB, Python {machine['python']}, torch {machine['versions']['torch']}; each row at "
            "the commit and on the day that it names.",
            "",
            "Each row is what a test did, how often, and what came of it; all of these tests passed. They are in "
            "`tests/faults` or where a row says, and `make test-slow` runs them. [SECURITY.md](../../SECURITY.md) says "
            "what is promised.",
            "",
            "| what | times | found | test | counted at |",
            "|---|---|---|---|---|",
            *(row(one, machine) for one in figures),
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
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--figures", type=Path, help="figures that are there already")
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in PARTS]:
        raise SystemExit(f"found part '{unknown[0]}': parts are {', '.join(PARTS)}")
    machine = describe()  # now: what is edited meanwhile is not what was counted
    with tempfile.TemporaryDirectory() as folder:
        file = given.figures or Path(folder) / "figures.jsonl"
        if given.figures is None:
            measure(given.parts or list(PARTS), file)
        new = read_figures(file)
    measured = {"commit": machine["commit"], "date": machine["date"]}
    old: dict[str, Any] = {"machine": machine, "figures": []}
    if STORED.is_file():
        old = json.loads(STORED.read_text(encoding="utf-8"))
    earlier = {"commit": old["machine"]["commit"], "date": old["machine"]["date"]}
    kept = [{**one, "measured": one.get("measured", earlier)} for one in old["figures"]]
    figures = laid_over([{**one, "measured": measured} for one in new], kept)
    found = {"machine": machine, "figures": figures}
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
