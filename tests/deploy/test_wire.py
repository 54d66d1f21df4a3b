"""Frames: whatever is sent reads back to the bit, and whatever else comes is refused with a word of the wire."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedmira.adapters.added import BaseVersions
from fedmira.deploy.wire import Frame, decode, pack_message, unpack_message
from fedmira.errors import WireError
from fedmira.methods.base import Message

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)
SCALAR = st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1))


def round_trip(message: Message) -> Message:
    parts, rows = pack_message(message)
    frame = decode(Frame({"parts": parts}, rows).encode())
    return unpack_message(frame.header["parts"], frame.rows)


@given(
    st.lists(NUMBERS, max_size=6),
    st.dictionaries(st.text(max_size=5), st.lists(NUMBERS, max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=5), SCALAR, max_size=3),
)
def test_a_message_reads_back_to_the_bit(
    row: list[float], more: dict[str, list[float]], scalars: dict[str, float]
) -> None:
    message = Message(
        torch.tensor([row], dtype=torch.float32).view(1, len(row)),
        {
            name: torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)
            for name, value in scalars.items()
        },
        {name: torch.tensor([values], dtype=torch.float32).view(1, len(values)) for name, values in more.items()},
    )
    found = round_trip(message)
    assert found.rows.view(torch.int32).equal(message.rows.view(torch.int32))
    assert list(found.more) == list(message.more)
    assert list(found.scalars) == list(message.scalars)
    for name, value in message.more.items():
        assert found.more[name].view(torch.int32).equal(value.view(torch.int32))
    for name, value in message.scalars.items():
        assert found.scalars[name].dtype == value.dtype
        assert found.scalars[name].nan_to_num(7).equal(value.nan_to_num(7))


def test_changes_of_the_base_read_back_as_the_client_does_not_have_them() -> None:
    pairs = [{"b": (torch.randn(1, 3), torch.randn(2, 1)), "a": (torch.randn(2, 4), torch.randn(5, 2))} for _ in "xy"]
    found = round_trip(Message(torch.randn(1, 7), base=BaseVersions(tuple(pairs), torch.tensor([1]), 0)))
    assert found.base is not None
    assert found.base.first == 1
    ((only),) = found.base.pairs
    assert {name: [factor.tolist() for factor in pair] for name, pair in only.items()} == {
        name: [factor.tolist() for factor in pair] for name, pair in pairs[1].items()
    }


def test_rows_that_are_absent_take_no_bytes_and_are_zeros_of_their_width() -> None:
    """The own row and one further; that the client might have had the other is read back too."""
    absent = {"rows": torch.tensor([True]), "a": torch.tensor([False]), "b": torch.tensor([True])}
    more = {"a": torch.randn(1, 3), "b": torch.randn(1, 5)}
    message = Message(torch.randn(1, 7), {"b": torch.ones(1)}, more, absent=absent)
    assert pack_message(message)[1].shape == (1, 3)
    found = round_trip(message)
    assert found.rows.tolist() == [[0.0] * 7]
    assert torch.equal(found.more["a"], more["a"])
    assert found.more["b"].tolist() == [[0.0] * 5]
    assert {name: flags.tolist() for name, flags in found.absent.items()} == {"rows": [True], "a": [False], "b": [True]}
    nothing = Message(torch.randn(1, 7), absent={"rows": torch.tensor([True])})
    assert pack_message(nothing)[1].shape == (1, 0)
    assert round_trip(nothing).rows.shape == (1, 7)


def refusal(data: bytes) -> str:
    """Read a frame and its message; return the reason if it is refused."""
    try:
        found = decode(data)
        unpack_message(found.header.get("parts"), found.rows)
    except WireError as error:
        return error.reason
    return ""


@given(st.binary(max_size=200))
def test_bytes_that_are_no_frame_are_refused_and_nothing_else_happens(data: bytes) -> None:
    assert refusal(data) in ("schema", "size")


@given(st.data())
def test_a_frame_with_changed_bytes_is_refused_or_read(data: st.DataObject) -> None:
    parts, rows = pack_message(Message(torch.arange(6.0)[None], {"steps": torch.tensor([3])}))
    frame = bytearray(Frame({"parts": parts}, rows).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert refusal(bytes(frame)) in ("", "schema", "size")


@pytest.mark.parametrize(
    ("header", "body", "reason"),
    [
        ([1], b"", "schema"),
        ({"weight": 10**400}, b"", "schema"),  # no float is as large
        ({}, save({"rows": torch.ones(1, 2), "other": torch.ones(1)}), "schema"),
        ({}, save({"row": torch.ones(1, 2)}), "schema"),
        ({}, save({"rows": torch.ones(2, 2)}), "size"),
        ({}, save({"rows": torch.ones(4)}), "size"),
        ({}, save({"rows": torch.ones(1, 2, dtype=torch.int64)}), "size"),
        ({}, b"\x80\x04K\x01.", "schema"),  # a pickle
    ],
)
def test_one_tensor_of_numbers_and_nothing_else_is_read(header: object, body: bytes, reason: str) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(WireError) as caught:
        decode(struct.pack(">Q", len(text)) + text + body)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "parts",
    [
        None,
        {},
        {"rows": 5, "more": {}, "scalars": {}},
        {"rows": 4, "more": {"x": -2}, "scalars": {}},
        {"rows": 2, "more": {}, "scalars": {"steps": ["object", 1]}},
        {"rows": 2, "more": {}, "scalars": {"steps": ["int64", 2**70]}},
        {"rows": 2, "more": {}, "scalars": {"steps": ["int64", [1, 2]]}},
        {"rows": 2, "more": {"x": 2**62}, "scalars": {}, "absent": {"x": True}},
        {"rows": 2, "more": {"x": -1}, "scalars": {}, "absent": {"x": True}},
        {"rows": 2, "more": {"x": 2}, "scalars": {}, "absent": ["x"]},
        {"rows": 2, "more": {"x": 2}, "scalars": {}, "absent": {"x": 1}},
        {"rows": 0, "more": {}, "scalars": {}, "base": {"first": 0, "pairs": [[["m", -1, -1, -1]]]}},
        {"rows": 2, "more": {}, "scalars": {}, "base": {"first": 0, "pairs": [[["m", 10**9, 10**9, 10**9]]]}},
    ],
)
def test_parts_that_do_not_describe_the_numbers_are_refused(parts: object) -> None:
    with pytest.raises(WireError):
        unpack_message(parts, torch.ones(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_tensor_is_a_file_that_safetensors_reads_and_writes(dtype: torch.dtype) -> None:
    rows = torch.randn(1, 7).to(dtype)
    data = Frame({"parts": {}}, rows).encode()
    (length,) = struct.unpack_from(">Q", data)
    (only,) = load(data[8 + length :]).items()
    assert torch.equal(only[1], rows)
    theirs = data[: 8 + length] + save({only[0]: rows})
    found = decode(theirs).rows
    assert found is not None
    assert torch.equal(found, rows)
