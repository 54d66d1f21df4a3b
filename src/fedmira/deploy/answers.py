"""What a site answers, checked before anything reads it: whatever comes, it is an answer or a word of the wire."""

import math
from collections.abc import Mapping
from typing import Any

from fedmira.deploy.channel import Data
from fedmira.deploy.link import Failure
from fedmira.deploy.wire import Frame, decode, unpack_message
from fedmira.engine.gate import Header
from fedmira.errors import WireError
from fedmira.methods.base import Message

COUNTS = ("steps", "tokens", "scored")  # of a header; 0 where one is missing
WORD_LENGTH = 64


def read_answer(data: Data, nonce: str) -> Frame | Failure:
    """Return an answer to the order with this nonce, or what is wrong with it."""
    try:
        frame = decode(data)
        header = frame.header
        if header.get("nonce") != nonce:
            return Failure("duplicate")
        for name in COUNTS:
            count(header, name)
    except WireError as error:
        return Failure(error.reason)
    if header.get("answer") == "failed":
        return Failure(word(header.get("kind")))
    if header.get("answer") not in ("done", "need") or not isinstance(header.get("metrics", {}), dict):
        return Failure("schema")
    return Frame({"metrics": {}, **header}, frame.rows)


def why_not_upload(answer: Frame, name: str, *, like: Message, examples: int) -> str | None:
    """Say with a word of the wire why an answer cannot be this site's upload, None if it can.

    name: of the site, as its certificate has it. like: a message of the method's form. examples: what the site said
    when it joined that it trains on; its weight is that number, whatever it says later.
    """
    if answer.header.get("client") != name:
        return "identity"
    try:
        message = unpack_message(answer.header.get("parts"), answer.rows)
        header = read_header(answer.header)
    except WireError as error:
        return error.reason
    if set(message.more) != set(like.more) or set(message.scalars) != set(like.scalars):
        return "schema"
    if message.base is not None or message.absent:
        return "schema"
    if any(message.scalars[name].dtype != like.scalars[name].dtype for name in like.scalars):
        return "schema"
    rows, expected = [message.rows, *message.more.values()], like.rows
    if any(value.shape != expected.shape or value.dtype != expected.dtype for value in rows):
        return "size"
    return None if header.weight == examples else "weight"


def read_header(header: Mapping[str, Any]) -> Header:
    """Return an upload's header. Raises WireError if a key is missing or of another type."""
    kinds = {
        "run_id": str, "round": int, "client": str, "nonce": str, "base_hash": str, "layout_hash": str, "method": str,
        "schema": int,
    }  # fmt: skip
    values = {name: header.get(name) for name in kinds}
    weight = header.get("weight")
    if any(type(values[name]) is not kind for name, kind in kinds.items()) or not isinstance(weight, int | float):
        raise WireError("schema", "a key of the header is missing, or of another type")
    if isinstance(weight, bool):
        raise WireError("weight", "the weight is not a number")
    return Header(weight=float(weight), metrics={}, **values)  # type: ignore[arg-type]


def word(value: Any) -> str:
    """Return a word that a site says, `failed` for anything else: it gets into logs and records."""
    return value if isinstance(value, str) and value.isidentifier() and len(value) <= WORD_LENGTH else "failed"


def number(values: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number; `default` where it is missing or something else."""
    value = values.get(name)
    return default if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def figure(header: Mapping[str, Any], name: str) -> float:
    """Return one of the figures that a site reports of itself; -1 where it does not."""
    told = header.get("figures")
    value = number(told, name, -1.0) if isinstance(told, Mapping) else -1.0
    return value if math.isfinite(value) else -1.0


def optional(values: Mapping[str, Any], name: str) -> float | None:
    """Return a finite number, None where there is none."""
    value = number(values, name, math.nan)
    return None if not math.isfinite(value) else value


def count(header: Mapping[str, Any], name: str) -> int:
    """Return a count. Raises WireError if it is something else."""
    value = header.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**53:
        raise WireError("schema", f"'{name}' is not a count")
    return value
