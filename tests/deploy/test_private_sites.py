"""Privacy where the data are: each site keeps its account, pays before it answers, and refuses beyond its budget."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.deploy.federation import SITES, Loopback, write_federation

from fedmira.config.faults import check_config
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.remote import digest_of
from fedmira.deploy.server import Server
from fedmira.deploy.terms import list_unfit
from fedmira.deploy.wire import Frame, decode, pack_message
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent
from fedmira.errors import MethodError
from fedmira.methods import recipe_of
from fedmira.privacy.accountant import Release, epsilon
from fedmira.privacy.budget import read_payments

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (an extra of fedmira)")

PRIVACY = {"epsilon": 50.0, "delta": 1e-3, "noise_multiplier": 1.5, "clip": 1.0}
SMALL = PRIVACY | {"epsilon": 4.0}
ROUNDS, STEPS, BATCH = 2, 2, 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def made(files: tuple[Path, Path], folder: Path, **changes: Any) -> ServerFolder:
    raw = small_study.settings(*files, folder / "unused") | {
        "federation": {"rounds": ROUNDS, "participation": 1.0, "cohort": 1},
        "training": {"local_steps": STEPS, "batch_size": BATCH, "learning_rate": 0.1},
        "methods": [{"name": "fedavg"}],
        "privacy": PRIVACY,
    }
    return write_federation(folder / "federation", raw | changes, files[1])


def carry_out(folder: ServerFolder, link: Loopback) -> StudyFolder:
    server = Server(folder, link, print, silent)
    server.members.gather()
    server.carry_out()
    for worker in link.workers.values():
        worker.handle(Frame({"order": "end", "run_id": "", "round": 0, "counted": 0, "learning_rate": 0.0}).encode())
    return StudyFolder(folder.study)


def state(folder: ServerFolder, site: str) -> Path:
    return folder.site(site).state / "fedavg" / "seed-3"


def test_a_site_pays_before_it_answers_and_its_card_says_what(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = made(files, tmp_path)
    seen: list[tuple[str, int, Mapping[str, Any]]] = []

    def look(name: str, data: bytes) -> bytes:
        header = decode(data).header
        if "weight" in header:
            seen.append((name, len(read_payments(state(folder, name))), header))
        return data

    link = Loopback({name: folder.site(name) for name in SITES}, tamper=look)
    study = carry_out(folder, link)
    assert [(name, paid) for name, paid, _ in seen] == [(name, number) for number in (1, 2) for name in SITES]
    shared = [header["metrics"] for _, _, header in seen]
    assert all(one.get("train_loss") is None and one.get("validation_loss") is None for one in shared)
    for name in SITES:
        examples = link.workers[name].site.client.train
        spent = {Release(BATCH / len(examples), 1, PRIVACY["noise_multiplier"]): ROUNDS * STEPS}
        expected = epsilon(spent, PRIVACY["delta"])
        place = folder.site(name).adapters / "fedavg" / "seed-3"
        assert f"epsilon {expected:.3g}" in (place / "README.md").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        found = [line["epsilon_of_examples"] for line in lines if line["what"] == "train"]
        assert found[0] < found[1] == pytest.approx(expected)
        assert not (state(folder, name) / "noise.key").exists(), "who has it can take the noise off"
    tables = json.loads((study.run("fedavg", 3).path / "clients.json").read_text())
    assert {one["trained_tokens"] for one in tables.values()} == {0}


def order_of(folder: ServerFolder, link: Loopback, number: int, *, add: float = 0.0) -> bytes:
    """An order to the first site to train in a later round, as its server would send it."""
    site = link.workers[SITES[0]]
    (run,) = site.runs.values()
    assert run.received is not None
    parts, rows = pack_message(run.received[1])
    rows = rows + add
    federation = run.federation
    header = {
        "order": "train",
        "run_id": federation.run,
        "round": number,
        "counted": number - 1,
        "learning_rate": 0.1,
        "base_hash": federation.base,
        "layout_hash": federation.layout_hash,
        "method": "fedavg",
        "client": SITES[0],
        "parts": parts,
        "same": digest_of(parts, rows),
    }
    return Frame(header, rows).encode()


def test_an_order_that_comes_again_is_the_same_release_and_other_rows_are_another(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = made(files, tmp_path)
    link = Loopback({name: folder.site(name) for name in SITES})
    carry_out(folder, link)
    worker, account = link.workers[SITES[0]], state(folder, SITES[0])
    paid = []
    for order in (order_of(folder, link, 3), order_of(folder, link, 3), order_of(folder, link, 3, add=0.5)):
        answer = decode(worker.handle(order))
        assert answer.header["answer"] == "done"
        paid.append(len(read_payments(account)))
    assert paid == [ROUNDS + 1, ROUNDS + 1, ROUNDS + 2]


def test_a_server_that_asks_for_more_than_is_paid_for_gets_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = made(files, tmp_path, privacy=SMALL)
    link = Loopback({name: folder.site(name) for name in SITES})
    carry_out(folder, link)
    worker = link.workers[SITES[0]]
    answers: list[Mapping[str, Any]] = []
    while not answers or answers[-1]["answer"] == "done":
        answers.append(decode(worker.handle(order_of(folder, link, ROUNDS + 1 + len(answers)))).header)
    assert (answers[-1]["answer"], answers[-1]["kind"]) == ("failed", "budget")
    paid = read_payments(state(folder, SITES[0]))
    assert len(paid) == ROUNDS + len(answers) - 1
    metrics = folder.site(SITES[0]).adapters / "fedavg" / "seed-3" / "metrics.jsonl"
    assert "epsilon_of_examples" not in json.loads(metrics.read_text().splitlines()[-1]), "that of the round before"
    release = Release(BATCH / len(worker.site.client.train), 1, SMALL["noise_multiplier"])
    assert epsilon({release: STEPS * len(paid)}, SMALL["delta"]) <= SMALL["epsilon"]
    assert epsilon({release: STEPS * (len(paid) + 1)}, SMALL["delta"]) > SMALL["epsilon"]


def test_a_budget_that_does_not_last_to_the_end_is_refused_before_the_first_round(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = made(files, tmp_path, privacy=SMALL, federation={"rounds": 300, "participation": 1.0, "cohort": 1})
    link = Loopback({name: folder.site(name) for name in SITES})
    with pytest.raises(MethodError, match=r"pays for \d+ of 300 rounds .* federation.rounds=\d+"):
        carry_out(folder, link)
    assert not any(state(folder, name).exists() for name in SITES)


def test_what_no_budget_pays_for_is_refused_when_a_federation_is_made(files: tuple[Path, Path], tmp_path: Path) -> None:
    raw = small_study.settings(*files, tmp_path / "unused") | {
        "methods": [{"name": "fedavg_ft", "steps": 2}, {"name": "mira", "graph": {"kind": "knn"}}],
        "privacy": PRIVACY,
    }
    config = check_config(raw)
    found = " ".join(list_unfit(config, [recipe_of(entry) for entry in config.methods], SITES))
    assert "lets clients train, or choose, after the last round" in found
    assert "a profile of the clients' data is not private" in found


def test_noise_on_uploads_is_counted_at_the_site(files: tuple[Path, Path], tmp_path: Path) -> None:
    wrappers = [{"name": "clip", "norm": 1.0}, {"name": "noise", "sigma": 4.0, "delta": 1e-3}]
    folder = made(files, tmp_path, privacy=None, methods=[{"name": "fedavg", "with": wrappers}])
    link = Loopback({name: folder.site(name) for name in SITES})
    carry_out(folder, link)
    for name in SITES:
        place = folder.site(name).adapters / "fedavg" / "seed-3"
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        found = [line["epsilon"] for line in lines if line["what"] == "train"]
        assert 0 < found[0] < found[1]
        assert "privacy of each client's data" in (place / "README.md").read_text(encoding="utf-8")
        assert not (state(folder, name) / "noise.key").exists()
