"""What crosses the wire: one JSON header and one safetensors tensor `rows` [1, N], and nothing else.

An upload's header has the contract's keys (gate.Header). A message of several rows, and pairs for the base, are laid
end to end in `rows`; the header's `parts` says how many numbers each has, and which rows are absent. Scalars are in the
header: JSON writes a float64 so that it reads back to the bit.

The safetensors file is written and read here and not by that library, which copies the numbers two or three times: a
server has those of all sites in memory at once.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmira.adapters import Pairs
from fedmira.adapters.added import BaseVersions
from fedmira.deploy.channel import Data
from fedmira.errors import WireError
from fedmira.methods.base import Message

MAX_HEADER = 1 << 20  # bytes
TENSOR = "rows"
_LENGTH = struct.Struct(">Q")
_FILE_LENGTH = struct.Struct("<Q")  # of the header of a safetensors file
MAX_FILE_HEADER = 1024  # bytes
MAX_WIDTH = 1 << 40  # numbers of a row
_KINDS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SCALARS = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True, eq=False)
class Frame:
    """A header, and numbers [1, N] or none."""

    header: Mapping[str, Any]
    rows: Tensor | None = None

    def pieces(self) -> list[bytes | memoryview]:
        """Return the frame in pieces: the header's length, the header, the tensor's file, whose numbers are not copied.

        Both headers end with spaces, so that the numbers begin at a multiple of 8.
        """
        text = _padded(json.dumps(dict(self.header)).encode())
        found: list[bytes | memoryview] = [_LENGTH.pack(len(text)), text]
        if self.rows is not None:
            rows = self.rows.detach().contiguous()
            (kind,) = (name for name, dtype in _KINDS.items() if dtype == rows.dtype)
            about = {"dtype": kind, "shape": list(rows.shape), "data_offsets": [0, rows.numel() * rows.itemsize]}
            inner = _padded(json.dumps({TENSOR: about}, separators=(",", ":")).encode())
            found += [_FILE_LENGTH.pack(len(inner)), inner, rows.view(-1).view(torch.uint8).numpy().data]
        return found

    def encode(self) -> bytes:
        """Return the frame as bytes."""
        return b"".join(self.pieces())


def _padded(text: bytes) -> bytes:
    return text + b" " * (-len(text) % 8)


def decode(data: Data) -> Frame:
    """Read a frame. Raises WireError: `schema` for what is not one, `size` for a tensor of another shape.

    The numbers stay where they are in `data` if that can be written to, else they are copied.
    """
    if len(data) < _LENGTH.size:
        raise WireError("schema", f"a message of {len(data)} bytes has no header")
    (length,) = _LENGTH.unpack_from(data)
    if length > min(MAX_HEADER, len(data) - _LENGTH.size):
        raise WireError("schema", f"a header of {length} bytes in a message of {len(data)}: at most {MAX_HEADER}")
    start = _LENGTH.size + length
    header = _read_object(data[_LENGTH.size : start], "the header")
    return Frame(header, None if start == len(data) else _read_rows(data, start))


def _read_object(text: bytes | bytearray, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_int=_read_integer)
    except (ValueError, RecursionError):
        raise WireError("schema", f"{what} is not JSON") from None
    if not isinstance(found, dict):
        raise WireError("schema", f"{what} is not a JSON object")
    return found


def _read_integer(text: str) -> int:
    """Return a number of 64 bits. Raises ValueError for a larger one, of which no float can be made."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError("more than 64 bits")
    return value


