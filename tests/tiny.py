"""Tiny random language models, clients and adapters, and PEFT as the judge of one client at a time."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional

from fedmira.adapters import Adapters, Layout, lora_layout
from fedmira.data.batches import ClientData, Encoded, Truncation
from fedmira.model.base.load import Base, wrap

VOCABULARY = 23
END = 1  # end of text; 0 stands in for unknown words
POSITIONS = 64

# Grouped queries (4 heads share 2 keys), and a rotary base small enough that positions matter in short texts.
_ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": None,
}


# What each family is here for; those of PADDED cannot be laid end to end.
FAMILIES = {
    "gpt2": "Conv1D, biases, tied, dropouts of its own",
    "llama": "the plain one",
    "llama-tied": "embeddings that are the output head",
    "qwen2": "biases on queries, keys and values",
    "qwen3": "norms on queries and keys",
    "mistral": "a window shorter than the texts",
    "mixtral": "a mixture of experts",
    "gemma2": "capped logits, capped attention, every other layer with a window",
    "gemma3": "layers with a window and their own rotary base, norms on queries and keys",
    "phi": "rotary positions on a part of each head, biases, attention and MLP side by side",
    "phi3": "fused queries, keys and values, fused gate; a window",
    "gpt_neox": "fused queries, keys and values head by head",
    "opt": "learned positions with an offset, projections around the decoder",
    "granite": "scaled embeddings, residuals, attention and logits",
    "falcon": "linear layers of its own class, attention that asks for a mask",
    "bloom": "ALiBi: no positions but a slope per head",
    "mamba": "no attention at all",
}
PADDED = ("falcon", "bloom", "mamba")
# Their own attention takes its softmax in float32 whatever the model's dtype is, and in float64 its mask overflows.
DTYPES = {"gemma2": torch.float32, "bloom": torch.float32}
_PLAIN = {"vocab_size": VOCABULARY, "hidden_size": 16, "bos_token_id": None, "eos_token_id": END}
_LAYERS = _PLAIN | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}


def config(family: str, **others: Any) -> transformers.PretrainedConfig:
    """Make a small config of a family; `others` are settings of it to change."""
    kind, settings = _CONFIGS[family]
    return kind(**settings | others)


_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (
        transformers.GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_positions": POSITIONS,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "eos_token_id": END,
        },
    ),
    "llama": (transformers.LlamaConfig, _ROTARY),
    "llama-tied": (transformers.LlamaConfig, _ROTARY | {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, _ROTARY | {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, _ROTARY | {"head_dim": 4}),
    "mistral": (transformers.MistralConfig, _ROTARY | {"sliding_window": 4}),
    "mixtral": (transformers.MixtralConfig, _ROTARY | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma2": (
        transformers.Gemma2Config,
        _ROTARY | {"head_dim": 4, "final_logit_softcapping": 3.0, "sliding_window": 4, "attn_implementation": "eager"},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        _ROTARY | {"head_dim": 4, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": (transformers.PhiConfig, _ROTARY | {"partial_rotary_factor": 0.5}),
    "phi3": (transformers.Phi3Config, _ROTARY | {"pad_token_id": 0, "sliding_window": 4}),
    "gpt_neox": (transformers.GPTNeoXConfig, _LAYERS | {"intermediate_size": 20, "rotary_pct": 0.5}),
    "opt": (transformers.OPTConfig, _LAYERS | {"ffn_dim": 20, "word_embed_proj_dim": 12, "pad_token_id": 0}),
    "granite": (
        transformers.GraniteConfig,
        _ROTARY
        | {
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
        },
    ),
    "falcon": (transformers.FalconConfig, _LAYERS | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "bloom": (transformers.BloomConfig, _PLAIN | {"n_layer": 2, "n_head": 2, "pad_token_id": 0}),
    "mamba": (
        transformers.MambaConfig,
        _PLAIN | {"state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0, "use_mambapy": False},
    ),
    # Not among FAMILIES: their windows stand in the attention mask alone.
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        _ROTARY
        | {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
    ),
    "llama4": (
        transformers.Llama4TextConfig,
        _ROTARY
        | {
            "head_dim": 4,
            "intermediate_size_mlp": 20,
            "num_local_experts": 2,
            "moe_layers": [1],
            "attention_chunk_size": 16,
            "pad_token_id": 0,
        },
    ),
}


def model(
    family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **others: Any
) -> transformers.PreTrainedModel:
    """Make a model whose every weight and bias is random and large enough to matter."""
    made = transformers.AutoModelForCausalLM.from_config(config(family, **others)).to(torch.float64)
    made.set_experts_implementation("eager") if hasattr(made.config, "num_experts_per_tok") else None
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(made.named_parameters()):
            noise = torch.randn(value.shape, generator=stream, dtype=torch.float64)
            norm = any(word in name for word in ("norm", "ln_")) and name.endswith("weight")
            value.copy_(1 + 0.2 * noise if norm else 0.3 * noise)
    return made.to(dtype).eval()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word per id: w2 w3 ... ; end of text is </s>."""
    words = {"<unk>": 0, "</s>": END} | {f"w{word}": word for word in range(2, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")


def base(
    family: str, *, targets: Sequence[str] | str = "auto", dtype: torch.dtype = torch.float64, **others: Any
) -> Base:
    """Wrap a tiny model with stacked layers."""
    made = model(family, dtype=dtype, **others)
    return wrap(made, tokenizer(), name=family, targets=targets, fingerprint=family)


def layout(of: Base, rank: int) -> Layout:
    return lora_layout(of.shapes, rank)


def adapters(
    of: Layout, ranks: Sequence[int], *, alpha: float = 6.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Adapters:
    """Draw rows with A and B both random and non-zero, cut to each client's own rank."""
    stream = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(ranks), of.size, generator=stream, dtype=torch.float64) * 0.3
    own = torch.tensor(ranks)
    return Adapters(of, rows.to(dtype), own, (alpha / own.to(torch.float64)).to(dtype)).mask_()


def example(stream: np.random.Generator, length: int, *, answer: int) -> Encoded:
    """A random text of `length` ids, of which the last `answer` carry a label; the last is the end of text."""
    ids = [*stream.integers(2, VOCABULARY, length - 1).tolist(), END]
    return Encoded(tuple(ids), length - answer, (" ".join(f"w{word}" for word in ids[length - answer : -1]),))


def client(name: str, *, train: int, validation: int = 2, test: int = 2, seed: int = 0, longest: int = 9) -> ClientData:
    """A client with random texts of 3 to `longest` ids, from a stream of its own name."""
    stream = np.random.default_rng([seed, *name.encode()])

    def texts(count: int) -> tuple[Encoded, ...]:
        lengths = stream.integers(3, longest + 1, count)
        return tuple(example(stream, int(size), answer=int(stream.integers(1, size))) for size in lengths)

    return ClientData(
        id=name,
        name=name,
        group=None,
        columns={},
        train=texts(train),
        validation=texts(validation),
        test=texts(test),
        truncation=Truncation(),
    )


def peft_client(plain: transformers.PreTrainedModel, stack: Adapters, k: int, *, modules: Sequence[str]) -> Any:
    """Client k of a stack as PEFT sees it: a copy of the plain model with this client's factors, rank and alpha."""
    rank = int(stack.ranks[k])
    wanted = peft.LoraConfig(
        r=rank,
        lora_alpha=float(stack.scale[k]) * rank,
        target_modules=list(modules),
        lora_dropout=0.0,
        fan_in_fan_out=plain.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(copy.deepcopy(plain), wanted, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for first, second in stack.layout.part("lora").pairs():
            own_a, own_b = factors(made, first.module)
            own_a.copy_(stack.leaf(first)[k, :rank])
            own_b.copy_(stack.leaf(second)[k, :, :rank])
    return made


def factors(made: Any, module: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A [r, in] and B [out, r] of one module of a PEFT model."""
    layer = made.get_submodule(f"base_model.model.{module}")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def peft_row(made: Any, of: Layout, *, gradient: bool) -> Tensor:
    """The factors of a PEFT model, or their gradients, as a row [P], zero beyond its rank."""
    row = next(made.parameters()).new_zeros(of.size)
    for first, second in of.part("lora").pairs():
        for leaf, value in zip((first, second), factors(made, first.module), strict=True):
            found = value.grad if gradient else value.detach()
            assert found is not None
            place = row[leaf.start : leaf.stop].view(leaf.shape)
            place[: found.shape[0], : found.shape[1]] = found
    return row


def peft_loss(made: Any, examples: Sequence[Encoded]) -> Tensor:
    """Mean nats per labelled token over one client's examples, each alone and never padded."""
    nats = []
    for one in examples:
        logits = made(input_ids=torch.tensor([one.ids])).logits[0]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        targets = torch.tensor(one.ids[one.prompt_length :])
        nats.append(functional.cross_entropy(wide[one.prompt_length - 1 : -1], targets, reduction="none"))
    return torch.cat(nats).mean()
