"""The server's half of a round: without base, data or config, in a process where they cannot be imported."""

import subprocess
import sys
from typing import Any

import pytest

SERVER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        ours = name.startswith(("fedmira.data", "fedmira.model"))
        if ours or name.split(".")[0] in ("transformers", "datasets", "peft"):
            raise ImportError(f"the server's half imported {name}")

sys.meta_path.insert(0, Refuse())
import torch
from fedmira.adapters import lora_layout
from fedmira.engine.clients import Reply, everybody
from fedmira.engine.federation import Federation
from fedmira.engine.gate import Header
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.engine.round import Sender, play
from fedmira.engine.schedule import draw_schedule
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort

names = ("a", "b", "c", "d")
federation = Federation(names, lora_layout([("layer", 4, 4)], 2), torch.tensor([2, 1, 2, 2]), 4.0)

class Sites:
    def ask(self, sampled):
        return everybody(sampled)

    def train(self, ids, send):
        message, clock = send(ids).map(lambda rows: rows + ids[:, None]), send.clock
        headers = [
            Header("", clock.round, names[k], f"{clock.round}-{k}", "", federation.layout_hash, "mira", 1.0)
            for k in ids.tolist()
        ]
        return Reply(ids, message, tuple(headers), torch.zeros(len(ids)), torch.ones(len(ids)), [None] * len(ids))

    def restore(self, files):
        pass

from pathlib import Path
folder = Path(sys.argv[1])
schedule = draw_schedule(4, rounds=3, participation=0.5, seed=1)
cohort = Cohort(names, (1,) * 4, ({},) * 4, schedule, 1)
method = build("mira", {"lambda": 0.3, "neighbours": "stored", "graph": {"kind": "uniform"}}, cohort)

def begin():
    return Ledger(federation, federation.first_state(0, method), torch.zeros(4, dtype=torch.float64))

ledger = begin()
for number, ids in enumerate(schedule, 1):
    played = play(method, ledger, Sites(), torch.from_numpy(ids), Clock(number))
    commit(folder, ledger, played.change, None, {"round": number})
    ledger.apply(played.change)
    ledger.round = number
again = begin()
assert restore(folder, again, Sites()) == {"round": 3}
everyone = torch.arange(4)
send, resend = (Sender(method, one, Clock(4)) for one in (ledger, again))
assert torch.equal(send(everyone).rows, resend(everyone).rows)
assert not torch.equal(send(everyone).rows, Sender(method, begin(), Clock(4))(everyone).rows)
print("played", "transformers" in sys.modules)
"""


@pytest.mark.slow
def test_the_servers_half_needs_no_base_no_data_and_no_config(tmp_path: Any) -> None:
    done = subprocess.run([sys.executable, "-c", SERVER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["played", "False"]
