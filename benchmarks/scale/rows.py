"""Memory and time if each of 10,000 clients has a separate GPT-2 adapter: 11.8 GB of rows, all written.

    python benchmarks/scale/rows.py [--clients 10000] [--json FILE]

No model and no training: the run's state as the engine keeps it, played through rounds in which 100 clients at a time
get new rows, until everyone has one; then the dearest checkpoint there is, a full one of all rows, and the way back
from disk. What is anonymous (RssAnon) must fit into RAM; mapped pages (RssFile) the system takes back when it needs
them. Needs about 4 x the rows of free disk.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clients import status

from fedmira.adapters import lora_layout
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.methods import build
from fedmira.methods.base import Change, Cohort

SHAPES = [(f"transformer.h.{layer}.attn.c_attn", 768, 2304) for layer in range(12)]
RANK, SAMPLED = 8, 100


class Watch:
    """The most memory of this process since the watch began."""

    def __init__(self) -> None:
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self.before = status("self")
        self.going = True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def _sample(self) -> None:
        while self.going:
            for name, value in status("self").items():
                self.peak[name] = max(self.peak[name], value - self.before[name])
            time.sleep(0.01)

    def stop(self) -> dict[str, int]:
        self.going = False
        self.thread.join()
        return dict(self.peak)


def begin(folder: Path, clients: int) -> Ledger:
    """A run's state at the common start."""
    names = tuple(f"c{k}" for k in range(clients))
    cohort = Cohort(names, (1,) * clients, ({},) * clients, (np.arange(SAMPLED),), 0)
    method = build("mira", {"lambda": 0.1, "graph": {"kind": "random"}}, cohort)
    federation = Federation(names, lora_layout(SHAPES, RANK), torch.full((clients,), RANK), 16)
    validation = torch.full((clients,), torch.nan, dtype=torch.float64)
    return Ledger(federation, federation.first_state(0, method, folder), validation)


class Forgetful:
    """Clients that keep nothing, so that a checkpoint has nothing of theirs."""

    def restore(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take nothing back."""


def play(ledger: Ledger, folder: Path, ids: torch.Tensor) -> float:
    """A round without its training; return its seconds."""
    rows = torch.rand(len(ids), ledger.federation.layout.size)
    began = time.monotonic()
    change = Change(ids, rows)
    commit(folder, ledger, change, None)
    ledger.apply(change)
    ledger.round += 1
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"name": "scale/rows", "clients": options.clients}

    def note(what: str, seconds: float, watch: Watch) -> None:
        result[what] = {"seconds": seconds, **watch.stop()}
        anon, mapped = (result[what][name] / 1e6 for name in ("RssAnon", "RssFile"))
        print(f"{what}: {seconds:.1f} s, RssAnon +{anon:.0f} MB, RssFile +{mapped:.0f} MB", flush=True)

    with tempfile.TemporaryDirectory(prefix="fedmira-scale-") as place:
        folder = Path(place)
        ledger = begin(folder, options.clients)
        watch = Watch()
        spent = [play(ledger, folder, ids) for ids in torch.split(torch.arange(options.clients), SAMPLED)]
        result["rows_bytes"] = int(ledger.table.written.sum()) * ledger.table.row_bytes
        note(f"{len(spent)} rounds of {SAMPLED} new clients", sum(spent), watch)
        result["round_s"] = spent
        watch, count = Watch(), ledger.round
        while ledger.last_full <= count:  # until the deltas weigh as much as everything
            seconds = play(ledger, folder, torch.arange(SAMPLED))
        note(f"a full checkpoint of {result['rows_bytes'] / 1e9:.1f} GB", seconds, watch)
        sample = torch.arange(0, options.clients, 97)
        expected, number = ledger.table[sample], ledger.round
        del ledger  # and with it its file of rows
        watch, began = Watch(), time.monotonic()
        found = begin(folder, options.clients)
        restore(folder, found, Forgetful())
        note("the way back from disk", time.monotonic() - began, watch)
        assert found.round == number
        assert torch.equal(found.table[sample], expected)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
