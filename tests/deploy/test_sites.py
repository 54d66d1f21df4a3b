"""Sites that fail, lie or come back: a round goes on without them, and nothing of their data is told."""

import json
import logging
import math
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small_study
from tests.deploy.federation import SITES, Loopback, write_federation
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedmira.deploy.audit import read_audit
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.joining import card_of, read_card, why_not
from fedmira.deploy.link import Failure
from fedmira.deploy.server import Server
from fedmira.deploy.settings import read_agreement
from fedmira.deploy.site import Site, open_site
from fedmira.deploy.wire import Frame, decode
from fedmira.deploy.worker import Worker
from fedmira.disk import table
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent
from fedmira.engine.round import Sender
from fedmira.errors import ModelError, WireError
from fedmira.methods.base import Message

ROUNDS = 3
SECRET = "w9-patient-4711"
RATE = {"batch_size": 2, "learning_rate": 0.3}
ROW = 4 * 2 * 2 * ((16 + 16) + (16 + 8))  # bytes of an adapter: rank 2, 2 layers; q 16 -> 16, v 16 -> 8
HEADER = 2048  # bytes of a frame beside its numbers, at most


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    here = tmp_path_factory.mktemp("sites")
    return small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")


def plain(base: Path, data: Path) -> dict[str, Any]:
    return small_study.settings(
        base,
        data,
        base.parent / "unused",
        federation={"rounds": ROUNDS, "participation": 1.0, "cohort": 1},
        methods=[{"name": "mira", "lambda": 0.25, "graph": {"kind": "uniform"}}],
    )


@pytest.fixture
def make(files: tuple[Path, Path], tmp_path: Path) -> Callable[..., ServerFolder]:
    base, data = files

    def made(name: str = "federation", *, sites: Mapping[str, Any] | None = None, **changes: Any) -> ServerFolder:
        return write_federation(tmp_path / name, plain(base, data) | changes, data, **(sites or {}))

    return made


@pytest.fixture(scope="module")
def opened(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Site]:
    """The sites of the plainest federation, loaded once."""
    folder = write_federation(tmp_path_factory.mktemp("plain") / "federation", plain(*files), files[1])
    return {name: open_site(folder.site(name)) for name in SITES}


def carry_out(
    folder: ServerFolder,
    tamper: Callable[[str, bytes], bytes | Failure] | None = None,
    *,
    opened: Mapping[str, Site] | None = None,
) -> tuple[list[dict[str, Any]], Loopback]:
    """Carry out the study; return its rounds. The sites that tamper are not known when they join."""
    link = Loopback({name: folder.site(name) for name in SITES}, opened=opened)
    server = Server(folder, link, print, silent)
    server.members.gather()
    link.tamper = tamper
    server.carry_out()
    return StudyFolder(folder.study).run("mira", 3).records(), link


def changed(data: bytes, **header: Any) -> bytes:
    frame = decode(data)
    return replace(frame, header={**frame.header, **header}).encode()


