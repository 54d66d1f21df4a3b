"""Whatever a site sends: it is a sound upload, or refused by a word; nothing is raised, and memory stays bounded."""

import math
import multiprocessing
import random
import re
import resource
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.faults.figures import Note
from tests.faults.mutations import Mutator, headed, row

from fedmira.adapters import lora_layout
from fedmira.deploy.answers import COUNTS, count, read_answer, read_header, why_not_upload
from fedmira.deploy.link import Failure
from fedmira.deploy.wire import MAX_HEADER, Frame, pack_message, unpack_message
from fedmira.engine.federation import Federation
from fedmira.engine.gate import MAX_NORM, MAX_SCALAR, SCHEMA, Expected, Upload, refusal
from fedmira.methods.base import Message

LAYOUT = lora_layout([("q_proj", 4, 4)], 2)
FEDERATION = Federation(("c0", "c1", "c2"), LAYOUT, torch.full((3,), 2), 4.0, run="mira/seed-3", base="abc")
WORDS = {"schema", "identity", "round", "duplicate", "size", "not_finite", "norm", "weight", "failed", "need"}
EXAMPLES, NONCE = 6, "00ff00ff00ff00ff"
HEADER: dict[str, Any] = {
    "run_id": "mira/seed-3",
    "round": 2,
    "client": "c1",
    "nonce": NONCE,
    "base_hash": "abc",
    "layout_hash": LAYOUT.fingerprint,
    "method": "mira",
    "weight": float(EXAMPLES),
    "schema": SCHEMA,
    "steps": 3,
    "tokens": 40,
    "scored": 0,
    "metrics": {"train_loss": 1.5},
    "answer": "done",
}


def sound(columns: int = LAYOUT.size) -> Message:
    return Message(row(columns), {"x": torch.tensor([0.5], dtype=torch.float64)}, {"second": row(columns)})


def judge(data: bytes | bytearray, like: Message) -> Upload | str:
    """Return the upload that the server would merge, or the word for which it would not, as engine and server do."""
    answer = read_answer(data, NONCE)
    if isinstance(answer, Failure):
        return answer.kind
    if answer.header["answer"] == "need":
        return "need"
    if (reason := why_not_upload(answer, "c1", like=like, examples=EXAMPLES)) is not None:
        return reason
    upload = Upload(read_header(answer.header), unpack_message(answer.header["parts"], answer.rows))
    assert all(count(answer.header, name) >= 0 for name in COUNTS)  # they are added up; raises for what is none
    expected = Expected(FEDERATION, "mira", 2, {"c0": 0, "c1": 1}, like.rows.shape[1])
    return refusal(upload, expected) or upload


def assert_sound(upload: Upload, like: Message) -> None:
    """Fail unless what is admitted could be merged with nothing to fear."""
    header, message = upload.header, upload.message
    found = (header.run_id, header.round, header.client, header.nonce, header.base_hash, header.weight)
    assert found == ("mira/seed-3", 2, "c1", NONCE, "abc", EXAMPLES)
    for value in (message.rows, *message.more.values()):
        assert value.shape == like.rows.shape
        assert value.dtype == torch.float32
        assert float(value.double().norm()) <= MAX_NORM * (1 + 1e-6)  # false for what is not finite
    assert all(abs(float(value)) <= MAX_SCALAR for value in message.scalars.values())
    assert (set(message.more), set(message.scalars)) == (set(like.more), set(like.scalars))


def judge_many(messages: int, seed: int) -> Counter[str]:
    """Judge changed messages; return how many of them were refused by which word."""
    like, mutator = sound(), Mutator(HEADER, sound(), random.Random(seed))
    found: Counter[str] = Counter()
    for _ in range(messages):
        verdict = judge(mutator.draw(), like)
        if isinstance(verdict, Upload):
            assert_sound(verdict, like)
        found["admitted" if isinstance(verdict, Upload) else verdict] += 1
    return found


def test_an_unchanged_message_is_admitted() -> None:
    verdict = judge(Frame({**HEADER, "parts": pack_message(sound())[0]}, pack_message(sound())[1]).encode(), sound())
    assert isinstance(verdict, Upload)
    assert_sound(verdict, sound())


