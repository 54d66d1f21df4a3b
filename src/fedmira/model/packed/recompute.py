"""Decoder blocks whose activations are computed a second time in the backward pass instead of being kept.

Of each block only what it is given is kept: the residual stream, [tokens, d]. While backward goes through a block, the
activations of that one block are there. The second time everything is as it was the first time, dropout masks and cut
tails included, so that losses and gradients have the same bits.

Source: Chen et al. 2016 (arXiv:1604.06174); torch.utils.checkpoint, the form without reentrance.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedmira.model.base.memory import Garbage

LARGE_BYTES = 2**19  # of the residual stream; what smaller blocks leave behind is not worth a look

Forward = Callable[..., object]

_garbage = Garbage()


def find_blocks(decoder: nn.Module) -> tuple[nn.Module, ...]:
    """Return the decoder's blocks in order: what transformers recomputes; none inside another."""
    found: dict[str, nn.Module] = {}
    for name, module in decoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return tuple(found.values())


@contextmanager
def _wrapped(blocks: Sequence[nn.Module], wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Let each block's forward be another one for a while."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = wrap(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@contextmanager
def recomputing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute the activations of these blocks again in the backward passes of what is computed inside.

    On the host freed memory is limited before each block of a large pass.
    """

    def wrap(forward: Forward) -> Forward:
        def limited(*args: Any, **options: Any) -> object:
            if any(isinstance(x, Tensor) and x.device.type == "cpu" and x.nbytes >= LARGE_BYTES for x in args):
                _garbage.limit()
            return forward(*args, **options)

        def again(*args: Any, **options: Any) -> object:
            return checkpoint(limited, *args, use_reentrant=False, preserve_rng_state=False, **options)

        return again

    with _wrapped(blocks, wrap):
        yield


@dataclass(eq=False)
class Kept:
    """Bytes that a pass keeps for its backward pass, counted once for each storage.

    outside: of no block; inside: by block; streams: what blocks are given.
    """

    outside: dict[int, int] = field(default_factory=dict)
    inside: list[dict[int, int]] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)

    @property
    def plain(self) -> int:
        """Where everything is kept."""
        everything = dict(self.outside)
        for block in self.inside:
            everything |= block
        return sum(everything.values())

    @property
    def recomputed(self) -> int:
        """At most, where blocks are computed again: what they are given, and one of them."""
        kept = {**self.outside, **self.streams}
        beside = ({at: size for at, size in block.items() if at not in kept} for block in self.inside)
        return sum(kept.values()) + max((sum(block.values()) for block in beside), default=0)


@contextmanager
def counting(blocks: Sequence[nn.Module], weights: Sequence[Tensor]) -> Iterator[Kept]:
    """Count what passes inside keep for their backward pass. weights: are there anyway, and not counted."""
    kept = Kept()
    there = {weight.untyped_storage().data_ptr() for weight in weights}
    current: list[dict[int, int]] = [kept.outside]

    def note(tensor: Tensor, into: dict[int, int]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            into[storage.data_ptr()] = storage.nbytes()
        return tensor

    def wrap(forward: Forward) -> Forward:
        def watched(*args: object, **options: object) -> object:
            for value in (*args, *options.values()):
                if isinstance(value, Tensor):
                    note(value, kept.streams)
            kept.inside.append({})
            current.append(kept.inside[-1])
            try:
                return forward(*args, **options)
            finally:
                current.pop()

        return watched

    def keep(tensor: Tensor) -> Tensor:
        return note(tensor, current[-1])

    with _wrapped(blocks, wrap), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
