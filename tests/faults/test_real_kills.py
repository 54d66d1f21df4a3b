"""A real federation in which server and sites are killed in each phase: nothing accepted is lost, nothing counts twice.

A process kills itself with SIGKILL in the middle of a phase, and notes which one before it does.
"""

import importlib.util
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import small_study
from tests.deploy.processes import INIT, SERVER, SITE, Forked, arguments, ended_afterwards, fill_in, fork, free_port
from tests.faults.figures import Note

from fedmira.config.faults import check_config
from fedmira.deploy import remote
from fedmira.deploy.folders import ServerFolder
from fedmira.disk import checkpoints
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent
from fedmira.study import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("nvflare") is None, reason="nvflare is not installed (an extra of fedmira)"
    ),
]

SITES = ("ada", "cy")
EACH = 8  # kills in each phase
ROUNDS = 64
SECONDS = 1800.0  # far more than it takes; a busy machine is slow
RECEIVED, DURABLE, CHECKPOINT, TRAINING = (
    "an answer being received",
    "durable, not merged",
    "a checkpoint being written",
    "local training",
)


def die(phase: str, hits: Path) -> None:
    """Note the phase, and be killed."""
    handle = os.open(hits, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{phase}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase: str, count: int, hits: Path) -> None:
    """Let this process be killed at the count-th time that it is in a phase."""
    left = iter(range(count - 1, -1, -1))

    def half(pieces: Iterable[bytes]) -> Iterator[bytes]:
        first, *_ = pieces
        yield first
        die(phase, hits)

    def deadly(original: Callable[..., Any], *, after: bool = False, torn: bool = False) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            if next(left, None) != 0:
                return original(*values, **options)
            if torn:
                return original(values[0], half(values[1]), *values[2:], **options)
            if after:
                original(*values, **options)
            return die(phase, hits)

        return call

    if phase == RECEIVED:  # half of it is in a file
        remote.write_pieces = deadly(remote.write_pieces, torn=True)
    elif phase == DURABLE:
        remote.Remote._store = deadly(remote.Remote._store, after=True)  # type: ignore[method-assign]
    elif phase == CHECKPOINT:  # its tensors are there, its manifest is not; or half of its tensors is
        name = "write_atomic" if count % 2 else "write_pieces"
        setattr(checkpoints, name, deadly(getattr(checkpoints, name), torn=name == "write_pieces"))
    else:
        torch.autograd.backward = deadly(torch.autograd.backward)  # type: ignore[assignment]


@dataclass(frozen=True)
class Killed:
    """How it ended. hits: phases in which a process was killed; sent: how often each was started."""

    folder: ServerFolder
    simulation: Path
    hits: Counter[str]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    here = tmp_path_factory.mktemp("kills")
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "all.jsonl")
    rows = [row for line in data.read_text().splitlines() if (row := json.loads(line))["client"] in SITES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = small_study.settings(
        base,
        data,
        here / "simulation",
        federation={"rounds": ROUNDS, "participation": 1.0, "cohort": 1},
        training={"local_steps": 2, "batch_size": 2, "learning_rate": 0.05, "keep_optimizer": True},
        methods=[{"name": "mira", "lambda": 0.25, "graph": {"kind": "uniform"}}],
        evaluation={"metrics": ["loss"]},
    )
    run.start(StudyFolder(here / "simulation"), check_config(raw), silent, overwrite=False)
    folder, hits = ServerFolder(here / "federation"), here / "hits"
    changes = {
        "bank-a,bank-b": ",".join(SITES),
        "hub.example.org:8002": f"localhost:{free_port()}",
        "study.yaml": str(small_study.save_config(here / "study.yaml", raw)),
    }
    founded = small_study.command(*arguments(INIT, folder.path, "--deadline", "300", "--quorum", "1", **changes))
    assert founded.code == 0, founded.err
    for name in SITES:
        own = here / f"{name}.jsonl"
        own.write_text("".join(json.dumps(row) + "\n" for row in rows if row["client"] == name))
        fill_in(folder.site(name), data=own, base=base)
    due = {"server": [(phase, 3 + n % 2) for n in range(EACH) for phase in (RECEIVED, DURABLE, CHECKPOINT)]}
    due |= {name: [(TRAINING, 6 + n) for n in range(EACH // len(SITES))] for name in SITES}
    with ended_afterwards() as started:

        def begin(name: str) -> Forked:
            words = (
                arguments(SERVER, folder.path) if name == "server" else arguments(SITE, folder.path, **{"bank-a": name})
            )
            armed = partial(arm, *due[name].pop(0), hits) if due[name] else lambda: None
            started.append(fork(words, here / f"{name}.txt", before=armed))
            return started[-1]  # type: ignore[return-value]

        living = {name: begin(name) for name in due}
        until = time.monotonic() + SECONDS
        while living and time.monotonic() < until:
            for name, process in list(living.items()):
                if (code := process.poll()) == -signal.SIGKILL:
                    living[name] = begin(name)
                elif code is not None:
                    assert code == 0, (here / f"{name}.txt").read_text()[-3000:]
                    del living[name]
            time.sleep(0.05)
        assert not living, f"{list(living)} still run"
    return Killed(folder, here / "simulation", Counter(hits.read_text().splitlines()))


def test_adapters_are_bit_identical_to_those_of_the_run_that_nobody_killed(killed: Killed, note: Note) -> None:
    assert all(killed.hits[phase] >= EACH for phase in (RECEIVED, DURABLE, CHECKPOINT, TRAINING)), killed.hits
    for site in SITES:
        place = Path("mira") / "seed-3"
        expected = load_file(killed.simulation / place / "adapters" / site / "adapter_model.safetensors")
        found = load_file(killed.folder.site(site).adapters / place / "adapter_model.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    note("kills of a real server and real sites", killed.hits.total(), dict(killed.hits))


def test_each_answer_counts_once_and_no_round_is_trained_twice(killed: Killed, note: Note) -> None:
    records = StudyFolder(killed.folder.study).run("mira", 3).records()
    assert [record["round"] for record in records] == list(range(1, ROUNDS + 1))
    assert all(sorted(record["answered"]) == sorted(SITES) for record in records)
    one, other = small_study.outcome(killed.simulation), small_study.outcome(killed.folder.study)
    assert one["mira/seed-3/metrics.jsonl"] == other["mira/seed-3/metrics.jsonl"]
    for site in SITES:
        lines = (killed.folder.site(site).adapters / "mira" / "seed-3" / "metrics.jsonl").read_text().splitlines()
        trained = [line["round"] for line in map(json.loads, lines) if line["what"] == "train"]
        assert trained == list(range(1, ROUNDS + 1))
    note("rounds of it", ROUNDS, {"answers lost": 0, "answers doubled": 0, "rounds finished twice at a site": 0})
