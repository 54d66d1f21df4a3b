"""Trials of a base: what it does, measured on random tokens before anything is trained on it.

Architectures differ in more ways than a list could hold, so what the passes assume is tried: later tokens do not
change earlier logits (then right padding needs no mask), our head gives the model's own logits, padding on the left of
a prompt does not change its answer, every adapted layer sees all tokens in their order, and examples laid end to end
give what each gives alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig

from fedmira.data.batches import Batch
from fedmira.model.agreement import agree, difference
from fedmira.model.base.source import first_line, refuse
from fedmira.model.packed.attention import PackedAttention
from fedmira.model.packed.loss import Head
from fedmira.model.packed.packing import pack
from fedmira.model.seam import attending

log = logging.getLogger(__name__)


def check_decoder(model: nn.Module, decoder: nn.Module, head: Head, *, vocabulary: int, name: str) -> None:
    """Raise ModelError unless the base is a causal decoder whose logits are our head on its hidden states."""
    ids = _draw(vocabulary, 1, 8, seed=0, like=head.weight)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocabulary
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            changed_logits = model(input_ids=changed, use_cache=False).logits
            head_logits = head.logits(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except Exception as error:  # any architecture's own code
        raise refuse(name, f"a first pass of {type(model).__name__} failed: {_describe(error)}") from error
    dtype = head.weight.dtype
    if not bool(logits.isfinite().all()):
        raise refuse(name, f"its logits are not all finite in {dtype}: damaged weights, or a wrong dtype")
    if not agree(changed_logits[:, :-1], logits[:, :-1], dtype=dtype):
        raise refuse(name, "later tokens change earlier logits, so it is not a causal decoder")
    if not agree(head_logits, logits, dtype=dtype):
        raise refuse(
            name,
            f"{type(model).__name__} changes its logits after the output head in a way FedMira does not know; its "
            "loss would be wrong",
        )


def check_prompts(model: transformers.PreTrainedModel, *, vocabulary: int, name: str) -> None:
    """Raise ModelError unless a short prompt, padded on the left, is continued as it is alone.

    Its padding is random. Models without a mask fail here, and some that compute attention partly in float32 do in
    float64: their mask overflows.
    """
    ids = _draw(vocabulary, 2, 6, seed=3, like=model.get_input_embeddings().weight)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    one_token = GenerationConfig(
        do_sample=False, max_new_tokens=1, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    try:
        with torch.no_grad(), _flat(model.get_output_embeddings()):
            padded = model.generate(ids, attention_mask=mask, generation_config=one_token).logits[0]
            alone = model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], generation_config=one_token).logits[0]
    except Exception as error:  # any architecture's own code
        raise refuse(name, f"{type(model).__name__} failed to write a first word: {_describe(error)}") from error
    if not agree(padded[:1], alone, dtype=model.dtype):
        raise refuse(
            name,
            f"{type(model).__name__} in {model.dtype} continues a prompt differently beside a longer one, so answers "
            "would be wrong" + ("; model.dtype: float32 may do" if model.dtype == torch.float64 else ""),
        )


@contextmanager
def _flat(head: nn.Module) -> Iterator[None]:
    """Give an output head its hidden states as rows.

    Of states cut from longer ones torch copies a bfloat16 head for each text (2.13 on CPUs).
    """
    shapes: list[torch.Size] = []

    def before(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes.append(given[0].shape[:-1])
        return (given[0].flatten(0, -2), *given[1:])

    hooks = [
        head.register_forward_pre_hook(before),
        head.register_forward_hook(lambda module, given, out: out.unflatten(0, shapes.pop())),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_embeddings(decoder: nn.Module, embedding: nn.Module, *, vocabulary: int, name: str) -> None:
    """Raise ModelError unless a base gives the same states for the embeddings of tokens as for the tokens."""
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    ids = _draw(vocabulary, 1, 8, seed=4, like=weight)
    try:
        with torch.no_grad():
            by_ids = decoder(input_ids=ids, use_cache=False).last_hidden_state
            by_embeddings = decoder(inputs_embeds=embedding(ids), use_cache=False).last_hidden_state
    except Exception as error:  # any architecture's own code
        raise refuse(name, f"{type(decoder).__name__} takes no virtual tokens: {_describe(error)}") from error
    if not agree(by_embeddings, by_ids, dtype=weight.dtype):
        raise refuse(name, f"{type(decoder).__name__} reads more than embeddings, so it takes no virtual tokens")


def list_unfit(decoder: nn.Module, layers: dict[str, nn.Module], *, vocabulary: int) -> dict[str, str]:
    """Return the layers that cannot carry an adapter per client, and why: not all tokens pass through them in order.

    An expert of a mixture sees only the tokens sent to it: a stacked layer would mix up the clients there. A fused
    computation reads a layer's weight without calling it: an adapter there would have no effect.
    """
    seen: dict[str, list[list[int]]] = {layer: [] for layer in layers}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: seen[layer].append(_sizes(inputs)))
        for layer, module in layers.items()
    ]
    ids = _draw(vocabulary, 2, 3, seed=2, like=next(decoder.parameters()))
    try:
        with torch.no_grad():
            decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    unfit = {layer: "is not called in a pass" for layer, sizes in seen.items() if not sizes}
    for layer, sizes in seen.items():
        if any(size not in ([2, 3], [6]) for size in sizes):
            unfit[layer] = "does not see every token of a pass in its order"
    return unfit


def try_packing(model: transformers.PreTrainedModel, decoder: nn.Module, *, vocabulary: int) -> frozenset[int] | None:
    """Measure whether uneven examples laid end to end give the hidden states that each gives alone.

    Return the reaches of its windows and chunks in tokens, empty where it has none; None if it cannot be packed.
    """
    embeddings = model.get_input_embeddings().weight
    stream = torch.Generator().manual_seed(1)
    lengths = [5, 9, 2, 9]
    examples = [torch.randint(vocabulary, (1, 1, length), generator=stream) for length in lengths]
    batch = Batch(
        ids=torch.cat([nn.functional.pad(ids, (0, 9 - ids.shape[-1])) for ids in examples]),
        labels=torch.full((len(lengths), 1, 9), -100),
        lengths=torch.tensor(lengths)[:, None],
    )
    device = embeddings.device
    plan = pack(batch, pad_id=0, fused=device.type != "cpu").to(device)
    assert plan.attention is not None
    with torch.no_grad():
        alone = [decoder(input_ids=ids[0].to(device), use_cache=False).last_hidden_state[0] for ids in examples]
        try:
            with attending(model, PackedAttention(plan.attention)) as calls:
                states = decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state[0]
        except Exception as error:  # any architecture's own code may fail in a packed pass: padded ones it can do
            log.info("%s is trained on padded batches: %s", type(model).__name__, _describe(error))
            return None
    starts = {
        client: segment.start + number * segment.tokens
        for segment in plan.segments
        for number, client in enumerate(plan.order[segment.first : segment.stop].tolist())
    }
    packed = torch.cat([states[starts[client] : starts[client] + length] for client, length in enumerate(lengths)])
    if not agree(packed, torch.cat(alone)):
        worst = difference(packed, torch.cat(alone))
        log.info("%s is trained on padded batches: packed states differ by %.2g", type(model).__name__, worst)
        return None
    return frozenset(call.rule.reach for call in calls if call.rule.reach is not None)


def _draw(vocabulary: int, texts: int, tokens: int, *, seed: int, like: Tensor) -> Tensor:
    """Draw random ids [texts, tokens] on the device of a tensor."""
    ids = torch.randint(vocabulary, (texts, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(like.device)


def _sizes(inputs: Sequence[object]) -> list[int]:
    """Return the leading axes of a layer's input, those of size one left out."""
    x = inputs[0] if inputs else None
    return [size for size in x.shape[:-1] if size != 1] if isinstance(x, Tensor) else []


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
