"""What may reach a method: every upload is checked here, in simulation and at a server alike.

A refused upload counts as silence: that client keeps its row, the others go on.
"""

import torch
from torch import Tensor

from fedmira.adapters import Layout, norms
from fedmira.errors import WireError
from fedmira.methods.base import Change, Message

MAX_NORM = 1e6  # of one client's row; far above any adapter that still computes in float32


def admit(ids: Tensor, returned: Message, weights: Tensor, layout: Layout) -> tuple[Tensor, dict[int, str]]:
    """Return the positions [n] of uploads that may be merged, and the refused ones with their reason.

    Reasons are the wire's words: size (shape or dtype), not_finite, norm, weight.
    """
    refused: dict[int, str] = {}
    rows = returned.rows
    if rows.shape != (len(ids), layout.size) or not rows.is_floating_point():
        return torch.empty(0, dtype=torch.int64), dict.fromkeys(ids.tolist(), "size")
    lengths = norms(rows)
    finite = torch.isfinite(lengths)
    for scalar in returned.scalars.values():
        finite &= torch.isfinite(scalar)
    for position, client in enumerate(ids.tolist()):
        if not bool(finite[position]):
            refused[client] = "not_finite"
        elif float(lengths[position]) > MAX_NORM:
            refused[client] = "norm"
        elif not float(weights[position]) > 0 or not bool(torch.isfinite(weights[position])):
            refused[client] = "weight"
    kept = [position for position, client in enumerate(ids.tolist()) if client not in refused]
    return torch.tensor(kept, dtype=torch.int64), refused


def check_change(change: Change, method: str) -> None:
    """Refuse a merge whose result is not finite, before it replaces anything."""
    if not bool(torch.isfinite(norms(change.rows)).all()):
        raise WireError("not_finite", f"the merge of '{method}' gave rows that are not finite; nothing was replaced")