def test_some_thousand_changed_messages_are_sound_or_refused_and_nothing_is_raised() -> None:
    found = judge_many(3_000, seed=1)
    assert all(word.isidentifier() and len(word) <= 64 for word in found)
    assert set(found) >= WORDS - {"failed", "need"}  # each word is the reason for some: the changes reach every check


@pytest.mark.slow
def test_a_million_changed_messages_are_sound_or_refused_and_nothing_is_raised(note: Note) -> None:
    found = judge_many(1_000_000, seed=2)
    assert found.total() == 1_000_000
    assert set(found) >= WORDS - {"failed", "need"}
    note("messages changed, at the gate in process", found.total(), {"raised": 0, **dict(found.most_common())})


PLAIN = st.none() | st.booleans() | st.floats() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=4)
NESTED = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@settings(max_examples=40)
@given(NESTED)
def test_whatever_the_parts_of_a_message_are_said_to_be(value: Any) -> None:
    """At every place of `parts` in turn."""
    parts, rows = pack_message(sound())
    changed = [{**parts, name: value} for name in ("rows", "more", "scalars", "base", "absent")]
    changed += [{**parts, "scalars": {"x": value}}, {**parts, "more": {"second": value}}]
    changed += [{**parts, "base": {"first": value, "pairs": []}}, {**parts, "base": {"first": 0, "pairs": [[value]]}}]
    for one in changed:
        verdict = judge(Frame({**HEADER, "parts": one}, rows).encode(), sound())
        assert isinstance(verdict, Upload) or verdict in WORDS


# ---------------------------------------------------------------- schema edits

KEYS = ("run_id", "round", "client", "nonce", "base_hash", "layout_hash", "method", "schema", "weight")


def edit(dice: random.Random) -> tuple[dict[str, Any], torch.Tensor, bool]:
    """Change the schema somewhere, perhaps to what it was; return header, numbers, and whether they are as before."""
    like = sound()
    parts, rows = pack_message(like)
    header: dict[str, Any] = {**HEADER, "parts": parts}
    kind, same = dice.randrange(7), False
    if kind == 0:
        name = dice.choice(KEYS)
        header[name] = dice.choice((HEADER[name], "x", 1, 2, 2.0, None, EXAMPLES, str(HEADER[name])))
        same = type(header[name]) is type(HEADER[name]) and header[name] == HEADER[name]
        same = same or (name == "weight" and header[name] == EXAMPLES and not isinstance(header[name], str))
        return header, rows, same
    if kind == 1:
        width = dice.choice((LAYOUT.size, LAYOUT.size - 1, LAYOUT.size + 1, 0, 2 * LAYOUT.size))
        header["parts"], rows = pack_message(Message(row(width)[:, :width], like.scalars, like.more))
        return header, rows, width == LAYOUT.size
    if kind == 2:
        dtype = dice.choice((torch.float32, torch.float64, torch.float16, torch.bfloat16))
        return header, rows.to(dtype), dtype == torch.float32
    if kind == 3:
        names = dice.choice((("second",), (), ("second", "third"), ("rows",), ("Second",)))
        more = {name: row(LAYOUT.size) for name in names}
        header["parts"], rows = pack_message(Message(like.rows, like.scalars, more))
        return header, rows, names == ("second",)
    if kind == 4:
        names, dtype = dice.choice((("x",), (), ("x", "y"), ("X",))), dice.choice((torch.float64, torch.float32))
        scalars = {name: torch.tensor([0.5], dtype=dtype) for name in names}
        header["parts"], rows = pack_message(Message(like.rows, scalars, like.more))
        return header, rows, names == ("x",) and dtype == torch.float64
    if kind == 5:
        name = dice.choice(list(header))
        del header[name]
        return header, rows, name in ("metrics", "steps", "tokens", "scored")  # which are about the upload
    header["parts"] = {**parts, "absent": {dice.choice(("rows", "second")): dice.choice((True, False))}}
    return header, rows, False


