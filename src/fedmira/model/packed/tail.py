"""Behind its last attention a base works on one token at a time: there it need only see tokens that predict a label.

In fine-tuning most tokens are prompt. Through all layers but the last these matter, as keys and values for the answer;
behind the last attention nothing reads them any more. There the queries of a span begin at its first label, and the
modules that follow (the output projection, the feed-forward layer) get the labelled rows alone; rows left out are 0
and nobody looks at them. One layer of six is nearly free then, one of thirty-six too.

Which modules these are is seen in a trial pass, and kept only if that pass gives the same states at its labels.
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

LABELLED_SHARE = 0.5  # of a pass's tokens with a label; where more have one, picking them is not worth it


@dataclass(eq=False)
class Tail:
    """The last attention of a base and the modules behind it; `labelled` [n] and `segments` while a pass is cut."""

    attention: nn.Module
    stack: Stack
    names: tuple[str, ...]
    labelled: Tensor | None = None
    segments: tuple[Segment, ...] = ()

    @contextmanager
    def cut(self, plan: Pass) -> Iterator[nn.Module | None]:
        """Let the modules see nothing but the labelled rows of this pass; yield the attention that may leave out rows.

        Nothing is cut where most tokens have a label, or under dropout, whose masks are drawn for all of a client's.
        """
        worth = 0 < len(plan.labelled) <= LABELLED_SHARE * plan.ids.shape[1] and self.stack.dropout is None
        self.labelled, self.segments = (plan.labelled, plan.labelled_segments) if worth else (None, ())
        try:
            yield self.attention if worth else None
        finally:
            self.labelled, self.segments = None, ()

    def wrap(self, own: Callable[..., object]) -> Callable[..., object]:
        """Return a module's forward that works on the labelled rows while a pass is cut."""

        def forward(x: Tensor, *args: object, **given: object) -> object:
            if self.labelled is None:
                return own(x, *args, **given)
            picked = _Pick.apply(x, self.labelled)  # type: ignore[no-untyped-call]
            before, self.stack.segments = self.stack.segments, self.segments
            try:
                y = own(picked, *args, **given)
            finally:
                self.stack.segments = before
            return _Spread.apply(y, self.labelled, x.shape[1])  # type: ignore[no-untyped-call]

        return forward


def find_tail(model: PreTrainedModel, decoder: nn.Module, stack: Stack) -> Tail | None:
    """Find and wrap what follows the last attention of a base that packs; None, and nothing wrapped, where it differs.

    Candidates are modules with a matrix that hang on the last attention or on what contains it, are called once in a
    pass, after that attention, with one [1, N, d] and give one. They are kept if a pass of random tokens cut to its
    labels has the states there that it has uncut.
    """
    plan = _random_pass(model)
    if plan.attention is None:
        return None
    calls: dict[str, list[tuple[int, bool]]] = {}
    with torch.no_grad(), attending(model, PackedAttention(plan.attention)) as attended:
        hooks = [
            module.register_forward_hook(
                lambda _, given, y, name=name: calls.setdefault(name, []).append((len(attended), _fits(given, y)))
            )
            for name, module in decoder.named_modules()
        ]
        try:
            whole = decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
    last = attended[-1].layer
    if sum(call.layer is last for call in attended) != 1:  # layers that share their weights
        return None
    place = next(name for name, module in decoder.named_modules() if module is last)
    parts = place.split(".")
    above = {".".join(parts[:depth]) for depth in range(len(parts) + 1)}
    names = tuple(
        name
        for name, seen in calls.items()
        if name not in above
        and name.rpartition(".")[0] in above
        and seen == [(len(attended), True)]
        and any(weight.ndim == 2 for weight in decoder.get_submodule(name).parameters())
    )
    tail = Tail(last, stack, names)
    before = {name: decoder.get_submodule(name).forward for name in names}
    for name, own in before.items():
        decoder.get_submodule(name).forward = tail.wrap(own)
    with torch.no_grad(), tail.cut(plan) as cut, attending(model, PackedAttention(plan.attention, last=cut)):
        states = decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state
    if names and agree(states[0, plan.labelled], whole[0, plan.labelled]):
        return tail
    for name, own in before.items():
        decoder.get_submodule(name).forward = own
    return None


def _random_pass(model: PreTrainedModel) -> Pass:
    """Three texts of random tokens, the last three of each with a label."""
    lengths = torch.tensor([[9], [14], [7]])
    embedding = model.get_input_embeddings().weight
    ids = torch.randint(embedding.shape[0], (3, 1, 14), generator=torch.Generator().manual_seed(5))
    places = torch.arange(14)
    labels = ids.masked_fill((places < lengths[..., None] - 3) | (places >= lengths[..., None]), NO_LOSS)
    batch = Batch(ids, labels, lengths)
    return pack(batch, pad_id=0, fused=embedding.device.type != "cpu").to(embedding.device)


def _fits(given: tuple[object, ...], y: object) -> bool:
    """Is this a call with states [1, N, d] alone that gave states?"""
    x = given[0] if len(given) == 1 else None
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == y.ndim == 3 and x.shape[:2] == y.shape[:2]


class _Pick(torch.autograd.Function):
    """x [1, N, d] at rows [n] that are all different; the gradient of the others is 0."""

    @staticmethod
    def forward(ctx: object, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.tokens = rows, x.shape[1]  # type: ignore[attr-defined]
        return x.index_select(1, rows)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grads[0], ctx.rows, ctx.tokens), None  # type: ignore[attr-defined]


class _Spread(torch.autograd.Function):
    """Put y [1, n, d] at rows [n] of a [1, N, d] of zeros."""

    @staticmethod
    def forward(ctx: object, y: Tensor, rows: Tensor, tokens: int) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        return _spread(y, rows, tokens)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(1, ctx.rows), None, None  # type: ignore[attr-defined]


def _spread(y: Tensor, rows: Tensor, tokens: int) -> Tensor:
    return y.new_zeros(1, tokens, y.shape[-1]).index_copy_(1, rows, y)
