"""A real federation with a hostile site: it lies, hangs, dies and sends garbage, and the others go on without it."""

import importlib.util
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import small_study
from tests.deploy.federation import SITES, Loopback, write_federation
from tests.deploy.processes import INIT, SERVER, SITE, Forked, arguments, ended_afterwards, fill_in, fork, free_port
from tests.deploy.test_sites import LIES
from tests.faults.figures import Note
from tests.faults.mutations import Mutator

from fedmira.deploy.answers import read_answer, why_not_upload
from fedmira.deploy.audit import read_audit
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.link import Failure
from fedmira.deploy.server import Server
from fedmira.deploy.wire import decode, unpack_message
from fedmira.deploy.worker import Worker
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("nvflare") is None, reason="nvflare is not installed (an extra of fedmira)"
    ),
]

HOSTILE, HONEST = SITES[2], SITES[:2]
DEADLINE = 20.0  # seconds
MUTATED = 110
SECONDS = 1800.0  # far more than it takes; a busy machine is slow
NOT_SENT = ("away",)  # `hangs` is that
TOLD = [name for name in LIES if name not in NOT_SENT]
# What it does in a round, and for which words it is refused.
PLAN: list[tuple[str, set[str]]] = [
    *((name, {LIES[name][1]}) for name in TOLD),
    ("replays the answer of the round before", {"duplicate"}),
    ("hangs", {"late"}),
    ("comes back late", {"late", "duplicate"}),
    ("dies and returns", {"late"}),
    *[("mutated", {"schema", "size", "identity", "round", "duplicate", "not_finite", "norm", "weight", "failed"})]
    * MUTATED,
]
ROUNDS = len(PLAN)


def changed(data: bytes, dice: random.Random) -> bytes:
    """Return a changed message that a server has to refuse."""
    frame = decode(data)
    header, name = frame.header, frame.header["client"]
    like = unpack_message(header["parts"], frame.rows)
    mutator = Mutator({key: value for key, value in header.items() if key != "parts"}, like, dice)
    while True:
        found = mutator.draw()
        answer = read_answer(found, header["nonce"])
        if isinstance(answer, Failure):
            return found
        if answer.header["answer"] == "done" and why_not_upload(answer, name, like=like, examples=header["weight"]):
            return found


def turn_hostile(mark: Path) -> None:
    """Let the worker of this process follow the plan. mark: a file that is there once it has died."""
    handle, before, dice = Worker.handle, [b""], random.Random(4)

    def lying(worker: Worker, data: Any) -> bytes:
        order, answer = decode(data).header, handle(worker, data)
        if order["order"] != "train" or decode(answer).header["answer"] != "done":  # it may need the message again
            return answer
        what, _ = PLAN[order["round"] - 1]
        old, before[0] = before[0], answer
        if what in LIES:
            lie = LIES[what][0](answer)
            assert isinstance(lie, bytes)
            return lie
        if what == "mutated":
            return changed(answer, dice)
        if what.startswith("replays"):
            return old
        if what == "hangs":
            time.sleep(1.5 * DEADLINE)
        elif what == "comes back late":
            time.sleep(DEADLINE + 3)
        elif not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(DEADLINE + 3)  # it was asked again; this answer is late too, so that the round is without it
        return answer

    Worker.handle = lying  # type: ignore[method-assign,assignment]


def settings(base: Path, data: Path, output: Path) -> dict[str, Any]:
    return small_study.settings(
        base,
        data,
        output,
        federation={"rounds": ROUNDS, "participation": 1.0, "cohort": 1},
        training={"local_steps": 1, "batch_size": 2, "learning_rate": 0.02},
        methods=[{"name": "mira", "lambda": 0.25, "graph": {"kind": "uniform"}}],
        evaluation={"metrics": ["loss"]},
    )


@dataclass(frozen=True)
class Attacked:
    """How it ended. without: adapters of honest sites where the hostile one never answers."""

    folder: ServerFolder
    records: list[dict[str, Any]]
    without: Mapping[str, bytes]
    stranger: ServerFolder


def found(here: Path, name: str, sites: tuple[str, ...], config: Path, port: int) -> ServerFolder:
    folder = ServerFolder(here / name)
    changes = {"bank-a,bank-b": ",".join(sites), "hub.example.org:8002": f"localhost:{port}", "study.yaml": str(config)}
    terms = ("--deadline", f"{DEADLINE:.0f}", "--quorum", "0.5")
    ended = small_study.command(*arguments(INIT, folder.path, *terms, **changes))
    assert ended.code == 0, ended.err
    return folder


