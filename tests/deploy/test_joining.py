"""A site that joins a study under way: where it starts, what the others notice, and that a crash changes nothing."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import small_study
from tests.deploy.federation import SITES, Loopback, write_federation

from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.link import Failure
from fedmira.deploy.server import Server
from fedmira.deploy.site import Site, open_site
from fedmira.deploy.wire import decode
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.engine.events import Event, RoundDone, silent
from fedmira.engine.newcomers import take_in
from fedmira.engine.schedule import draw_schedule

NEW = SITES[2]
MIRA: Mapping[str, Any] = {"name": "mira", "lambda": 0.25, "graph": {"kind": "uniform"}}
METHODS: list[Mapping[str, Any]] = [
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "fedavg", "label": "fedsa", "with": [{"name": "only", "travels": "A"}]},
    {"name": "groupavg", "column": "group"},
    {"name": "flexlora"},
    {"name": "fedptuning"},
    {"name": "mira", "label": "learned", "lambda": 0.25, "graph": {"kind": "learned"}},
    {"name": "mira", "label": "product", "lambda": 0.25, "space": "product", "graph": {"kind": "uniform"}},
    {"name": "tests.laws.fedex", "label": "fedex"},
]
Watch = Callable[[Event, ServerFolder], None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    here = tmp_path_factory.mktemp("joining")
    return small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")


def settings(files: tuple[Path, Path], *methods: Mapping[str, Any]) -> dict[str, Any]:
    return small_study.settings(
        *files,
        files[0].parent / "unused",
        federation={"rounds": 4, "participation": 1.0, "cohort": 1},
        training={"local_steps": 2, "batch_size": 2, "learning_rate": 0.3, "keep_optimizer": True},
        methods=[dict(method) for method in methods],
    )


@pytest.fixture(scope="module")
def opened(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Site]:
    folder = write_federation(
        tmp_path_factory.mktemp("opened") / "federation", settings(files, MIRA, *METHODS), files[1]
    )
    return {name: open_site(folder.site(name)) for name in SITES}


class Recording(Loopback):
    """Keeps every order that was sent."""

    def call(self, frames: Mapping[str, bytes], seconds: float) -> Iterator[tuple[str, bytes | Failure]]:
        self.orders = [*getattr(self, "orders", []), *((name, decode(frame)) for name, frame in frames.items())]
        yield from super().call(frames, seconds)

    def sent(self, site: str, what: str) -> list[Any]:
        return [frame for name, frame in self.orders if name == site and frame.header["order"] == what]


def list_sites(folder: ServerFolder, *names: str) -> None:
    """Write who is in federation.yaml, as `init --add-site` does."""
    raw = {**json.loads(folder.settings.read_text()), "sites": list(names)}
    folder.settings.write_text(json.dumps(raw))


def carry_out(folder: ServerFolder, link: Loopback, watch: Watch) -> Server:
    server = Server(folder, link, lambda line: said.append(line), lambda event: watch(event, folder))
    server.members.gather()
    server.carry_out()
    return server


said: list[str] = []


def add_after(number: int, label: str = "mira") -> Watch:
    """Add the new site once a round of a method is durable."""

    def watch(event: Event, folder: ServerFolder) -> None:
        run = StudyFolder(folder.study).run(label, 3)
        if isinstance(event, RoundDone) and event.record.round == number and (run.path / "run.json").is_file():
            list_sites(folder, *SITES)

    return watch


@pytest.fixture(scope="module")
def joined(
    files: tuple[Path, Path], opened: Mapping[str, Site], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ServerFolder, Recording]:
    """MIRA of two sites for two rounds, then of three."""
    folder = write_federation(tmp_path_factory.mktemp("joined") / "federation", settings(files, MIRA), files[1])
    list_sites(folder, *SITES[:2])
    link = Recording({name: folder.site(name) for name in SITES}, opened=opened)
    carry_out(folder, link, add_after(2))
    return folder, link


def run_of(folder: ServerFolder, label: str = "mira") -> RunFolder:
    return StudyFolder(folder.study).run(label, 3)


def test_a_new_site_takes_part_from_the_next_round_on(joined: tuple[ServerFolder, Recording]) -> None:
    folder, _ = joined
    facts, records = run_of(folder).facts, run_of(folder).records()
    assert facts.state == "complete"
    assert facts.joined == {NEW: 3}
    assert [record["clients"] for record in records] == [list(SITES[:2])] * 2 + [list(SITES)] * 2
    assert all(record["answered"] == record["clients"] for record in records)
    assert (folder.site(NEW).adapters / "mira" / "seed-3" / "adapter_model.safetensors").is_file()


def test_mira_starts_it_from_its_neighbours_mean(joined: tuple[ServerFolder, Recording]) -> None:
    """What it is sent first is the mean of what the two others are sent in that round."""
    _, link = joined
    first = link.sent(NEW, "losses")[0]  # and trains on that
    assert first.header["round"] == link.sent(NEW, "train")[0].header["round"] == 3
    assert link.sent(NEW, "train")[0].header["same"] == first.header["same"]
    others = [next(one for one in link.sent(site, "losses") if one.header["round"] == 3) for site in SITES[:2]]
    assert torch.allclose(first.rows, (others[0].rows + others[1].rows) / 2, rtol=0, atol=1e-7)
    assert float((others[0].rows - others[1].rows).abs().max()) > 1e-4


def test_its_figures_begin_with_the_untouched_base(joined: tuple[ServerFolder, Recording]) -> None:
    folder, _ = joined
    lines = (run_of(folder).path / "results.csv").read_text().splitlines()[1:]
    starts = [line.split(",") for line in lines if line.split(",")[0] == NEW and line.split(",")[3] == "0"]
    assert len(starts) == len({(line[5], line[6]) for line in starts}) >= 2
    assert "joined" in (StudyFolder(folder.study).path / "report.html").read_text()


def test_what_a_crash_right_after_joining_leaves_goes_on_to_the_same_bits(
    files: tuple[Path, Path],
    opened: Mapping[str, Site],
    joined: tuple[ServerFolder, Recording],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server dies when the new site has its row and nothing of that is on disk, and once more a round later."""
    folder = write_federation(tmp_path / "federation", settings(files, MIRA), files[1])
    list_sites(folder, *SITES[:2])
    crashes = iter([True, True])

    def dies(ledger: Any, method: Any) -> None:
        take_in(ledger, method)
        if ledger.federation.since is not None and len(ledger.federation) == 3 and next(crashes, False):
            raise KeyboardInterrupt

    monkeypatch.setattr("fedmira.engine.run.take_in", dies)
    for attempt in range(3):
        link = Loopback({name: folder.site(name) for name in SITES}, opened=opened)
        try:
            carry_out(folder, link, add_after(2))
        except KeyboardInterrupt:
            assert attempt < 2
    assert run_of(folder).facts.joined == {NEW: 3}
    for site in SITES:
        one, other = (
            load_file(place.site(site).adapters / "mira" / "seed-3" / "adapter_model.safetensors")
            for place in (folder, joined[0])
        )
        assert all(torch.equal(one[name], other[name]) for name in other)
    found, expected = ([{k: v for k, v in record.items() if not k.startswith("seconds")} for record in one]
                       for one in (run_of(folder).records(), run_of(joined[0]).records()))  # fmt: skip
    assert found == expected