def with_rows(data: bytes, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    frame = decode(data)
    return data if frame.rows is None else replace(frame, rows=change(frame.rows)).encode()


def poison(rows: torch.Tensor) -> torch.Tensor:
    rows[0, 5] = math.nan
    return rows


def grown(data: bytes) -> bytes:
    """Make the header one that is as long as is allowed, and longer once JSON is written with ASCII only."""
    frame = decode(data)
    text = json.dumps({**frame.header, "metrics": {"x": "é" * 500_000}}, ensure_ascii=False).encode()
    (length,) = struct.unpack_from(">Q", data)
    return struct.pack(">Q", len(text)) + text + data[8 + length :]


LIES: Mapping[str, tuple[Callable[[bytes], bytes | Failure], str]] = {
    "not a number": (lambda data: with_rows(data, poison), "not_finite"),
    "huge": (lambda data: with_rows(data, lambda rows: rows + 1e30), "norm"),
    "short": (lambda data: with_rows(data, lambda rows: rows[:, :-16]), "size"),
    "long": (lambda data: with_rows(data, lambda rows: torch.cat([rows, rows], dim=1)), "size"),
    "doubles": (lambda data: with_rows(data, torch.Tensor.double), "size"),
    "another base": (lambda data: changed(data, base_hash="0" * 64), "schema"),
    "another run": (lambda data: changed(data, run_id="fedavg/seed-0"), "schema"),
    "another round": (lambda data: changed(data, round=1), "round"),
    "another site": (lambda data: changed(data, client="ada"), "identity"),
    "no weight": (lambda data: changed(data, weight=0), "weight"),
    "endless weight": (lambda data: changed(data, weight=math.inf), "weight"),
    "more examples than it has": (lambda data: changed(data, weight=1e9), "weight"),
    "a weight of text": (lambda data: changed(data, weight="7"), "schema"),
    "an old answer": (lambda data: changed(data, nonce="0" * 16), "duplicate"),
    "steps below 0": (lambda data: changed(data, steps=-1), "schema"),
    "answers scored below 0": (lambda data: changed(data, scored=-1), "schema"),
    "a header that grows": (grown, "size"),
    "garbage": (lambda data: b"\x00" * 40, "schema"),
    "nothing": (lambda data: b"", "schema"),
    "away": (lambda data: Failure("late"), "late"),
}


# One for each reason to refuse; the others are lies with a reason that one of these has.
FAST = (
    "not a number",
    "huge",
    "short",
    "another round",
    "another site",
    "endless weight",
    "an old answer",
    "answers scored below 0",
    "a header that grows",
    "garbage",
    "away",
)


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in LIES]
)
def test_a_site_that_lies_is_left_out_and_the_others_go_on_as_if_it_were_away(
    kind: str, make: Callable[..., ServerFolder], opened: Mapping[str, Site]
) -> None:
    lie, reason = LIES[kind]

    def tamper(name: str, data: bytes) -> bytes | Failure:
        header = decode(data).header
        return lie(data) if name == "cy" and header.get("round") == 2 and "weight" in header else data

    records, link = carry_out(make(), tamper, opened=opened)
    assert records[1]["refused"] == {"cy": reason}
    assert [sorted(record["answered"]) for record in records] == [
        sorted(SITES),
        sorted({*SITES} - {"cy"}),
        sorted(SITES),
    ]
    assert link.workers["cy"].runs["mira/seed-3"].at == 3  # its second round does not count, the third does


def test_an_honest_site_has_the_adapter_of_a_run_without_the_liar(
    make: Callable[..., ServerFolder], opened: Mapping[str, Site]
) -> None:
    def outcome(name: str, lie: Callable[[bytes], bytes | Failure]) -> bytes:
        folder = make(name)
        carry_out(
            folder,
            lambda site, data: lie(data) if site == "cy" and "weight" in decode(data).header else data,
            opened=opened,
        )
        return (folder.site("ada").adapters / "mira" / "seed-3" / "adapter_model.safetensors").read_bytes()

    away = outcome("away", lambda data: Failure("late"))
    assert outcome("liar", LIES["not a number"][0]) == away


def test_below_the_quorum_a_round_is_repeated_with_those_that_are_missing(
    make: Callable[..., ServerFolder], opened: Mapping[str, Site]
) -> None:
    tries: list[str] = []

    def tamper(name: str, data: bytes) -> bytes | Failure:
        if "weight" not in decode(data).header or decode(data).header["round"] != 1:
            return data
        tries.append(name)
        return Failure("late") if len(tries) <= 2 else data

    records, _ = carry_out(make(), tamper, opened=opened)
    assert tries == [*SITES, *SITES[:2]]  # the third answered at once and was not asked again
    assert sorted(records[0]["answered"]) == sorted(SITES)


