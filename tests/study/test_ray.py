"""Studies in Ray's actors: the bits of one process, whoever is lost on the way, and how they end.

Slow, for Ray and each actor take seconds to start; tests/engine/test_spread.py has orders and actors without Ray.
"""

import importlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests import small_study
from tests.small_study import command, differences, outcome

import fedmira
from fedmira.config.faults import check_config
from fedmira.engine.events import Event, RoundDone, silent
from fedmira.errors import FedMiraError, MethodError, Stopped
from fedmira.study.face import Study, resume

pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedmira[ray]'")

from fedmira.engine.spread.cluster import opened
from fedmira.engine.spread.crew import Crew

RAY = {"engine": "ray", "workers": 2}
Carry = Callable[..., Study]


def actors() -> list[psutil.Process]:
    """The processes of actors, which Ray names by what they do."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::Trainer"):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


# ---------------------------------------------------------------- slow: every actor imports torch and loads the base


@pytest.mark.slow
def test_two_actors_give_the_bits_of_one_process(tmp_path: Path) -> None:
    """With the bundled base, and a method whose clients keep an adapter to themselves."""
    changes = [
        "data.clients.first=4",
        "data.subsample=0.1",
        "federation.cohort=1",
        "federation.rounds=2",
        "training.local_epochs=null",
        "training.local_steps=1",
        "methods=[{name: ditto}]",
        "seeds=[0]",
        "evaluation.metrics=[loss]",
    ]
    found = {}
    for engine, more in (("local", []), ("ray", ["federation.workers=2"])):
        config = fedmira.load_config(
            "demo", [*changes, f"output_dir={tmp_path / engine}", f"federation.engine={engine}", *more]
        )
        found[engine] = outcome(fedmira.run(config).path)
    assert differences(found["local"], found["ray"]) == []
    assert actors() == []


METHODS: list[Mapping[str, Any]] = [
    {"name": "ditto"},
    {"name": "mira", "lambda": 0.25, "graph": {"kind": "groups", "column": "group"}},
    {"name": "feddpa"},
    {"name": "fedavg_ft", "epochs": 1},
    {"name": "flora"},
    {"name": "pooled"},
    {"name": "untouched"},
    {"name": "fedavg", "with": [{"name": "noised", "sigma": 0.01, "secret": False}]},
]
CHANGES: Mapping[str, Any] = {
    "lora": {"ranks": [1, 2, 2, 1, 2, 2], "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.3, "keep_optimizer": True},
    "report": {"examples": True},
}


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """Ray, started once for all studies of this process."""
    with opened(None, cpus=2):
        yield


@pytest.fixture(scope="module")
def carry(tmp_path_factory: pytest.TempPathFactory) -> Carry:
    """Run a small study: its name, what is different, and an observer."""
    here = tmp_path_factory.mktemp("ray")
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")

    def carried_out(name: str, *, observer: Callable[[Event], None] = silent, **changes: Any) -> Study:
        raw = small_study.settings(base, data, here / name, **changes)
        if "ranks" in raw["lora"]:
            del raw["lora"]["r"]
        return fedmira.run(check_config(raw), observer=observer)

    return carried_out


@pytest.fixture(scope="module")
def here(carry: Carry) -> dict[str, Any]:
    """What ditto gives in one process."""
    return outcome(carry("here", methods=[{"name": "ditto"}]).path)


@pytest.mark.slow
def test_methods_of_every_kind_have_the_bits_of_one_process(carry: Carry, ray_here: None) -> None:
    found = [
        carry(name, methods=METHODS, federation={"rounds": 3, **more}, **CHANGES)
        for name, more in (("kinds-here", {}), ("kinds-there", RAY))
    ]
    assert differences(*(outcome(study.path) for study in found)) == []
    assert len(found[1].runs) == len(METHODS)


class During:
    """Does something once, in the middle of a round: when an order of it is under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deed: Callable[[], None]) -> None:
        self.round, self.done = 0, False
        carry_out = Crew.carry_out

        def watched(crew: Crew, tasks: Any) -> Iterator[tuple[int, Any]]:
            for answer in carry_out(crew, tasks):
                if self.round == 2 and tasks[0].what == "train" and not self.done:
                    self.done = True  # one pass is done, another is under way
                    deed()
                self.lost = crew.lost
                yield answer

        monkeypatch.setattr(Crew, "carry_out", watched)

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundDone):
            self.round = event.record.round


