"""A federation of one server and three sites on this machine, over mutual TLS: `make demo-federation`.

    python examples/federation.py [FOLDER]

The sites have clients north-1, north-2 and north-3 of the bundled tasks, each in its own folder and process. Only
commands are used that organisations on separate machines would type; docs/federation.md is the walk-through.
"""

import csv
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedmira import bundled

SITES = ("north-1", "north-2", "north-3")
ROUNDS = 12


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedmira", "federation", *map(str, words)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make(folder: Path) -> None:
    """Make the federation: as its organiser would, from the study that `fedmira run demo` carries out."""
    changes = [
        f"federation.rounds={ROUNDS}",
        "methods=[{name: local}, {name: mira, lambda: 0.25, graph: {kind: groups, column: family}}]",
    ]
    address = f"localhost:{free_port()}"
    sites = ",".join(SITES)
    subprocess.run(
        command("init", folder, "--config", "demo", "--server", address, "--sites", sites, *changes), check=True
    )


def fill_in(folder: Path) -> None:
    """Write each site's data beside its settings, and the data's path into site.yaml, as its people would."""
    rows = [
        json.loads(line) for line in Path(bundled.resolve("bundled:tasks")).read_text(encoding="utf-8").splitlines()
    ]
    for site in SITES:
        place = folder / "sites" / site
        own = "".join(json.dumps(row) + "\n" for row in rows if row["client"] == site)
        (place / "own.jsonl").write_text(own, encoding="utf-8")
        text = (place / "site.yaml").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith("  path:"))
        (place / "site.yaml").write_text(text.replace(line, f"  path: {place / 'own.jsonl'}"), encoding="utf-8")


@contextmanager
def sites_running(folder: Path) -> Iterator[None]:
    """Run the sites' processes; they end by themselves when the study is complete."""
    running = [subprocess.Popen(command("site", folder / "sites" / site)) for site in SITES]
    try:
        yield
        for process in running:
            process.wait(60)
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()


def scores(folder: Path, method: str) -> dict[str, float]:
    """Return each site's word accuracy on its test split after the last round."""
    run = folder / "server" / "study" / method / "seed-0"
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        row["client"]: float(row["value"])
        for row in rows
        if row["split"] == "test" and row["metric"] == "word_accuracy" and row["round"] != "0"
    }


def sent(folder: Path) -> int:
    """Return the bytes that a party sent, as its own audit lists them."""
    lines = (folder / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["bytes"] for line in lines)


def main(words: Sequence[str]) -> None:
    folder = Path(words[0] if words else "runs/demo-federation").resolve()
    began = time.monotonic()
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    make(folder)
    fill_in(folder)
    with sites_running(folder):
        subprocess.run(command("server", folder), check=True)
    alone, mira = scores(folder, "local"), scores(folder, "mira")
    print(f"\n{'site':10}{'alone':>8}{'mira':>8}{'gain':>8}{'sent, bytes':>14}  adapter")
    for site in SITES:
        place = folder / "sites" / site
        gain = mira[site] - alone[site]
        adapter = place / "adapters" / "mira" / "seed-0"
        print(f"{site:10}{alone[site]:8.3f}{mira[site]:8.3f}{gain:+8.3f}{sent(place):14,}  {adapter}")
    print(f"the server sent {sent(folder / 'server'):,} bytes; word accuracy on each site's own test split")
    print(f"report: {folder / 'server' / 'study' / 'report.html'}")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1:])
