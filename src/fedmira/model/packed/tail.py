"""The tail of a base, which follows its last attention: it computes one token at a time, and only labelled ones.

In fine-tuning most tokens are prompt. In all layers but the last they are needed, as keys and values for the answer;
after the last attention no token reads another. There the queries of a span begin at its first labelled token, and the
modules that follow (the output projection, the feed-forward layer) get the labelled tokens alone; those left out are 0
and are not used. One layer of six is nearly free then, one of thirty-six too.

Which modules these are is seen in a trial pass, and used only if that pass gives the same states at its labels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedmira.data.batches import NO_LOSS, Batch
from fedmira.model.agreement import agree
from fedmira.model.packed.attention import PackedAttention
from fedmira.model.packed.lora import Stack
from fedmira.model.packed.packing import Pass, Segment, pack
from fedmira.model.seam import attending

LABELLED_SHARE = 0.5  # of a pass's tokens; where more are labelled, picking them is not worth it

Forward = Callable[..., object]


@dataclass(eq=False)
class Tail:
    """The last attention of a base and the modules after it; `labelled` [n] and `segments` while a pass is cut."""

    attention: nn.Module
    stack: Stack
    names: tuple[str, ...]
    labelled: Tensor | None = None
    segments: tuple[Segment, ...] = ()

    @contextmanager
    def cut(self, plan: Pass) -> Iterator[nn.Module | None]:
        """Let the modules see only the labelled tokens of this pass; yield the attention that may leave out tokens.

        Nothing is cut where most tokens are labelled, or under dropout, whose masks are drawn for all of a client's.
        """
        worth = 0 < len(plan.labelled) <= LABELLED_SHARE * plan.ids.shape[1] and self.stack.dropout is None
        self.labelled, self.segments = (plan.labelled, plan.labelled_segments) if worth else (None, ())
        try:
            yield self.attention if worth else None
        finally:
            self.labelled, self.segments = None, ()

    def wrap(self, module_forward: Forward) -> Forward:
        """Return a module's forward that works on the labelled tokens while a pass is cut."""

        def forward(x: Tensor, *args: object, **options: object) -> object:
            if self.labelled is None:
                return module_forward(x, *args, **options)
            picked = _Pick.apply(x, self.labelled)  # type: ignore[no-untyped-call]
            segments, self.stack.segments = self.stack.segments, self.segments
            try:
                y = module_forward(picked, *args, **options)
            finally:
                self.stack.segments = segments
            return _Spread.apply(y, self.labelled, x.shape[1])  # type: ignore[no-untyped-call]

        return forward


def find_tail(model: PreTrainedModel, decoder: nn.Module, stack: Stack, *, vocabulary: int) -> Tail | None:
    """Find and wrap the tail of a base that packs; None, and nothing wrapped, where a cut pass differs.

    Candidates are modules with a matrix that are children of the last attention or of what contains it, are called once
    in a pass, after that attention, with one [1, N, d] and give one. They are the tail if a pass of random tokens cut
    to its labels has the states there that it has uncut.
    """
    plan = _random_pass(model, vocabulary)
    if plan.attention is None:
        return None
    module_calls: dict[str, list[tuple[int, bool]]] = {}  # of each: how many layers had attended, and whether it fits
    with torch.no_grad(), attending(model, PackedAttention(plan.attention)) as attended:
        hooks = [
            module.register_forward_hook(
                lambda _, inputs, y, name=name: module_calls.setdefault(name, []).append(
                    (len(attended), _fits(inputs, y))
                )
            )
            for name, module in decoder.named_modules()
        ]
        try:
            uncut = decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
    last = attended[-1].layer
    if sum(call.layer is last for call in attended) != 1:  # layers that share their weights
        return None
    last_name = next(name for name, module in decoder.named_modules() if module is last)
    steps = last_name.split(".")
    ancestors = {".".join(steps[:depth]) for depth in range(len(steps) + 1)}  # the last attention itself among them
    names = tuple(
        name
        for name, calls in module_calls.items()
        if name not in ancestors
        and name.rpartition(".")[0] in ancestors
        and calls == [(len(attended), True)]
        and any(weight.ndim == 2 for weight in decoder.get_submodule(name).parameters())
    )
    tail = Tail(last, stack, names)
    forwards = {name: decoder.get_submodule(name).forward for name in names}
    for name, forward in forwards.items():
        decoder.get_submodule(name).forward = tail.wrap(forward)
    with torch.no_grad(), tail.cut(plan) as cut, attending(model, PackedAttention(plan.attention, last=cut)):
        states = decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state
    if names and agree(states[0, plan.labelled], uncut[0, plan.labelled]):
        return tail
    for name, forward in forwards.items():
        decoder.get_submodule(name).forward = forward
    return None


def _random_pass(model: PreTrainedModel, vocabulary: int) -> Pass:
    """Three texts of random tokens, the last three of each with a label."""
    lengths = torch.tensor([[9], [14], [7]])
    embedding = model.get_input_embeddings().weight
    ids = torch.randint(vocabulary, (3, 1, 14), generator=torch.Generator().manual_seed(5))
    steps = torch.arange(14)
    labels = ids.masked_fill((steps < lengths[..., None] - 3) | (steps >= lengths[..., None]), NO_LOSS)
    batch = Batch(ids, labels, lengths)
    return pack(batch, pad_id=0, fused=embedding.device.type != "cpu").to(embedding.device)


def _fits(inputs: tuple[object, ...], y: object) -> bool:
    """Is this a call with states [1, N, d] alone that gave states?"""
    x = inputs[0] if len(inputs) == 1 else None
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == y.ndim == 3 and x.shape[:2] == y.shape[:2]


class _Pick(torch.autograd.Function):
    """x [1, N, d] at tokens [n] that are all different; the gradient of the others is 0."""

    @staticmethod
    def forward(ctx: object, x: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.tokens = index, x.shape[1]  # type: ignore[attr-defined]
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grads[0], ctx.index, ctx.tokens), None  # type: ignore[attr-defined]


class _Spread(torch.autograd.Function):
    """Put y [1, n, d] at tokens [n] of a [1, N, d] of zeros."""

    @staticmethod
    def forward(ctx: object, y: Tensor, index: Tensor, tokens: int) -> Tensor:
        ctx.index = index  # type: ignore[attr-defined]
        return _spread(y, index, tokens)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(1, ctx.index), None, None  # type: ignore[attr-defined]


def _spread(y: Tensor, index: Tensor, tokens: int) -> Tensor:
    return y.new_zeros(1, tokens, y.shape[-1]).index_copy_(1, index, y)
