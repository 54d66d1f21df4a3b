"""The work that speed is measured on: three bases, 8 clients each, prompts and answers of real lengths.

(a) GPT-2's shape with 6 layers, (b) a small Llama, both with random weights and random ids in the lengths of Natural
Instructions; (c) the small pretrained base `nano` on the text itself. FedMira and the yardstick get the same tokens.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from fedmira.data.batches import ClientData, Encoded, Truncation, encode_client
from fedmira.data.formats import read_records
from fedmira.data.partition import form_clients
from fedmira.data.templates import ALPACA
from fedmira.model.load import load_tokenizer

SHARED = Path(os.environ.get("FEDMIRA_TEST_DATA", "../shared"))
CLIENTS, STEPS, BATCH, LONGEST = 8, 5, 4, 256


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


def _same_lengths(clients: list[ClientData], vocabulary: int) -> list[ClientData]:
    """Replace ids by random ones of another vocabulary; 0 stays the end of text."""
    stream = np.random.default_rng(0)
    out = []
    for client in clients:
        train = tuple(
            Encoded(tuple(stream.integers(1, vocabulary, len(one.ids)).tolist()), one.prompt_length, one.answers)
            for one in client.train
        )
        out.append(ClientData(client.id, client.name, None, {}, train, (), (), Truncation()))
    return out


def _random_base(config: GPT2Config | LlamaConfig, folder: Path) -> Path:
    """Save a base with random weights and a tokenizer that nothing is asked of but an end of text."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        inner = Tokenizer(models.WordLevel({"<eos>": 0, "w": 1, "x": 2}, unk_token="w"))
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="w").save_pretrained(folder)
    return folder


def units(wanted: str = "abc") -> list[Unit]:
    """Make the units named by their letters; bases with random weights lie in a temporary folder."""
    place = Path(tempfile.gettempdir()) / "fedmira-bench"
    texts = _texts()
    made = []
    if "a" in wanted:
        gpt2 = GPT2Config(n_layer=6, n_embd=768, n_head=12, vocab_size=50257, n_positions=512, eos_token_id=0)
        base = _random_base(gpt2, place / "gpt2")
        clients = tuple(_same_lengths(texts, 50257))
        made.append(Unit("a", "GPT-2, 6 layers, d 768, V 50257 (82 M)", base, ("c_attn",), clients))
    if "b" in wanted:
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
        base = _random_base(llama, place / "llama")
        made.append(
            Unit(
                "b",
                "Llama, 6 layers, d 288, V 32000 (15 M)",
                base,
                ("q_proj", "v_proj"),
                tuple(_same_lengths(texts, 32000)),
            )
        )
    if "c" in wanted:
        title = "nano: Llama, 6 layers, d 256, V 8192 (6.9 M), on its own text"
        made.append(Unit("c", title, SHARED / "models/nano", ("q_proj", "v_proj"), tuple(texts)))
    return made


def real_tokens(clients: tuple[ClientData, ...] | list[ClientData]) -> int:
    """Unpadded tokens of one local phase: every example once."""
    return sum(len(one.ids) for client in clients for one in client.train)