def _read_rows(data: Data, start: int) -> Tensor:
    """Return the one tensor of the safetensors file that begins at `start`."""
    what = "the header of the safetensors file"
    if len(data) - start < _FILE_LENGTH.size:
        raise WireError("schema", "what follows the header is not a safetensors file")
    (length,) = _FILE_LENGTH.unpack_from(data, start)
    start += _FILE_LENGTH.size
    if length > min(MAX_FILE_HEADER, len(data) - start):
        raise WireError("schema", f"{what} has {length} bytes: at most {MAX_FILE_HEADER}")
    about = _read_object(data[start : start + length], what)
    start += length
    if set(about) != {TENSOR}:
        raise WireError("schema", f"{len(about)} tensors in a message: need one, '{TENSOR}'")
    try:
        kind, shape, ends = (about[TENSOR][name] for name in ("dtype", "shape", "data_offsets"))
    except (KeyError, TypeError):
        raise WireError("schema", f"{what} does not describe '{TENSOR}'") from None
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not whole or not isinstance(kind, str) or kind not in _KINDS or len(shape) != 2 or shape[0] != 1:
        raise WireError("size", f"'{TENSOR}' is {kind} {shape}: need numbers [1, N]")
    count, dtype = math.prod(shape), _KINDS[kind]
    if ends != [0, count * dtype.itemsize] or len(data) - start != ends[1]:
        raise WireError("schema", f"'{TENSOR}' has {len(data) - start} bytes, and its header tells of {ends}")
    if not count:
        return torch.empty(1, 0, dtype=dtype)
    if isinstance(data, bytes) or start % dtype.itemsize:
        with memoryview(data) as view:
            data, start = bytearray(view[start:]), 0  # one copy; a slice of `data` would be another
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start)[None]


def pack_message(message: Message) -> tuple[dict[str, Any], Tensor]:
    """Return one client's message [1, ...] as `parts` of a header and numbers [1, N]."""
    absent = {name: bool(flags[0]) for name, flags in message.absent.items()}
    named = (("rows", message.rows), *message.more.items())
    values = [value[0] for name, value in named if not absent.get(name, False)]
    parts: dict[str, Any] = {
        "rows": message.rows.shape[1],
        "more": {name: value.shape[1] for name, value in message.more.items()},
        "scalars": {
            name: [str(value.dtype).removeprefix("torch."), value[0].item()] for name, value in message.scalars.items()
        },
    }
    if absent:
        parts["absent"] = absent
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
    if len(values) == 1 and not absent:
        return parts, message.rows  # not copied
    return parts, torch.cat([message.rows[0, :0], *(value.to(message.rows.dtype) for value in values)])[None]


def unpack_message(parts: Any, rows: Tensor | None) -> Message:
    """Return the message that `pack_message` packed. Raises WireError if the header and the numbers do not agree."""
    try:
        numbers = torch.empty(0) if rows is None else rows[0]
        widths = [("rows", int(parts["rows"])), *((str(name), int(count)) for name, count in parts["more"].items())]
        absent = {str(name): flag is True for name, flag in parts.get("absent", {}).items()}
        wanted = [0 if absent.get(name, False) else width for name, width in widths]
        shapes = [
            [(str(module), int(q), int(inputs), int(outputs)) for module, q, inputs, outputs in pairs]
            for pairs in parts.get("base", {}).get("pairs", [])
        ]
        scalars = {
            str(name): torch.tensor([value], dtype=_SCALARS[kind]).reshape(1)
            for name, (kind, value) in parts["scalars"].items()
        }
        first = int(parts.get("base", {}).get("first", 0))
        versions_first = torch.tensor([first])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
        raise WireError("schema", "the header's `parts` do not describe a message") from None
    counts = [*wanted, *(q * size for pairs in shapes for _, q, i, o in pairs for size in (i, o))]
    sizes = [*(width for _, width in widths), *(size for pairs in shapes for _, *of_pair in pairs for size in of_pair)]
    if min([*counts, *sizes]) < 0 or max(sizes) > MAX_WIDTH or sum(counts) != len(numbers):
        raise WireError("size", f"the header tells of {sum(counts)} numbers, and the message has {len(numbers)}")
    pieces = list(torch.split(numbers, counts))
    nothing = numbers.new_zeros(())  # of any width in no memory: the header alone says how wide it is
    own, *others = (
        nothing.expand(width) if absent.get(name, False) else piece
        for (name, width), piece in zip(widths, pieces[: len(widths)], strict=True)
    )
    rest = iter(pieces[len(wanted) :])
    versions: list[Pairs] = [
        {module: (next(rest).view(q, inputs), next(rest).view(outputs, q)) for module, q, inputs, outputs in pairs}
        for pairs in shapes
    ]
    base = None
    if "base" in parts:
        base = BaseVersions(tuple(versions), versions_first, first)
    more = {str(name): value[None] for name, value in zip(parts["more"], others, strict=True)}
    return Message(own[None], scalars, more, base, {name: torch.tensor([flag]) for name, flag in absent.items()})