@pytest.mark.parametrize("edits", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_an_upload_is_admitted_only_if_its_schema_is_the_servers_own(edits: int, note: Note) -> None:
    dice, admitted = random.Random(3), 0
    for _ in range(edits):
        header, rows, same = edit(dice)
        verdict = judge(Frame(header, rows).encode(), sound())
        assert isinstance(verdict, Upload) == same, (header, rows.shape, rows.dtype, verdict)
        admitted += same
    assert edits / 20 < admitted < edits / 2
    note("edits of the schema", edits, {"admitted, all equal to the schema": admitted, "broadcast": 0})


# ---------------------------------------------------------------- memory

CAP = 1 << 26  # bytes of the largest row here; more than the allocator takes from what it has kept


def bombs(columns: int) -> dict[str, Callable[[], bytes | bytearray]]:
    """Messages that would like to take memory, made when they are asked for."""

    def whole(bad: float, pad: int, *, kind: type) -> bytes | bytearray:
        parts, rows = pack_message(Message(torch.zeros(1, columns)))
        rows[0, columns // 2] = bad
        text = headed(b"", Frame({**HEADER, "parts": parts}, rows).encode())[8:]
        (length,) = struct.unpack_from(">Q", text)
        return kind(headed(text[8 : 8 + length] + b" " * pad, text[8 + length :]))

    def told(shape: list[int], ends: list[int]) -> bytes:
        inner = f'{{"rows":{{"dtype":"F32","shape":{shape},"data_offsets":{ends}}}}}'.encode()
        return headed(Frame(HEADER).encode()[8:], struct.pack("<Q", len(inner)) + inner + bytes(64))

    opened = f'{{"nonce":"{NONCE}","answer":"done","client":"c1","parts":'.encode()
    widths, flags = (b",".join(b'"%d":%b' % (n, value) for n in range(30_000)) for value in (b"1099511627776", b"true"))
    absent = b'{"rows":0,"scalars":{},"more":{' + widths + b'},"absent":{' + flags + b"}}}"
    return {
        "a row of the right size, not finite": lambda: whole(math.nan, 0, kind=bytearray),
        "the same, not aligned": lambda: whole(math.nan, 1, kind=bytearray),
        "the same, that cannot be written to": lambda: whole(1e30, 3, kind=bytes),
        "a shape of 10^12 numbers": lambda: told([1, 10**12], [0, 4 * 10**12]),
        "an endless header": lambda: struct.pack(">Q", 1 << 62) + bytes(64),
        "a header of lists": lambda: headed(opened + b'{"more":[' + b"[]," * 300_000 + b"[]]}}", b""),
        "a header of rows that are absent": lambda: headed(opened + absent, b""),
        "a header of many letters": lambda: headed(b'{"nonce":"' + b"x" * (MAX_HEADER - 20) + b'"}', b""),
    }


SLACK = 8 << 20  # bytes: what allocators take at once, and pieces of a row in float64


def judge_within(name: str, sizes: int) -> str:
    """Judge a message where this process may have `sizes` times the largest one, itself included; return the word.

    The kernel refuses more (RLIMIT_DATA): then MemoryError or RuntimeError is raised here.
    """
    judge(bombs(1 << 20)[name](), Message(torch.zeros(1, 1 << 20)))  # loads code
    message = bombs(CAP // 4)[name]()
    like = Message(torch.zeros(()).expand(1, CAP // 4))
    most = data_bytes() - len(message) + sizes * CAP + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    verdict = judge(message, like)
    assert isinstance(verdict, str)
    return verdict


def data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmData:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]


def in_child(name: str, sizes: int) -> str:
    """Judge in a process that has done nothing yet: what this one has freed and kept, the kernel counts no more."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__])
    with fresh.Pool(1) as pool:
        return pool.apply(judge_within, (name, sizes))


@pytest.mark.slow
def test_no_message_takes_more_than_twice_the_largest_one(note: Note) -> None:
    found = {name: in_child(name, 2) for name in bombs(8)}
    assert Counter(found.values()) == {"not_finite": 2, "norm": 1, "schema": 4, "duplicate": 1}
    note("messages that would take memory", len(found), {"bytes at most, of the largest message": 2})


def test_the_limit_of_memory_is_one() -> None:
    """A message that must be copied does not fit into the memory of one."""
    with pytest.raises((MemoryError, RuntimeError)):
        in_child("the same, not aligned", 1)
