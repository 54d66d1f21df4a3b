"""What crosses the wire: one JSON header and one safetensors tensor `rows` [1, N], and nothing else.

An upload's header has the contract's keys (gate.Header). A message of several rows, and pairs for the base, are laid
end to end in `rows`; the header's `parts` says how many numbers each has. Scalars are in the header: JSON writes a
float64 so that it reads back to the bit.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmira.adapters import Pairs
from fedmira.adapters.added import BaseVersions
from fedmira.errors import WireError
from fedmira.methods.base import Message

MAX_HEADER = 1 << 20  # bytes
TENSOR = "rows"
_LENGTH = struct.Struct(">Q")
_SCALARS = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True, eq=False)
class Frame:
    """A header, and numbers [1, N] or none."""

    header: Mapping[str, Any]
    rows: Tensor | None = None

    def encode(self) -> bytes:
        """Return the frame as bytes: the header's length, the header, the tensor's file."""
        text = json.dumps(dict(self.header)).encode()
        body = b"" if self.rows is None else save({TENSOR: self.rows.contiguous()})
        return _LENGTH.pack(len(text)) + text + body


def decode(data: bytes) -> Frame:
    """Read a frame. Raises WireError: `schema` for what is not one, `size` for a tensor of another shape."""
    if len(data) < _LENGTH.size:
        raise WireError("schema", f"a message of {len(data)} bytes has no header")
    (length,) = _LENGTH.unpack_from(data)
    if length > min(MAX_HEADER, len(data) - _LENGTH.size):
        raise WireError("schema", f"a header of {length} bytes in a message of {len(data)}: at most {MAX_HEADER}")
    start = _LENGTH.size + length
    try:
        header = json.loads(data[_LENGTH.size : start])
    except (ValueError, RecursionError):
        raise WireError("schema", "the header is not JSON") from None
    if not isinstance(header, dict):
        raise WireError("schema", "the header is not a JSON object")
    if start == len(data):
        return Frame(header)
    try:
        tensors = load(data[start:])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise WireError("schema", "what follows the header is not a safetensors file") from None
    if set(tensors) != {TENSOR}:
        raise WireError("schema", f"{len(tensors)} tensors in a message: need one, '{TENSOR}'")
    rows = tensors[TENSOR]
    if rows.ndim != 2 or len(rows) != 1 or not rows.is_floating_point():
        raise WireError("size", f"'{TENSOR}' is {rows.dtype} {tuple(rows.shape)}: need numbers [1, N]")
    return Frame(header, rows)


def pack_message(message: Message) -> tuple[dict[str, Any], Tensor]:
    """Return one client's message [1, ...] as `parts` of a header and numbers [1, N]."""
    values = [message.rows[0], *(value[0] for value in message.more.values())]
    parts: dict[str, Any] = {
        "rows": message.rows.shape[1],
        "more": {name: value.shape[1] for name, value in message.more.items()},
        "scalars": {
            name: [str(value.dtype).removeprefix("torch."), value[0].item()] for name, value in message.scalars.items()
        },
    }
    if message.base is not None:
        base = message.base.take(torch.zeros(1, dtype=torch.int64))
        parts["base"] = {
            "first": base.first,
            "pairs": [
                [[module, len(a), a.shape[1], len(b)] for module, (a, b) in sorted(pairs.items())]
                for pairs in base.pairs
            ],
        }
        values += [factor.flatten() for pairs in base.pairs for _, pair in sorted(pairs.items()) for factor in pair]
    return parts, torch.cat([value.to(message.rows.dtype) for value in values])[None]


def unpack_message(parts: Any, rows: Tensor | None) -> Message:
    """Return the message that `pack_message` packed. Raises WireError if the header and the numbers do not agree."""
    try:
        numbers = torch.empty(0) if rows is None else rows[0]
        wanted = [int(parts["rows"]), *(int(count) for count in parts["more"].values())]
        shapes = [
            [(str(module), int(q), int(inputs), int(outputs)) for module, q, inputs, outputs in pairs]
            for pairs in parts.get("base", {}).get("pairs", [])
        ]
        scalars = {
            str(name): torch.tensor([value], dtype=_SCALARS[kind]) for name, (kind, value) in parts["scalars"].items()
        }
        first = int(parts.get("base", {}).get("first", 0))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
        raise WireError("schema", "the header's `parts` do not describe a message") from None
    counts = [*wanted, *(q * size for pairs in shapes for _, q, i, o in pairs for size in (i, o))]
    if min(counts) < 0 or sum(counts) != len(numbers):
        raise WireError("size", f"the header tells of {sum(counts)} numbers, and the message has {len(numbers)}")
    pieces = list(torch.split(numbers, counts))
    own, *others = pieces[: len(wanted)]
    rest = iter(pieces[len(wanted) :])
    versions: list[Pairs] = [
        {module: (next(rest).view(q, inputs), next(rest).view(outputs, q)) for module, q, inputs, outputs in pairs}
        for pairs in shapes
    ]
    base = None
    if "base" in parts:
        base = BaseVersions(tuple(versions), torch.tensor([first]), first)
    more = {str(name): value[None] for name, value in zip(parts["more"], others, strict=True)}
    return Message(own[None], scalars, more, base)