def adapter(folder: ServerFolder, site: str) -> bytes:
    return (folder.site(site).adapters / "mira" / "seed-3" / "adapter_model.safetensors").read_bytes()


def run_without(here: Path, base: Path, data: Path) -> Mapping[str, bytes]:
    folder = write_federation(here / "without", settings(base, data, here / "unused"), data)
    link = Loopback({name: folder.site(name) for name in SITES})
    server = Server(folder, link, lambda line: None, silent)
    server.members.gather()
    link.tamper = lambda name, sent: Failure("late") if name == HOSTILE and "weight" in decode(sent).header else sent
    server.carry_out()
    return {name: adapter(folder, name) for name in HONEST}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    here = tmp_path_factory.mktemp("hostile")
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "all.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    config = small_study.save_config(here / "study.yaml", settings(base, data, here / "unused"))
    port = free_port()
    folder = found(here, "federation", (*SITES, "eve"), config, port)
    listed = yaml.safe_load(folder.settings.read_text())
    folder.settings.write_text(
        yaml.safe_dump({**listed, "sites": list(SITES)})
    )  # eve has a kit, and is not on the list
    stranger = found(here, "stranger", SITES, config, port)  # of another authority, under a name of this one's
    for one, names in ((folder, (*SITES, "eve")), (stranger, HONEST[:1])):
        for name in names:
            own = here / f"{name}.jsonl"
            own.write_text("".join(json.dumps(row) + "\n" for row in rows if row["client"] == name))
            fill_in(one.site(name), data=own, base=base)
    with ended_afterwards() as started:

        def begin(log: str, words: list[str], before: Callable[[], None] = lambda: None) -> Forked:
            started.append(fork(words, here / f"{log}.txt", before=before))
            return started[-1]  # type: ignore[return-value]

        def site(name: str, of: ServerFolder = folder) -> list[str]:
            return arguments(SITE, of.path, **{"bank-a": name})

        liar = partial(begin, HOSTILE, site(HOSTILE), partial(turn_hostile, here / "died"))
        for name in (*HONEST, "eve"):
            begin(name, site(name))
        begin("stranger", site(HONEST[0], stranger))
        hostile, server = liar(), begin("server", arguments(SERVER, folder.path))
        until = time.monotonic() + SECONDS
        while (code := server.poll()) is None and time.monotonic() < until:
            if hostile.poll() == -signal.SIGKILL:
                hostile = liar()
            time.sleep(0.05)
        assert code == 0, (here / "server.txt").read_text()[-3000:]
    assert (here / "died").is_file()
    records = StudyFolder(folder.study).run("mira", 3).records()
    return Attacked(folder, records, run_without(here, base, data), stranger)


def test_each_kind_of_lie_is_refused_by_its_word_and_the_others_are_answered(attacked: Attacked, note: Note) -> None:
    assert [record["round"] for record in attacked.records] == list(range(1, ROUNDS + 1))
    for record, (what, words) in zip(attacked.records, PLAN, strict=True):
        assert sorted(record["answered"]) == sorted(HONEST), (what, record["refused"])
        assert record["refused"][HOSTILE] in words or what == "mutated", (what, record["refused"])
    reasons = Counter(record["refused"][HOSTILE] for record in attacked.records)
    note("rounds with a hostile real site", ROUNDS, {"kinds of lie": len(PLAN) - MUTATED, **dict(reasons)})
    note("mutated messages through the socket", MUTATED, {"admitted": 0, "rounds lost": 0})


def test_honest_sites_have_the_adapters_of_a_run_without_the_hostile_one(attacked: Attacked) -> None:
    assert {name: adapter(attacked.folder, name) for name in HONEST} == attacked.without


def test_a_round_ends_by_its_deadline(attacked: Attacked, note: Note) -> None:
    longest = max(record["seconds_training"] for record in attacked.records)
    assert DEADLINE <= longest < DEADLINE + 5
    note("rounds whose hostile site hangs or dies", 3, {"deadline, s": DEADLINE, "longest training, s": longest})


def test_who_is_not_on_the_list_or_has_another_authoritys_key_gets_no_order_of_a_run(attacked: Attacked) -> None:
    for folder, name in ((attacked.folder, "eve"), (attacked.stranger, HONEST[0])):
        orders = list(read_audit(folder.site(name).audit)) if folder.site(name).audit.is_file() else []
        assert [line for line in orders if line["what"] not in ("refused",)] == []
    sent = list(read_audit(attacked.folder.audit))
    assert {line["to"] for line in sent if line["run"]} == set(SITES)
