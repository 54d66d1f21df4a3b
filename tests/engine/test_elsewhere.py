"""One round for simulation and reality: clients in other processes, and a server without base, data or config."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.elsewhere import NAMES, Elsewhere, federation, training, workplace
from torch import Tensor

from fedmira.engine.clients import Clients
from fedmira.engine.ledger import Ledger
from fedmira.engine.round import Sender, play
from fedmira.engine.simulated import Simulated
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Method

ROUNDS = ((0, 1), (1, 2), (0, 2))
EVERYONE = torch.arange(len(NAMES))
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mira", {"lambda": 0.3, "neighbours": "stored", "graph": {"kind": "uniform"}}),
    ("fedavg", {"with": [{"name": "only", "travels": "A"}]}),
    ("fedsophia", {"tau": 2}),
    ("local", {}),
]


def carry_out(method: Method, clients: Clients) -> tuple[Tensor, list[list[float | None]], list[float]]:
    """Three rounds; the server's rows, the losses after each, and the training losses."""
    ledger = Ledger(federation(NAMES), federation(NAMES).first_state(3, method), torch.zeros(len(NAMES)))
    losses, trained = [], []
    for number, ids in enumerate(ROUNDS, 1):
        clock = Clock(number, learning_rate=0.02)
        played = play(method, ledger, clients, torch.tensor(ids), clock)
        kept = clients.keep(played.answered)
        if kept is not None:
            kept.apply()
        ledger.apply(played.change)
        ledger.round = number
        losses.append(clients.losses(EVERYONE, Sender(method, ledger, Clock(number + 1))))
        trained += played.reply.losses.tolist()
        assert not played.refused
    return ledger.table[torch.arange(len(ledger.table))], losses, trained


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    sites = Elsewhere()
    yield sites
    sites.close()


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=[name for name, _ in METHODS])
def test_clients_in_other_processes_give_the_bits_of_a_simulation_one_client_at_a_time(
    name: str, settings: dict[str, Any], elsewhere: Elsewhere
) -> None:
    method = build(name, settings, Cohort(NAMES, (5, 2, 3), ({},) * 3, (), 3))
    here = carry_out(method, Simulated(workplace(NAMES), federation(NAMES), method, training()))
    elsewhere.begin(name, settings)
    there = carry_out(method, elsewhere)
    assert torch.equal(here[0], there[0])
    assert here[1:] == there[1:]


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

    def train(self, ids, given, clock):
        message = given.map(lambda rows: rows + ids[:, None])
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


def test_the_servers_half_needs_no_base_no_data_and_no_config(tmp_path: Any) -> None:
    done = subprocess.run([sys.executable, "-c", SERVER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["played", "False"]