@pytest.mark.slow
def test_passes_of_an_actor_that_is_killed_are_computed_by_another(
    carry: Carry, here: dict[str, Any], ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        for process in actors():
            process.kill()

    during = During(monkeypatch, kill)
    study = carry("killed", methods=[{"name": "ditto"}], federation={**RAY, "cohort": 2}, observer=during)
    assert during.lost >= 1
    assert differences(here, outcome(study.path)) == []


@pytest.mark.slow
def test_an_order_that_ends_every_actor_stops_the_run(
    carry: Carry, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmira.engine.spread.crew.TRIES", 1)
    with pytest.raises(Stopped, match="resume with federation"):
        carry("deadly", methods=[{"name": "tests.study.broken", "how": "killed"}], federation=RAY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [("refuses", MethodError, "not with these rows"), ("hungry", Stopped, "out of memory")],
)
def test_an_error_in_an_actor_ends_the_run_as_here(
    how: str, kind: type[FedMiraError], words: str, carry: Carry, ray_here: None
) -> None:
    for engine in ({}, RAY):
        with pytest.raises(kind, match=words):
            carry(f"{how}-{len(engine)}", methods=[{"name": "tests.study.broken", "how": how}], federation=engine)


@pytest.mark.slow
def test_a_study_goes_on_in_another_engine_and_with_other_actors(carry: Carry, ray_here: None) -> None:
    whole = carry("whole", methods=[{"name": "ditto"}], federation={"rounds": 3})
    part = carry("part", methods=[{"name": "ditto"}], federation={"rounds": 1})
    resume(part.path, ["federation.rounds=2", "federation.engine=ray", "federation.workers=1"])
    assert part.config.federation.engine == "ray"
    resume(part.path, ["federation.workers=2"])
    resume(part.path, ["federation.rounds=3", "federation.engine=local"])
    assert part.config.federation.workers is None
    assert differences(outcome(whole.path), outcome(part.path)) == []


@pytest.mark.slow
def test_private_training_pays_as_in_one_process(carry: Carry, ray_here: None) -> None:
    pytest.importorskip("dp_accounting")
    spent = []
    for name, engine in (("private-here", {}), ("private-there", RAY)):
        study = carry(name, methods=[{"name": "fedavg"}], federation={"rounds": 2, **engine}, privacy={"epsilon": 1e4})
        spent.append(study.runs[0].facts.privacy)
    assert spent[0] == spent[1]
    assert not (study.runs[0].path / "noise.key").exists()


@pytest.mark.slow
def test_a_lost_node_loses_no_round(carry: Carry, tmp_path: Path) -> None:
    """In a process of its own: Ray joins a cluster at the machine's address, which this one may not reach for."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # what another test has started is not this cluster
    rounds = {"rounds": 200, "cohort": 2}
    alone = carry("alone", methods=[{"name": "ditto"}], federation=rounds)
    own = next(one.address for some in psutil.net_if_addrs().values() for one in some if is_outside(one))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": own, "include_dashboard": False}
    )
    try:
        second = cluster.add_node(num_cpus=1, node_ip_address=own)
        cluster.wait_for_nodes()
        raw = {**alone.config.model_dump(by_alias=True), "output_dir": str(tmp_path / "study")}
        raw["federation"] |= {**RAY, "address": cluster.address}
        started = begin(small_study.save_config(tmp_path / "c.yaml", raw))
        metrics = tmp_path / "study/ditto/seed-3/metrics.jsonl"
        for _ in range(1200):
            if metrics.is_file() or started.poll() is not None:
                break
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)
        done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        assert done < rounds["rounds"], "the study was over before"
        _, said = started.communicate(timeout=600)
        assert started.returncode == 0, said
        assert differences(outcome(alone.path), outcome(tmp_path / "study")) == []
    finally:
        ray.shutdown()
        cluster.shutdown()


def begin(config: Path) -> subprocess.Popen[str]:
    """Start a study in a process of its own, which is not a fork: Ray has threads here."""
    words = [sys.executable, "-m", "fedmira", "run", str(config)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def is_outside(one: Any) -> bool:
    """Is this an address by which other machines know this one?"""
    return one.family == socket.AF_INET and not one.address.startswith("127.")


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_no_actor_is_left(carry: Carry, tmp_path: Path) -> None:
    folder = carry("first", methods=[{"name": "ditto"}], federation={"rounds": 1}).path
    raw = {**Study(folder).config.model_dump(by_alias=True), "output_dir": str(tmp_path / "study")}
    raw["federation"] |= {**RAY, "rounds": 500}
    config = small_study.save_config(tmp_path / "c.yaml", raw)
    started = begin(config)
    for _ in range(1200):
        if (tmp_path / "study/ditto/seed-3/metrics.jsonl").is_file() or started.poll() is not None:
            break
        time.sleep(0.2)
    assert actors()
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 130
    assert "continue with: fedmira resume" in said
    time.sleep(1)
    assert actors() == []


# ---------------------------------------------------------------- mistakes


@pytest.fixture
def config(tmp_path: Path) -> Path:
    base, data = small_study.save_base(tmp_path / "base"), small_study.save_data(tmp_path / "data.jsonl")
    return small_study.save_config(tmp_path / "c.yaml", small_study.settings(base, data, tmp_path / "study"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["federation.engine=rya"], "'local' or 'ray'"),
        (["federation.engine=ray", "federation.workers=0"], "federation.workers"),
        (["federation.workers=2"], "set engine: ray"),
        (["federation.engine=ray", "federation.num_workers=2"], "did you mean 'workers'"),
        (["federation.engine=ray", "federation.address=127.0.0.1:1"], "no Ray cluster answers at '127.0.0.1:1'"),
        (["federation.engine=ray", "federation.address=somewhere"], "no Ray cluster answers at 'somewhere'"),
        (
            ["federation.engine=ray", "federation.address=auto", "privacy={epsilon: 8.0}"],
            "federation.address with privacy",
        ),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, changes: list[str], words: str
) -> None:
    ended = command("run", config, *changes)
    assert ended.code == 2
    assert words in ended.err
    assert not (tmp_path / "study").exists()


def test_without_the_extra_the_error_says_what_to_install(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    ended = command("run", config, "federation.engine=ray")
    assert ended.code == 2
    assert "pip install 'fedmira[ray]'" in ended.err
