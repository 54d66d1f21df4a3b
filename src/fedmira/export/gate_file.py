"""The gate of a client beside its adapter, for `chat`: both parts of its row, and the prompts' states to compare with.

    adapters/<client>/gate.safetensors: row [1, P], ranks, scale, room (ranks of its layout), references [m, d]

`export` does not copy it: PEFT has no gate, and the states are of training prompts.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout
from fedmira.adapters.parts import own_and_shared
from fedmira.disk.files import write_atomic
from fedmira.disk.folders import GATE
from fedmira.errors import ShapeError, StoreError
from fedmira.export.adapter_config import check_plain
from fedmira.model.base.load import Base


def write_gate(folder: Path, adapters: Adapters, references: Tensor) -> None:
    """Write one client's adapters [1, P] of two parts, and the states [m, d] that questions are compared with."""
    tensors = {
        "row": adapters.rows.contiguous(),
        "ranks": adapters.ranks.contiguous(),
        "scale": adapters.scale.contiguous(),
        "room": torch.tensor(adapters.layout.parts[0].ranks),
        "references": references.contiguous(),
    }
    write_atomic(folder / GATE, save(tensors))


def read_gate(folder: Path, base: Base) -> tuple[Adapters, Tensor]:
    """Return what write_gate wrote. Raises StoreError if it is missing, damaged, or of another base."""
    path = folder / GATE
    if not path.exists():
        raise StoreError(f"'{folder}' has no {GATE}, which its method's answers need; 'fedmira resume' the run's study")
    check_plain(path)
    try:
        tensors = load_file(path)
        layout = own_and_shared(lora_layout(base.shapes, tensors["room"].tolist()))
        row = tensors["row"]
        if row.shape != (1, layout.size) or not bool(torch.isfinite(row).all()):
            raise ValueError(f"a row of {tuple(row.shape)}, and [1, {layout.size}] finite numbers are needed")
        return Adapters(layout, row, tensors["ranks"], tensors["scale"]), tensors["references"]
    except (OSError, SafetensorError, KeyError, ValueError, ShapeError) as error:
        raise StoreError(f"'{path}' is damaged, or of another base: {error}; put back a copy of it") from None