def test_of_an_exception_at_a_site_only_the_type_leaves_it(
    make: Callable[..., ServerFolder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot read {SECRET}")

    folder = make()
    worker = Worker(folder.site("bo"), open_site(folder.site("bo")))
    monkeypatch.setattr("fedmira.deploy.worker.score_start", fails)
    order = {"order": "start", "run_id": "mira/seed-3", "round": 0, "learning_rate": 0.0, "counted": 0, "nonce": "n"}
    run = worker._run("mira/seed-3")
    names = {"base_hash": run.federation.base, "layout_hash": run.federation.layout_hash, "method": "mira"}
    with caplog.at_level(logging.CRITICAL):
        answer = worker.handle(Frame({**order, **names, "client": "bo"}).encode())
    assert decode(answer).header == {"answer": "failed", "kind": "RuntimeError", "nonce": "n"}
    assert SECRET.encode() not in answer
    assert SECRET not in (folder.site("bo").audit).read_text()


def test_a_site_that_shares_no_metrics_sends_no_loss_and_the_report_copes(make: Callable[..., ServerFolder]) -> None:
    folder = make(sites={"share_metrics": False})
    seen: list[Mapping[str, Any]] = []

    def watch(name: str, data: bytes) -> bytes:
        seen.append(decode(data).header)
        return data

    records, _ = carry_out(folder, watch)
    assert len(records) == ROUNDS
    assert all(header.get("metrics", {}) == {} for header in seen)
    assert not any("loss" in key for header in seen for key in header)
    assert (folder.study / "report.html").is_file()
    own = (folder.site("ada").adapters / "mira" / "seed-3" / "metrics.jsonl").read_text().splitlines()
    assert any("train_loss" in json.loads(line) for line in own)  # the site itself has them


@pytest.mark.parametrize("shares", [True, False])
def test_a_site_chooses_its_own_pull_and_tells_of_it_only_where_it_shares_figures(
    make: Callable[..., ServerFolder], shares: bool
) -> None:
    method = {"name": "mira", "lambda": "auto", "choice": {"alphas": [0, 1], "graphs": ["global"], "prior": 0}}
    folder = make(sites={"share_metrics": shares}, methods=[method], training={**RATE, "local_steps": 2})
    told: dict[str, set[float]] = {"alpha": set(), "graph": set(), "told": set(), "change_1": set()}

    def watch(name: str, data: bytes) -> bytes:
        header = decode(data).header
        for scalar, (_, value) in header.get("parts", {}).get("scalars", {}).items():
            told[scalar].add(value)
        for figure, value in header.get("figures", {}).items():
            told[figure].add(value)
        return data

    records, _ = carry_out(folder, watch)
    facts = StudyFolder(folder.study).run("mira", 3).facts
    assert facts.figures is not None
    if shares:
        assert told["alpha"] == {0.0, 1.0}
        assert len(told["change_1"]) > 2
        assert records[-1]["figures"]["alpha"] != [None] * len(SITES)
        assert None not in facts.figures["alpha"]
    else:
        assert told == {"alpha": {-1.0}, "graph": {-1.0}, "told": {0.0}, "change_1": {0.0}}
        assert records[-1]["figures"] == {"alpha": [None] * len(SITES), "graph": [None] * len(SITES)}
        assert facts.figures["alpha"] == [None] * len(SITES)
    assert (folder.study / "report.html").is_file()


@pytest.mark.parametrize("shares", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_site_tells_what_it_makes_of_others_rows_only_where_it_shares_figures(
    make: Callable[..., ServerFolder], shares: bool
) -> None:
    """FedFomo's weights follow from validation losses; rows of others reach sites all the same.

    The label is the folder that carry_out reads.
    """
    training = {**RATE, "local_steps": 2}
    folder = make(
        sites={"share_metrics": shares}, methods=[{"name": "fedfomo", "M": 1, "label": "mira"}], training=training
    )
    told: dict[str, set[float]] = {"other_0": set(), "told": set()}

    def watch(name: str, data: bytes) -> bytes:
        for scalar, (_, value) in decode(data).header.get("parts", {}).get("scalars", {}).items():
            told[scalar].add(value)
        return data

    records, _ = carry_out(folder, watch)
    assert told["told"] == ({0.0, 1.0} if shares else {0.0})
    assert (len(told["other_0"]) > 2) == shares
    assert shares or told["other_0"] == {0.0}
    assert [record["bytes_down"] for record in records] == [3 * ROW, *[6 * ROW] * (ROUNDS - 1)]


def test_a_frame_has_the_bytes_of_its_numbers_and_a_small_header(
    make: Callable[..., ServerFolder], opened: Mapping[str, Site]
) -> None:
    """An adapter travels up once in a round, and down once: the site has it already when the next round begins."""
    folder = make()
    records, _ = carry_out(folder, opened=opened)
    orders = [line for line in read_audit(folder.audit) if line["run"]]
    answers = [line for name in SITES for line in read_audit(folder.site(name).audit) if line["run"]]
    assert len(orders) == len(answers) == len(SITES) * (1 + 2 * ROUNDS + 1)  # the base, rounds with losses, the test
    for line in orders:
        numbers = ROW if line["what"] == "losses" or (line["what"], line["round"]) == ("train", 1) else 0
        assert numbers < line["bytes"] < numbers + HEADER
    for line in answers:
        numbers = ROW if line["what"] == "train" else 0
        assert numbers < line["bytes"] < numbers + HEADER
    assert [(record["bytes_up"], record["bytes_down"]) for record in records] == [(3 * ROW, 3 * ROW)] * ROUNDS


@pytest.mark.slow
def test_rows_and_frames_that_are_in_files_have_the_same_bits(
    make: Callable[..., ServerFolder], opened: Mapping[str, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(name: str) -> tuple[list[bytes], list[str]]:
        folder = make(name)
        carry_out(folder, opened=opened)
        run = StudyFolder(folder.study).run("mira", 3)
        assert list(folder.inbox.iterdir()) == []
        orders = [line["sha256"] for line in read_audit(folder.audit) if line["what"] == "losses"]
        return [path.read_bytes() for path in sorted(run.checkpoints.glob("*/state.safetensors"))], orders

    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)  # the nonces of orders
    small = outcome("small")
    for place in ("remote.IN_FILE_BYTES", "server.RAM_BYTES"):
        monkeypatch.setattr(f"fedmira.deploy.{place}", 0)
    monkeypatch.setattr(table, "BLOCK_BYTES", 0)
    assert outcome("large") == small


def test_the_server_makes_the_message_of_one_site_at_a_time_and_once_for_each_order(
    make: Callable[..., ServerFolder], opened: Mapping[str, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, list[int]]] = []
    send = Sender.__call__

    def noted(sender: Sender, ids: torch.Tensor) -> Message:
        asked.append((sender.clock.round, ids.tolist()))
        return send(sender, ids)

    monkeypatch.setattr(Sender, "__call__", noted)
    carry_out(make(), opened=opened)
    each = [[0], [1], [2]]
    training = [[0], *each]  # the first is played with, to know the form of what comes back
    assert [ids for number, ids in asked if number == 2] == [*each, *training]  # losses after round 1, round 2
    assert all(len(ids) == 1 for _, ids in asked)


@pytest.mark.slow
def test_a_site_that_was_restarted_answers_with_what_is_on_its_disk(make: Callable[..., ServerFolder]) -> None:
    """After every answer the site's process is replaced by a new one: the bits are those of one that lived on."""

    def outcome(name: str, *, restart: bool) -> list[bytes]:
        folder = make(name, training={"local_steps": 2, "batch_size": 2, "keep_optimizer": True, "learning_rate": 0.1})
        link = Loopback({site: folder.site(site) for site in SITES})
        server = Server(folder, link, print, silent)
        server.members.gather()

        def replaced(site: str, data: bytes) -> bytes:
            if restart:
                link.workers[site] = Worker(link.folders[site], link.workers[site].site)
            return data

        link.tamper = replaced
        server.carry_out()
        return [
            (folder.site(site).adapters / "mira" / "seed-3" / "adapter_model.safetensors").read_bytes()
            for site in SITES
        ]

    assert outcome("lived", restart=False) == outcome("restarted", restart=True)


def test_a_site_without_its_state_cannot_go_on_where_it_needs_it(make: Callable[..., ServerFolder]) -> None:
    folder = make(training={"local_steps": 2, "batch_size": 2, "keep_optimizer": True, "learning_rate": 0.1})
    site = open_site(folder.site("ada"))
    run = Worker(folder.site("ada"), site)._run("mira/seed-3")
    with pytest.raises(WireError, match="the server counts round 2"):
        run.settle(2)


def test_an_order_for_another_site_or_run_is_refused(make: Callable[..., ServerFolder]) -> None:
    folder = make()
    worker = Worker(folder.site("bo"), open_site(folder.site("bo")))
    order = {"order": "start", "round": 0, "learning_rate": 0.0, "counted": 0, "nonce": "n"}
    for run_id in ("mira/seed-4", "fedavg/seed-3", "", "../mira/seed-3"):
        assert decode(worker.handle(Frame({**order, "run_id": run_id}).encode())).header["kind"] == "schema"
    federation = worker._run("mira/seed-3").federation
    names = {"base_hash": federation.base, "layout_hash": federation.layout_hash, "method": "mira", "client": "ada"}
    answer = worker.handle(Frame({**order, **names, "run_id": "mira/seed-3"}).encode())
    assert decode(answer).header["kind"] == "schema"


CARDS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "name": ({"name": "eve"}, "the certificate 'ada'"),
    "protocol": ({"protocol": 0}, "speaks protocol 0"),
    "version": ({"versions": {"fedmira": "0.0.1"}}, "has fedmira 0.0.1"),
    "base": ({"base_fingerprint": "f" * 64}, "its base has sha256 ffffffffffff"),
    "rank": ({"ranks": 3}, "its rank is 3"),
    "layout": ({"layout": "0"}, "its adapted modules"),
    "dtype": ({"dtype": "bfloat16"}, "loaded in bfloat16"),
    "columns": ({"columns": {}}, "no column 'group'"),
    "examples": ({"examples": {"train": 0}}, "no training example"),
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_site_that_does_not_fit_is_refused_when_it_joins_in_one_sentence(
    kind: str, make: Callable[..., ServerFolder], opened: Mapping[str, Site]
) -> None:
    change, expected = CARDS[kind]
    agreement, card = read_agreement(make().agreement), card_of(opened["ada"])
    assert why_not(read_card(card), "ada", agreement) is None
    reason = why_not(read_card({**card, **change}), "ada", agreement)
    assert reason is not None
    assert expected in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "change",
    [
        {"examples": {"train": "many"}},
        {"examples": {}},
        {"examples": {"train": -1}},
        {"trained_tokens": True},
        {"columns": {"group": ["even"]}},
        {"columns": {"group": "x" * 1001}},
        {"counts": {"group": [1]}},
        {"versions": {"fedmira": 1}},
    ],
)
def test_a_card_with_values_of_other_types_is_none(change: Mapping[str, Any], opened: Mapping[str, Site]) -> None:
    """A site cannot stop the server of all by what it says of itself."""
    with pytest.raises(WireError):
        read_card({**card_of(opened["ada"]), **change})


def test_what_left_after_a_crash_in_the_middle_of_a_line_is_listed(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_text('{"what": "hello"}\n{"what": "tr\n{"what": "end"}\n', encoding="utf-8")
    assert [line["what"] for line in read_audit(tmp_path / "audit.jsonl")] == ["hello", "end"]


@pytest.mark.parametrize(
    ("profile", "card", "expected"),
    [
        (None, {}, "set share_profile: true"),
        (None, {"embedding": [0.5] * 15 + [float("nan")]}, "mean embedding"),
        (None, {"embedding": [0.5]}, "mean embedding"),  # of another width
        ("group", {"counts": {"other": {"a": 1}}}, "column 'group', and this site sends none"),
        ("group", {"counts": {"group": {"even": "many"}}}, "are not numbers"),
    ],
)
def test_a_site_without_what_a_graph_is_made_of_is_told(
    profile: str | None,
    card: Mapping[str, Any],
    expected: str,
    make: Callable[..., ServerFolder],
    opened: Mapping[str, Site],
) -> None:
    agreement = replace(read_agreement(make().agreement), profiles=[profile])
    reason = why_not(read_card({**card_of(opened["ada"]), **card}), "ada", agreement)
    assert reason is not None
    assert expected in reason


def test_a_site_sends_of_its_prompts_what_it_agreed_to(files: tuple[Path, Path], tmp_path: Path) -> None:
    for shares in (True, False):
        raw = plain(*files)
        folder = write_federation(tmp_path / str(shares), raw, files[1], profiles=[None, "group"], share_profile=shares)
        card = card_of(open_site(folder.site("ada")))
        assert bool(card["embedding"]) == bool(card["counts"]) == shares


def test_another_base_is_found_out_before_anything_is_sent(make: Callable[..., ServerFolder], tmp_path: Path) -> None:
    other = small_study.save_base(tmp_path / "other", seed=1)
    folder = make(sites={"base_model": str(other)})
    with pytest.raises(ModelError, match="is not the federation's base"):
        open_site(folder.site("ada"))


def test_the_same_weights_in_other_bits_are_another_base(
    make: Callable[..., ServerFolder], files: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (an extra of fedmira)")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(files[0], quantization_config=bits, device_map="cpu")
    shutil.copytree(files[0], tmp_path / "packed")
    packed.save_pretrained(tmp_path / "packed")
    folder = make(sites={"base_model": str(tmp_path / "packed")})
    with pytest.raises(ModelError, match=r"in 4 bits, is not the federation's base .* other bits are another base"):
        open_site(folder.site("ada"))
