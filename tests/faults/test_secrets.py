"""200 planted secrets, as texts and as token ids: in no tracker's file, no message of a broken study, on no wire."""

import importlib
import importlib.util
import json
import re
import shutil
import socket
import string
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import small_study
from tests.deploy.processes import INIT, SERVER, SITE, arguments, ended_afterwards, fill_in, fork, free_port
from tests.faults.figures import Note
from tests.faults.test_privacy import SECRETS, SITES, assert_silent, jsonl, leaking_files, leaks, save_base
from tests.small_study import command
from tests.study.test_trackers import MLFLOW_STAND_IN, STAND_IN, WANDB_STAND_IN

from fedmira.deploy.folders import ServerFolder

TOKEN = "hf_" + "Kw4" * 11
METHODS = [{"name": "fedavg"}, {"name": "mira", "lambda": 0.25, "graph": {"kind": "uniform"}}]
SO_RCVBUFFORCE, SOL_PACKET, PACKET_STATISTICS = 33, 263, 6  # of Linux; Python has no names for them
LARGEST = 4 << 20  # bytes of a file that is searched for ids


def ids_of(letters: str) -> list[int]:
    """As the base of these tests writes a text: an id for each letter."""
    return [ord(letter) - 29 for letter in letters]


LETTERS = np.full(256, ord(" "), dtype=np.uint8)  # id -> letter; what is none of a secret's separates
for _letter in string.ascii_letters + string.digits:
    LETTERS[ord(_letter) - 29] = ord(_letter)


