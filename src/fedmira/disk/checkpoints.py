"""Checkpoints as a chain of changes, and recovery from a damaged one.

A checkpoint is a folder `round-000012` with safetensors files and, written last, manifest.json with their sha256. A
folder without a manifest is ignored. "full" has the whole state; "delta" has what one round changed, so that its cost
depends on the change and not on the number of clients. A full one is written once the deltas since the last one would
be larger. Recovery reads the newest intact full one, then its deltas up to the first damaged one.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedmira.disk.files import make_folder, sync_folder, write_atomic, write_pieces
from fedmira.disk.table import Picked, bytes_of
from fedmira.errors import StoreError

log = logging.getLogger(__name__)

SCHEMA = 2
# safetensors' names: https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


Tensors = Mapping[str, Tensor | Picked]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One intact checkpoint. files: file name (without ending) -> its tensors. facts: of its round, as JSON."""

    round: int
    full: bool
    files: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any] = field(default_factory=dict)


def _write_tensors(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Write a safetensors file without a copy in memory; return its entry in the manifest: sha256, bytes."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # every tensor is aligned
    described: dict[str, Any] = {}
    end = 0
    for name in names:
        value = tensors[name]
        begin, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        described[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    size = 8 + len(header) + end
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(header).to_bytes(8, "little") + header
        for name in names:
            value = tensors[name]
            yield from map(bytes_of, value.blocks() if isinstance(value, Picked) else [value])

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in pieces():
            digest.update(piece)
            yield piece
            del piece  # else it would be in memory beside the next one

    write_pieces(path, hashed(), size)
    return {"sha256": digest.hexdigest(), "bytes": size}


def save_checkpoint(
    folder: Path,
    round_number: int,
    files: Mapping[str, Tensors],
    *,
    full: bool,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Write one checkpoint under `folder`, manifest last; return its size in bytes. facts: of its round, as JSON.

    A left-over folder of the same round (a crash before its manifest, or a damaged one) is replaced.
    """
    target = folder / f"round-{round_number:06d}"
    if target.exists():
        shutil.rmtree(target)
    make_folder(target)
    listed = {name: _write_tensors(target / f"{name}.safetensors", tensors) for name, tensors in files.items()}
    manifest = {
        "schema": SCHEMA,
        "round": round_number,
        "full": full,
        "files": listed,
        "facts": dict(facts or {}),
    }
    manifest["sha256"] = _manifest_hash(manifest)
    write_atomic(target / "manifest.json", json.dumps(manifest, indent=1).encode())
    sync_folder(folder)
    return sum(int(entry["bytes"]) for entry in listed.values())


def load_chain(folder: Path) -> list[Checkpoint]:
    """Return the chain to the newest round that can be rebuilt: a full checkpoint, then deltas in order; [] if none.

    A damaged checkpoint is reported by a warning, and it and everything after it are left out.
    Raises StoreError if there are checkpoints but no intact full one.
    """
    numbers = checkpoint_rounds(folder)
    loaded: dict[int, Checkpoint | None] = {}

    def get(number: int) -> Checkpoint | None:
        if number not in loaded:
            loaded[number] = _load(folder / f"round-{number:06d}")
        return loaded[number]

    best: list[Checkpoint] = []
    for start in reversed(range(len(numbers))):
        first = get(numbers[start])
        if first is None or not first.full:
            continue
        chain = [first]
        for number in numbers[start + 1 :]:
            following = get(number)
            if following is None or following.round != chain[-1].round + 1:
                break
            chain.append(following)
        if not best or chain[-1].round > best[-1].round:
            best = chain
        if best[-1].round == numbers[-1] or all(get(number) for number in numbers[start:]):
            break
    if numbers and not best:
        raise StoreError(f"no intact checkpoint in '{folder}': {len(numbers)} found, all damaged; start the run again")
    if best and best[-1].round < numbers[-1]:
        log.warning("resuming from round %d: a later checkpoint in '%s' is damaged", best[-1].round, folder)
    return best


def load_checkpoint(folder: Path, number: int) -> Checkpoint | None:
    """Return the checkpoint of one round; None if there is none, or, with a warning, if it is damaged."""
    checkpoint = folder / f"round-{number:06d}"
    return _load(checkpoint) if checkpoint.is_dir() else None


def checkpoint_rounds(folder: Path) -> list[int]:
    """List the rounds that have a manifest, ascending."""
    return _rounds_of([path.parent for path in folder.glob("round-*/manifest.json")])


def _rounds_of(folders: Iterable[Path]) -> list[int]:
    names = [path.name.removeprefix("round-") for path in folders]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def prune(folder: Path, keep_from: int, keep_to: int | None = None) -> None:
    """Remove checkpoints before round `keep_from` and, if given, after round `keep_to`.

    Newest first and each manifest first, so that a crash leaves no partly readable checkpoint and no gap below one.
    What such a crash has left without a manifest is removed too.
    """
    for number in reversed(_rounds_of(folder.glob("round-*"))):
        if number < keep_from or (keep_to is not None and number > keep_to):
            removed = folder / f"round-{number:06d}"
            (removed / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(removed)


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest without its own hash: a flipped bit in a round's number must not pass."""
    hashed = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _load(checkpoint: Path) -> Checkpoint | None:
    """Read and verify one checkpoint; None, with a warning, if anything in it is wrong."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        if manifest["sha256"] != _manifest_hash(manifest) or checkpoint.name != f"round-{manifest['round']:06d}":
            raise StoreError("manifest.json does not match its sha256")
        if manifest["schema"] != SCHEMA:
            raise StoreError(f"schema {manifest['schema']}, this version reads {SCHEMA}")
        files = {}
        for name, entry in manifest["files"].items():
            path = checkpoint / f"{name}.safetensors"
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise StoreError(f"{path.name} does not match its sha256")
            files[name] = load_file(path)
        return Checkpoint(int(manifest["round"]), bool(manifest["full"]), files, manifest["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, StoreError) as error:
        log.warning("checkpoint '%s' is damaged (%s): it is not used", checkpoint, error)
        return None
