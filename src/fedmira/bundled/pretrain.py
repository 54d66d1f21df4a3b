"""Train the demo's base model again: `python -m fedmira.bundled.pretrain [--out DIR]`, under a minute on one core.

The base is a Llama of two layers (width 96, 4 heads, a quarter of a million parameters) over a word-level vocabulary:
the source and target words of `languages`, a tag for each of its 64 languages, and three special tokens. It learns to
translate three-word sentences; none of the languages is spoken in the demo:

    <lang07> kuva sebe fadi :  ->  nugor pupob kutak <eos>

Half of the sentences start with `translate`, like the demo's prompts, instead of the tag. Then the language is not
known, so that the base learns to look up (the i-th answer attends to the i-th source word) and to hedge over the 64
lexicons, but nothing about the demo's languages: on them it is as accurate as random guessing.

Written to DIR: model.safetensors (float32), config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
and sha256.json with the sha256 of each of them. The same machine, torch and transformers give the same bytes; another
processor may round differently, so the recorded hashes show whether the files are those of the release, not whether
the training was correct.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmira.bundled import MODEL_PATH
from fedmira.bundled.languages import (
    CLOSING,
    OPENING,
    SENTENCE_WORDS,
    pretraining_languages,
    source_words,
    target_words,
)

LANGUAGES = 64  # of pretraining: enough for the hedge over them to cover most of the pool for every word
UNTAGGED = 0.5  # share of sentences without a tag, as in the demo's prompts
STEPS, BATCH = 1200, 128
LEARNING_RATE, WARM_UP = 3e-3, 50  # AdamW; linear warm-up in steps, then a cosine to LEARNING_RATE / 50
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
PROMPT_TOKENS = SENTENCE_WORDS + 2  # opening or tag, words, closing
SEED = 0


def build_tokenizer() -> Any:
    """Return the word-level tokenizer: every word of the demo is one token, anything else is <unk>."""
    tags = [f"<lang{i:02d}>" for i in range(LANGUAGES)]
    words = [PAD, END, UNKNOWN, OPENING, CLOSING, *source_words(), *target_words(), *tags]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary: dict[str, int]) -> Any:
    """Return the untrained base, drawn from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=vocabulary[PAD],
        eos_token_id=vocabulary[END],
        bos_token_id=None,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def sentence_source(vocabulary: dict[str, int]) -> Callable[[int, float, torch.Generator], Tensor]:
    """Return draw(batch, untagged, generator) -> token ids [batch, 9]: prompt, three translations, <eos>."""
    words = torch.tensor([vocabulary[word] for word in source_words()])
    taught = pretraining_languages(LANGUAGES)
    lexicons = torch.tensor([[vocabulary[language[word]] for word in source_words()] for language in taught])
    first_tag = vocabulary["<lang00>"]

    def draw(batch: int, untagged: float, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(batch, len(words), generator=generator).argsort(1)[:, :SENTENCE_WORDS]
        language = torch.randint(LANGUAGES, (batch, 1), generator=generator)
        hidden = torch.rand(batch, 1, generator=generator) < untagged
        opening = torch.where(hidden, vocabulary[OPENING], language + first_tag)
        closing = torch.full((batch, 1), vocabulary[CLOSING])
        end = torch.full((batch, 1), vocabulary[END])
        return torch.cat([opening, words[chosen], closing, lexicons[language, chosen], end], dim=1)

    return draw


def answer_loss(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over the answers' tokens, <eos> included; tokens [B, T]."""
    logits = model(input_ids=tokens[:, :-1]).logits[:, PROMPT_TOKENS - 1 :]
    return cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT_TOKENS:].flatten())


def pretrain(steps: int = STEPS, *, report: Callable[[str], None] = print) -> tuple[Any, Any]:
    """Train the base; returns (model, tokenizer) and passes losses to `report`, the final one by kind of prompt."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    model = build_model(vocabulary)
    draw = sentence_source(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def schedule(step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * cosine)

    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(1, steps + 1):
        loss = answer_loss(model, draw(BATCH, UNTAGGED, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 200 == 0:
            report(f"step {step} of {steps}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        tagged = answer_loss(model, draw(2048, 0.0, generator)).item()
        untagged = answer_loss(model, draw(2048, 1.0, generator)).item()
    report(f"final pretraining loss: {tagged:.3f} nats a token with the language's tag, {untagged:.3f} without")
    return model, tokenizer


def record_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of the model folder except sha256.json."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "sha256.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Train, save, record the hashes, and print what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m fedmira.bundled.pretrain", description="Train the demo's base again."
    )
    parser.add_argument("--out", type=Path, default=MODEL_PATH, help="folder to write (default: the bundled one)")
    out: Path = parser.parse_args().out
    started = time.monotonic()
    torch.set_num_threads(1)  # a second thread would split sums differently and change bits
    model, tokenizer = pretrain()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors makes files readable by the owner only, and a wheel keeps the mode
    hashes = record_hashes(out)
    (out / "sha256.json").write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    size_mb = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"wrote {', '.join(hashes)} and sha256.json to {out}: {size_mb:.2f} MB, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