def id_leaks(content: bytes) -> list[str]:
    """Find pieces of secrets that are written as token ids: decimal, or in 1, 2, 4 or 8 bytes each, at any place."""
    numbers = np.array([min(int(one), 255) for one in re.findall(rb"\d{1,9}", content)], dtype=np.uint8)
    found = leaks(LETTERS[numbers].tobytes())
    for width in (1, 2, 4, 8):
        for begin in range(width):
            whole = content[begin : begin + (len(content) - begin) // width * width]
            values = np.frombuffer(whole, dtype=f"<u{width}")
            found += leaks(LETTERS[np.minimum(values, 255).astype(np.uint8)].tobytes())
    return found


def hiding_files(folder: Path) -> list[str]:
    """Return files that have a piece of a secret as text or ids, or the token."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= LARGEST]
    ids = [str(path.relative_to(folder)) for path in files if id_leaks(path.read_bytes())]
    tokens = [str(path.relative_to(folder)) for path in files if TOKEN.encode() in path.read_bytes()]
    return [*leaking_files(folder), *ids, *tokens]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    jsonl(folder, cycle(SECRETS))
    return folder / "rows.jsonl"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def settings(base: Path, data: Path, study: Path, **changes: Any) -> dict[str, Any]:
    options = {
        "methods": METHODS,
        "federation": {"rounds": 2, "participation": 1.0},
        "evaluation": {"metrics": ["loss", "rouge_l"], "max_new_tokens": 4},
        **changes,
    }
    raw = small_study.settings(base, data, study, **options)
    return raw | {
        "data": {
            "path": str(data),
            "template": "none",
            "max_length": 80,
            "clients": {"by": "site"},
            "split": {"validation": 0.2, "test": 0.2},
        }
    }


def write_config(folder: Path, base: Path, data: Path, **changes: Any) -> Path:
    return small_study.save_config(folder / "config.yaml", settings(base, data, folder / "study", **changes))


def test_ids_of_a_secret_are_found_in_any_writing(tmp_path: Path) -> None:
    ids = ids_of(SECRETS[5])
    for content in (
        json.dumps({"ids": ids}).encode(),
        "\n".join(map(str, ids)).encode(),
        *(b"x" * 3 + np.array([7, *ids, 9], dtype=f"<u{width}").tobytes() for width in (1, 2, 4, 8)),
    ):
        assert id_leaks(content)
    assert id_leaks(np.random.default_rng(0).bytes(1 << 16)) == []
    (tmp_path / "ids.npy").write_bytes(np.array(ids).tobytes())
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "text").write_text(SECRETS[9])
    assert sorted(hiding_files(tmp_path)) == ["ids.npy", "text", "token"]


# ---------------------------------------------------------------- trackers


@pytest.mark.parametrize(
    "name", ["tensorboard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("trackio", "wandb", "mlflow"))]
)
def test_no_file_of_a_tracker_has_a_secret(
    name: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Note
) -> None:
    """The tracker itself where it is installed, else a stand-in that writes down all that it is given."""
    stand_ins = {"trackio": STAND_IN, "wandb": WANDB_STAND_IN, "mlflow": MLFLOW_STAND_IN}
    real = importlib.util.find_spec(name) is not None
    if not real and name not in stand_ins:
        pytest.skip(f"{name} is not installed (an extra of fedmira)")
    if not real:
        packages = tmp_path / "packages"
        packages.mkdir()
        (packages / f"{name}.py").write_text(stand_ins[name])
        monkeypatch.syspath_prepend(packages)
        monkeypatch.setenv("PYTHONPATH", str(packages))
    ended = command("run", write_config(tmp_path, base, data, report_to=[name]), "-v", "--debug")
    assert ended.code == 0, ended.err[-500:]
    assert_silent(ended)
    study = tmp_path / "study"
    places = {"tensorboard": "*/*/tensorboard", "trackio": ".trackio", "wandb": "*/*/wandb", "mlflow": ".mlflow"}
    written = [path for place in study.glob(places[name]) for path in place.rglob("*") if path.is_file()]
    assert written
    assert hiding_files(study) == []
    what = name if real else f"a stand-in of {name}"
    note(f"secrets looked for in a run's files and those of {what}", len(SECRETS), {"found": 0})


# ---------------------------------------------------------------- broken on purpose

PLACES = [
    ("fedmira.study.intake", "_read_clients"),
    ("fedmira.engine.scoring", "score_test_split"),
    ("fedmira.engine.phase", "collate"),
    ("fedmira.engine.run", "play"),
    ("fedmira.engine.ledger", "save_checkpoint"),
    ("fedmira.engine.run", "final_scores"),
    ("fedmira.study.handover", "export_adapter"),
    ("fedmira.reports.render", "render_page"),
]
QUICK = (PLACES[0], PLACES[2])


@pytest.mark.parametrize(
    ("module", "name"),
    [pytest.param(*place, id=".".join(place), marks=() if place in QUICK else pytest.mark.slow) for place in PLACES],
)
def test_what_a_library_says_of_a_text_reaches_nobody_wherever_a_study_breaks(
    module: str, name: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Note
) -> None:
    """An error whose words, arguments, notes and cause are all secrets."""

    def broken(*arguments: object, **options: object) -> None:
        try:
            raise LookupError(SECRETS[3], ids_of(SECRETS[7]))
        except LookupError as cause:
            error = ValueError(f"cannot read '{SECRETS[4]}' of {TOKEN}")
            error.add_note(f"it was in '{SECRETS[5]}'")
            raise error from cause

    config, methods = tmp_path / "config.yaml", METHODS[:1]
    codes = set()
    for options in (["-v", "--debug"], ["--json"]):
        shutil.rmtree(tmp_path / "study", ignore_errors=True)
        write_config(tmp_path, base, data, methods=methods)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(module), name, broken)
            ended = command("run", config, *options)
        codes.add(ended.code)
        assert_silent(ended)
        assert id_leaks((ended.err + ended.out).encode()) == []
        assert TOKEN not in ended.err + ended.out
        if (tmp_path / "study").exists():
            assert hiding_files(tmp_path / "study") == []
    assert codes == {1}
    note("a study broken with secrets in the error", 2, {"found in messages or files": 0})


# ---------------------------------------------------------------- what crosses the wire


@dataclass
class Wire:
    """What was said over TCP: addresses and ports -> bytes, each direction by itself."""

    streams: dict[bytes, bytearray] = field(default_factory=dict)
    lost: int = 0  # packets

    def content(self, port: int | None = None) -> bytes:
        """Return all that was said, or what was said to or from a port."""
        ends = b"" if port is None else struct.pack(">H", port)
        chosen = (key for key in self.streams if port is None or ends in (key[-4:-2], key[-2:]))
        return b"\n".join(bytes(self.streams[key]) for key in chosen)


@contextmanager
def heard() -> Iterator[Wire]:
    """Collect every byte that any process sends over the loopback; needs the right to listen."""
    try:
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
    except (PermissionError, AttributeError):
        pytest.skip("packets cannot be listened to here (needs Linux and root)")
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 28)
    listener.bind(("lo", 0))
    listener.settimeout(0.2)
    wire, over = Wire(), threading.Event()

    def listen() -> None:
        while True:
            try:
                packet, address = listener.recvfrom(1 << 17)
            except TimeoutError:
                if over.is_set():
                    return
                continue
            if address[2] == socket.PACKET_OUTGOING:  # each packet passes twice
                continue
            if (content := payload_of(packet)) is not None:
                wire.streams.setdefault(content[0], bytearray()).extend(content[1])

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield wire
    finally:
        over.set()
        thread.join()
        _, wire.lost = struct.unpack("II", listener.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        listener.close()


def payload_of(packet: bytes) -> tuple[bytes, bytes] | None:
    """Return a TCP packet's addresses and content; None of another one."""
    kind = struct.unpack(">H", packet[12:14])[0]
    if kind == 0x0800 and packet[23] == 6:
        begin, addresses = 14 + 4 * (packet[14] & 15), packet[26:34]
        end = 14 + struct.unpack(">H", packet[16:18])[0]
    elif kind == 0x86DD and packet[20] == 6:
        begin, addresses, end = 54, packet[22:54], 54 + struct.unpack(">H", packet[18:20])[0]
    else:
        return None
    return addresses + packet[begin : begin + 4], packet[begin + 4 * (packet[begin + 12] >> 4) : end]


def carry_out(folder: Path, base: Path, data: Path, *, port: int, tls: Sequence[str]) -> ServerFolder:
    """Carry out a study in a federation of processes on this machine."""
    config = small_study.save_config(folder / "study.yaml", settings(base, data, folder / "unused"))
    server = ServerFolder(folder / "federation")
    changes = {
        "bank-a,bank-b": ",".join(SITES),
        "hub.example.org:8002": f"localhost:{port}",
        "study.yaml": str(config),
    }
    founded = command(*arguments(INIT, server.path, "--deadline", "300", *tls, **changes))
    assert founded.code == 0, founded.err
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with ended_afterwards() as processes:
        for name in SITES:
            own = folder / f"data-{name}.jsonl"
            own.write_text("".join(json.dumps(row) + "\n" for row in rows if row["site"] == name))
            fill_in(server.site(name), data=own, base=base)
            processes.append(fork(arguments(SITE, server.path, **{"bank-a": name}), folder / f"{name}.txt"))
        processes.append(fork(arguments(SERVER, server.path), folder / "server.txt"))
        assert processes[-1].wait(600) == 0, (folder / "server.txt").read_text()
        for process in processes[:-1]:
            assert process.wait(100) == 0
    return server


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="nvflare is not installed (an extra)")
@pytest.mark.parametrize("tls", [("--tls", "off-and-i-know-it"), ()], ids=["plain", "mutual"])
def test_no_byte_on_the_wire_and_no_file_of_a_federation_has_a_secret(
    tls: Sequence[str], base: Path, data: Path, tmp_path: Path, note: Note
) -> None:
    """Without TLS all that the engine says can be read, and is searched; with it, nothing of that can be.

    Searched is also what the engine's processes on one machine say to each other, which is never encrypted.
    """
    port = free_port()
    with heard() as wire:
        server = carry_out(tmp_path, base, data, port=port, tls=tls)
    content, between = wire.content(), wire.content(port)
    assert wire.lost == 0
    assert len(between) > 100_000
    assert leaks(content) == []
    assert id_leaks(content) == []
    assert TOKEN.encode() not in content
    assert b"fedavg" in content  # what is listened to is what they say to each other
    assert (b"fedavg" in between) == bool(tls)
    assert hiding_files(server.path) == []
    for path in (*(tmp_path / f"{name}.txt" for name in SITES), tmp_path / "server.txt"):
        assert leaks(path.read_bytes()) == []
    what = "without TLS" if tls else "with TLS"
    note(
        f"secrets looked for on the wire {what}, in texts and token ids",
        len(SECRETS),
        {"found": 0, "bytes": len(content)},
    )


def test_what_is_sent_over_the_loopback_is_heard() -> None:
    """The control of the test above: a secret that is sent is found, although it comes in two packets."""
    with heard() as wire:
        listener = socket.create_server(("127.0.0.1", 0))
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (SECRETS[11][:5], SECRETS[11][5:]):
            sender.sendall(part.encode())
            assert receiver.recv(100)
        for end in (sender, receiver, listener):
            end.close()
    assert leaks(wire.content())
