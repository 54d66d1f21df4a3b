"""The work that speed is measured on: three bases, 8 clients each, prompts and answers of real lengths.

(a) GPT-2's shape with 6 layers, (b) a small Llama, both with random weights and the ids of Natural Instructions
written in their own vocabulary; (c) the small pretrained base `nano` on the text itself. (A) and (B) are (a) and (b)
with random ids of the same lengths: examples of a task then have no instruction in common. FedMira and the yardstick
get the same tokens.
"""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from fedmira.data.batches import ClientData, Encoded, Truncation
from fedmira.data.encode import encode_client
from fedmira.data.formats import read_records
from fedmira.data.partition import form_clients
from fedmira.data.templates import ALPACA
from fedmira.model.base.load import load_tokenizer

SHARED = Path(os.environ.get("FEDMIRA_TEST_DATA", "../shared"))
CLIENTS, STEPS, BATCH, LONGEST = 8, 5, 4, 256
GPT2_TARGETS: tuple[str, ...] = ("c_attn",)
LLAMA_TARGETS: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Unit:
    """One piece of work: a base folder, layers to adapt, and the clients' examples."""

    name: str
    title: str
    base: Path
    targets: tuple[str, ...]
    clients: tuple[ClientData, ...]


def _texts() -> list[ClientData]:
    """8 tasks of Natural Instructions, 20 examples each, as nano's tokenizer cuts them."""
    tokenizer = load_tokenizer(str(SHARED / "models/nano"))
    records = read_records(SHARED / "data/natural_instructions/tasks.jsonl.gz").records
    formed = form_clients(records, by="task", validation=0.0, test=0.0)
    every = np.linspace(0, len(formed) - 1, CLIENTS).astype(int)
    chosen = [encode_client(formed[k], tokenizer, template=ALPACA, max_length=LONGEST) for k in every]
    return [
        ClientData(c.id, c.name, c.group, c.columns, c.train[: STEPS * BATCH], c.test[:0], c.test[:0], Truncation())
        for c in chosen
    ]


def _other_vocabulary(clients: list[ClientData], vocabulary: int, *, alike: bool) -> tuple[ClientData, ...]:
    """Give the texts other ids; 0 stays the end of text.

    alike: one id for another, so that what examples have in common (the task's instruction) they keep in common;
    otherwise every id is drawn and the examples have only their lengths in common.
    """
    stream = np.random.default_rng(0)
    table = np.concatenate([[0], 1 + stream.permutation(vocabulary - 1)])

    def other(one: Encoded) -> Encoded:
        ids = table[list(one.ids)] if alike else stream.integers(1, vocabulary, len(one.ids))
        return Encoded(tuple(ids.tolist()), one.prompt_length, one.answers)

    return tuple(replace(client, train=tuple(other(one) for one in client.train)) for client in clients)


def random_base(config: GPT2Config | LlamaConfig, folder: Path) -> Path:
    """Save a base with random weights and a tokenizer that only needs an end of text."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        inner = Tokenizer(models.WordLevel({"<eos>": 0, "w": 1, "x": 2}, unk_token="w"))
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="w").save_pretrained(folder)
    return folder


def units(wanted: str = "abcAB") -> list[Unit]:
    """Make the units named by their letters; bases with random weights are in a temporary folder."""
    place = Path(tempfile.gettempdir()) / "fedmira-bench"
    texts = _texts()
    made = []
    for letter in wanted:
        alike = letter.islower()
        text = "ids of Natural Instructions" if alike else "random ids: examples share nothing"
        if letter in "aA":
            gpt2 = GPT2Config(n_layer=6, n_embd=768, n_head=12, vocab_size=50257, n_positions=512, eos_token_id=0)
            base, targets = random_base(gpt2, place / "gpt2"), GPT2_TARGETS
            title = f"GPT-2, 6 layers, d 768, V 50257 (82 M), {text}"
            made.append(Unit(letter, title, base, targets, _other_vocabulary(texts, 50257, alike=alike)))
        elif letter in "bB":
            llama = LlamaConfig(
                hidden_size=288,
                intermediate_size=768,
                num_hidden_layers=6,
                num_attention_heads=6,
                num_key_value_heads=6,
                vocab_size=32000,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                eos_token_id=0,
                bos_token_id=None,
            )
            base, targets = random_base(llama, place / "llama"), LLAMA_TARGETS
            title = f"Llama, 6 layers, d 288, V 32000 (15 M), {text}"
            made.append(Unit(letter, title, base, targets, _other_vocabulary(texts, 32000, alike=alike)))
        elif letter == "c":
            title = "nano: Llama, 6 layers, d 256, V 8192 (6.9 M), Natural Instructions"
            made.append(Unit("c", title, SHARED / "models/nano", LLAMA_TARGETS, tuple(texts)))
        else:
            raise ValueError(f"no unit '{letter}': there are a, b, c and, with random ids, A and B")
    return made


def real_tokens(clients: tuple[ClientData, ...] | list[ClientData]) -> int:
    """Unpadded tokens of one local phase: every example once."""
    return sum(len(one.ids) for client in clients for one in client.train)
