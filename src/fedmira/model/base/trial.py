"""What a base does, measured on random tokens before anything is trained on it.

Architectures differ in more ways than a list could hold, so what the passes rely on is tried: later tokens do not
change earlier logits (then right padding needs no mask), our head gives the model's own logits, padding on the left of
a prompt does not change its answer, every adapted layer sees all tokens in their order, and examples laid end to end
give what each gives alone.
"""

import logging
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig

from fedmira.data.batches import Batch
from fedmira.model.base.source import first_line, refuse
from fedmira.model.packed.attention import packed_attention
from fedmira.model.packed.loss import Head
from fedmira.model.packed.packing import pack

log = logging.getLogger(__name__)


def check_decoder(model: nn.Module, decoder: nn.Module, head: Head, *, name: str) -> None:
    """Raise ModelError unless the base is a causal decoder whose logits are our head on its hidden states."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(head.weight)
    ids = torch.randint(vocabulary, (1, 8), generator=generator).to(head.weight.device)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    try:
        with torch.no_grad():
            own = _wide(model(input_ids=ids, use_cache=False).logits)
            changed = _wide(model(input_ids=other, use_cache=False).logits)
            ours = head.logits(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except Exception as error:  # any architecture's own code
        raise refuse(name, f"a first pass of {type(model).__name__} failed: {_describe(error)}") from error
    if not bool(own.isfinite().all()):
        raise refuse(name, f"its logits are not all finite in {head.weight.dtype}: damaged weights, or a wrong dtype")
    tolerance = _tolerance(head.weight.dtype) * float(own.abs().max().clamp(min=1))
    if float((own[:, :-1] - changed[:, :-1]).abs().max()) > tolerance:
        raise refuse(name, "later tokens change earlier logits, so it is no causal decoder")
    if own.shape != ours.shape or float((own - ours).abs().max()) > tolerance:
        raise refuse(
            name,
            f"{type(model).__name__} changes its logits after the output head in a way FedMira does not know; its "
            "loss would be wrong",
        )


def check_prompts(model: transformers.PreTrainedModel, *, vocabulary: int, name: str) -> None:
    """Raise ModelError unless a short prompt, padded on the left, is continued as it is alone.

    What stands in its padding is random. Models without a mask fail here, and some that compute attention partly in
    float32 do in float64: their mask overflows.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(vocabulary, (2, 6), generator=torch.Generator().manual_seed(3)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    once = GenerationConfig(
        do_sample=False, max_new_tokens=1, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    try:
        with torch.no_grad():
            both = model.generate(ids, attention_mask=mask, generation_config=once).logits[0]
            alone = model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], generation_config=once).logits[0]
    except Exception as error:  # any architecture's own code
        raise refuse(name, f"{type(model).__name__} failed to write a first word: {_describe(error)}") from error
    off = float((_wide(both[0]) - _wide(alone[0])).abs().max())
    if not off <= _tolerance(model.dtype) * float(_wide(alone).abs().max().clamp(min=1)):
        raise refuse(
            name,
            f"{type(model).__name__} in {model.dtype} continues a prompt differently beside a longer one, so answers "
            "would be wrong" + ("; model.dtype: float32 may do" if model.dtype == torch.float64 else ""),
        )


def check_embeddings(decoder: nn.Module, embedding: nn.Module, *, name: str) -> None:
    """Raise ModelError unless the base makes of the embeddings of some tokens what it makes of the tokens."""
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    ids = torch.randint(len(weight), (1, 8), generator=torch.Generator().manual_seed(4)).to(weight.device)
    try:
        with torch.no_grad():
            usual = _wide(decoder(input_ids=ids, use_cache=False).last_hidden_state)
            given = _wide(decoder(inputs_embeds=embedding(ids), use_cache=False).last_hidden_state)
    except Exception as error:  # any architecture's own code
        raise refuse(name, f"{type(decoder).__name__} takes no virtual tokens: {_describe(error)}") from error
    if float((usual - given).abs().max()) > _tolerance(weight.dtype) * float(usual.abs().max().clamp(min=1)):
        raise refuse(name, f"{type(decoder).__name__} reads more than embeddings, so it takes no virtual tokens")


def list_unfit(decoder: nn.Module, layers: dict[str, nn.Module], *, vocabulary: int) -> dict[str, str]:
    """Return the layers that cannot carry an adapter per client, and why: not all tokens pass through them in order.

    An expert of a mixture sees only the tokens sent to it: a stacked layer would mix up the clients there. A fused
    computation reads a layer's weight without calling it: there it would do nothing.
    """
    seen: dict[str, list[list[int]]] = {layer: [] for layer in layers}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, layer=layer: seen[layer].append(_sizes(given)))
        for layer, module in layers.items()
    ]
    device = next(decoder.parameters()).device
    ids = torch.randint(vocabulary, (2, 3), generator=torch.Generator().manual_seed(2)).to(device)
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


def try_packing(model: transformers.PreTrainedModel, decoder: nn.Module) -> frozenset[int] | None:
    """Measure whether uneven examples laid end to end give the hidden states that each gives alone.

    Return the reaches of its windows and chunks in tokens, none where it has no such layers; None if it does not pack.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    lengths = [5, 9, 2, 9]
    own = [torch.randint(vocabulary, (1, 1, length), generator=generator) for length in lengths]
    batch = Batch(
        ids=torch.cat([nn.functional.pad(ids, (0, 9 - ids.shape[-1])) for ids in own]),
        labels=torch.full((len(lengths), 1, 9), -100),
        lengths=torch.tensor(lengths)[:, None],
    )
    plan = pack(batch, pad_id=0, fused=device.type != "cpu").to(device)
    assert plan.attention is not None
    with torch.no_grad():
        alone = [decoder(input_ids=ids[0].to(device), use_cache=False).last_hidden_state[0] for ids in own]
        try:
            with packed_attention(model, plan.attention) as attention:
                states = decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state
        except Exception as error:  # any architecture's own code may choke on a packed pass: padded ones it can do
            log.info("%s is trained on padded batches: %s", type(model).__name__, _describe(error))
            return None
    together = states[0]
    starts = {
        client: segment.start + place * segment.tokens
        for segment in plan.segments
        for place, client in enumerate(plan.order[segment.first : segment.stop].tolist())
    }
    worst = max(
        float((_wide(together[starts[client] : starts[client] + length]) - _wide(alone[client])).abs().max())
        for client, length in enumerate(lengths)
    )
    fits = worst <= _tolerance(together.dtype) * max(1.0, max(float(_wide(one).abs().max()) for one in alone))
    if not fits:
        log.info("%s is trained on padded batches: packed states differ by %.2g", type(model).__name__, worst)
    return frozenset(attention.reaches) if fits else None


def _sizes(given: Sequence[object]) -> list[int]:
    """Return the leading axes of a layer's input, those of size one left out."""
    x = given[0] if given else None
    return [size for size in x.shape[:-1] if size != 1] if isinstance(x, Tensor) else []


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _tolerance(dtype: torch.dtype) -> float:
    return 5e-2 if dtype == torch.bfloat16 else 1e-4


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