def label_of(method: Mapping[str, Any]) -> str:
    return str(method.get("label", method["name"]))


FAST = ("fedsa", "learned", "fedex")  # a part travels, a learned graph, the base changes; `joined` is plain MIRA


@pytest.mark.parametrize(
    "method",
    [one if label_of(one) in FAST else pytest.param(one, marks=pytest.mark.slow) for one in METHODS],
    ids=label_of,
)
def test_a_site_joins_under_every_kind_of_method(
    method: Mapping[str, Any], files: tuple[Path, Path], opened: Mapping[str, Site], tmp_path: Path
) -> None:
    label = label_of(method)
    folder = write_federation(tmp_path / "federation", settings(files, method), files[1])
    list_sites(folder, *SITES[:2])
    link = Loopback({name: folder.site(name) for name in SITES}, opened=opened)
    carry_out(folder, link, add_after(2, label))
    run = run_of(folder, label)
    assert run.facts.joined == {NEW: 3}
    assert run.facts.state == "complete"
    assert run.records()[-1]["answered"] == list(SITES)
    assert not run.records()[-1]["refused"]
    own = [json.loads(line) for line in (link.folders[NEW].adapters / label / "seed-3" / "metrics.jsonl").open()]
    assert [line["round"] for line in own if line["what"] == "train"] == [3, 4]


def test_a_site_of_a_new_group_is_told_why_it_cannot_join(
    files: tuple[Path, Path], opened: Mapping[str, Site], tmp_path: Path
) -> None:
    method = {"name": "groupavg", "column": "group"}
    folder = write_federation(tmp_path / "federation", settings(files, method), files[1])
    list_sites(folder, SITES[0], SITES[2])  # both are of the group 'even'
    link = Loopback({name: folder.site(name) for name in SITES}, opened=opened)
    carry_out(folder, link, add_after(2, "groupavg"))
    assert run_of(folder, "groupavg").facts.joined is None
    assert "the site's group is a new one" in link.workers[SITES[1]].refused


def test_a_site_that_is_taken_off_the_list_is_asked_for_nothing(
    files: tuple[Path, Path], opened: Mapping[str, Site], tmp_path: Path
) -> None:
    folder = write_federation(tmp_path / "federation", settings(files, MIRA), files[1])
    link = Recording({name: folder.site(name) for name in SITES}, opened=opened)

    def remove(event: Event, folder: ServerFolder) -> None:
        if isinstance(event, RoundDone) and event.record.round == 2:
            list_sites(folder, *SITES[:2])
            link.orders.clear()

    carry_out(folder, link, remove)
    orders = [frame.header["order"] for name, frame in link.orders if name == NEW]
    assert [what for what in orders if what != "losses"] == ["refused"]  # once
    assert "taken it out" in link.workers[NEW].refused
    records = run_of(folder).records()
    assert [record["answered"] for record in records] == [list(SITES)] * 2 + [list(SITES[:2])] * 2
    assert records[-1]["refused"] == {NEW: "unlisted"}


def test_rounds_before_a_client_joined_are_drawn_as_if_it_did_not_exist() -> None:
    alone = draw_schedule(8, rounds=4, participation=0.5, seed=1)
    grown = draw_schedule(10, rounds=9, participation=0.5, seed=1, since=[1] * 8 + [5, 7])
    assert [ids.tolist() for ids in grown[:4]] == [ids.tolist() for ids in alone]
    assert [len(ids) for ids in grown] == [4] * 4 + [4] * 2 + [5] * 3
    assert any(9 in ids for ids in grown[6:])
    assert not any(9 in ids for ids in grown[:6])


def test_nothing_is_asked_before_all_have_joined_once(
    files: tuple[Path, Path], opened: Mapping[str, Site], tmp_path: Path
) -> None:
    folder = write_federation(tmp_path / "federation", settings(files, MIRA), files[1])
    link = Loopback({name: folder.site(name) for name in SITES}, opened=opened)
    server = Server(folder, link, said.append, silent)
    server.members.gather()
    assert json.loads(folder.members.read_text()) == list(SITES)
