"""Bases with random weights in the shape of Qwen2.5 (arXiv:2412.15115, table 1), and texts of random ids."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from fedmira.data.batches import ClientData, Encoded, Truncation

RESPONSE = 5  # of so many tokens of a text one has a label
WORDS = 1000  # that the tokenizer knows; ids of texts are drawn from the whole vocabulary


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. width d, inner f of a block's MLP, layers L, vocabulary V."""

    width: int
    inner: int
    layers: int
    heads: int
    groups: int  # of heads with their own keys and values
    vocabulary: int
    tied: bool  # one matrix for embeddings and head

    @property
    def linear(self) -> int:
        """Weights of the blocks' linear layers: those that are adapted, and stored in 4 bits if so asked."""
        keys = 2 * self.width * self.width * self.groups // self.heads
        return self.layers * (2 * self.width**2 + keys + 3 * self.width * self.inner)

    @property
    def embeddings(self) -> int:
        return (1 if self.tied else 2) * self.vocabulary * self.width


SHAPES = {
    "tiny": Shape(32, 64, 2, 4, 2, 2_048, tied=True),
    "50M": Shape(512, 2_048, 12, 8, 2, 8_192, tied=True),
    "0.5B": Shape(896, 4_864, 24, 14, 2, 151_936, tied=True),
    "1.5B": Shape(1_536, 8_960, 28, 12, 2, 151_936, tied=True),
    "3B": Shape(2_048, 11_008, 36, 16, 2, 151_936, tied=True),
    "8B": Shape(4_096, 14_336, 32, 32, 8, 128_256, tied=False),  # the sizes of Llama 3.1 8B
}


def make_base(name: str, folder: Path) -> Path:
    """Save a base of that shape in bfloat16, in files of 500 MB, once; return its folder."""
    place = folder / name
    if (place / "tokenizer.json").is_file():
        return place
    shape = SHAPES[name]
    config = Qwen2Config(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        vocab_size=shape.vocabulary,
        max_position_embeddings=32_768,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place, max_shard_size="500MB")
    words = {"<eos>": 0, **{f"w{number}": number for number in range(1, WORDS)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="w1").save_pretrained(place)
    return place


def make_clients(vocabulary: int, *, count: int, length: int) -> tuple[ClientData, ...]:
    """Return clients with one text each, of random ids; the last fifth of it (RESPONSE) has labels."""
    stream = np.random.default_rng(0)
    texts = [tuple(stream.integers(1, vocabulary, length).tolist()) for _ in range(count)]
    examples = [Encoded(text, length - length // RESPONSE, ("",)) for text in texts]
    return tuple(
        ClientData(f"c{k}", f"c{k}", None, {}, (example,), (), (), Truncation()) for k, example in enumerate(examples)
    )
