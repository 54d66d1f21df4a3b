"""Messages of a site that was sound until somebody changed it: bytes, lengths, keys, values, numbers, tensors."""

import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fedmira.deploy.wire import Frame, pack_message
from fedmira.methods.base import Message

# What a key's value becomes: of another type, of another size, out of range, or text that reads as a number.
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53, 2**63 - 1, -(2**63), 0.0, -0.5, 1.5, 1e-45, 1e12, 1e300, -1e308,
    math.nan, math.inf, -math.inf, "", "0", "-1", "9" * 30, "1e9", "x", "é" * 40, "\ud800", "c1", [], [0], [1, 2], {},
    {"a": 1}, [["m", 1, 1, 1]], {"rows": 1}, {"first": "9" * 30, "pairs": []}, {"first": 1e300, "pairs": []},
    {"first": 0, "pairs": [[["m", 0, "9" * 30, 0]]]}, {"first": 0, "pairs": [[["m", 0, 2**63 - 1, 0]]]},
    {"x": ["float64", 1e308]}, {"x": ["int64", 2**62]}, {"x": ["float32", "1"]}, {"x": [[], 1]},
)  # fmt: skip
LENGTHS = (0, 1, 7, 8, 255, 1 << 20, (1 << 20) + 1, 1 << 32, 1 << 62, (1 << 64) - 1)
NUMBERS = (math.nan, math.inf, -math.inf, 3e38, 1e30, 1e7, 1e-45, -0.0)
SHAPES = ([1], [1, 0], [2, 4], [1, 10**12], [10**6, 10**6], [1, -1], [1, 1, 1], [1, 1.0], ["1", 1], [2**63 - 1, 2], [])


def headed(text: bytes, body: bytes) -> bytes:
    """Return a frame of a header's text and the tensor's file."""
    return struct.pack(">Q", len(text)) + text + body


class Mutator:
    """Draws changed messages from one that is sound. message: one client's, rows [1, P]; header: all other keys."""

    def __init__(self, header: Mapping[str, Any], message: Message, dice: random.Random) -> None:
        self.dice = dice
        parts, self.rows = pack_message(message)
        self.header = {**header, "parts": parts}
        self.whole = Frame(self.header, self.rows).encode()
        (length,) = struct.unpack_from(">Q", self.whole)
        self.text, self.body = self.whole[8 : 8 + length], self.whole[8 + length :]
        (inner,) = struct.unpack_from("<Q", self.body)
        self.about, self.numbers = json.loads(self.body[8 : 8 + inner])["rows"], self.body[8 + inner :]
        self.kinds: tuple[Callable[[], bytes], ...] = (
            self.bytes_changed,
            self.cut_or_grown,
            self.length_changed,
            self.key_changed,
            self.part_changed,
            self.tensor_changed,
            self.number_changed,
            self.text_changed,
        )

    def draw(self) -> bytes:
        """Return one changed message."""
        return self.dice.choice(self.kinds)()

    def bytes_changed(self) -> bytes:
        data = bytearray(self.whole)
        for _ in range(self.dice.randint(1, 4)):
            data[self.dice.randrange(len(data))] = self.dice.randrange(256)
        return bytes(data)

    def cut_or_grown(self) -> bytes:
        place = self.dice.randrange(len(self.whole))
        return self.whole[:place] if self.dice.random() < 0.5 else self.whole + self.whole[place:]

    def length_changed(self) -> bytes:
        data, length = bytearray(self.whole), self.dice.choice(LENGTHS)
        if self.dice.random() < 0.5:
            struct.pack_into(">Q", data, 0, length)
        else:
            struct.pack_into("<Q", data, 8 + len(self.text), length)
        return bytes(data)

    def key_changed(self) -> bytes:
        header = dict(self.header)
        for _ in range(self.dice.randint(1, 2)):
            name = self.dice.choice([*header, "absent", "figures", "refused", "kind"])
            header[name] = self.dice.choice(NASTY)
        if self.dice.random() < 0.2:
            header.pop(self.dice.choice(list(header)))
        return headed(json.dumps(header).encode(), self.body)

    def part_changed(self) -> bytes:
        parts = json.loads(json.dumps(self.header["parts"]))
        where = self.dice.choice((parts, parts["more"], parts["scalars"]))
        name = self.dice.choice([*where, "base", "absent", "rows", "new"])
        where[name] = self.dice.choice(NASTY)
        return headed(json.dumps({**self.header, "parts": parts}).encode(), self.body)

    def tensor_changed(self) -> bytes:
        about, name = dict(self.about), self.dice.choice(("dtype", "shape", "data_offsets"))
        values = {"dtype": ("F64", "F16", "BF16", "I64", "F8", 1, None), "shape": SHAPES, "data_offsets": (*SHAPES, 0)}
        about[name] = self.dice.choice(values[name])
        inner = json.dumps({"rows": about}).encode() + b" " * self.dice.randrange(9)
        return headed(self.text, struct.pack("<Q", len(inner)) + inner + self.numbers)

    def number_changed(self) -> bytes:
        data, place = bytearray(self.whole), self.dice.randrange(self.rows.shape[1])
        struct.pack_into("<f", data, len(data) - 4 * (self.rows.shape[1] - place), self.dice.choice(NUMBERS))
        return bytes(data)

    def text_changed(self) -> bytes:
        """A part of the header's text is doubled, dropped or nested, so that it may still be JSON."""
        first, last = sorted(self.dice.sample(range(len(self.text)), 2))
        piece = self.dice.choice((b"", b"[" * 5000, b"9" * 5000, self.text[first:last] * 2, b"\x80\x04K\x01."))
        return headed(self.text[:first] + piece + self.text[last:], self.body)


def row(columns: int) -> torch.Tensor:
    """A row [1, P] of small numbers."""
    return torch.arange(float(columns))[None] / columns
