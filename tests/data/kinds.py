"""Tokenizers of every kind, trained on a few lines, and chat templates of several forms, shared by tests of ids."""

import functools
import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The two and the two make four. Then the other one said: the end, is it not?",
    "Why is the sky blue? Because the air scatters the blue light more than the red.",
    "<|user|>\nHow are the others?\n<|assistant|>\nThey are well, thanks.\n### Response:\nThe answer is 42.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
] * 3
MARKS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")


def trained(core: Tokenizer, kind: str) -> Tokenizer:
    special = list(MARKS)
    trainer: Any
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "wordpiece":
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=220, special_tokens=special, unk_token="<unk>", initial_alphabet=["\n", "/", "|"]
        )
    lines = [line for text in CORPUS for line in text.split("\n")]
    core.train_from_iterator(CORPUS if kind == "bpe" else lines, trainer)
    return core


def byte_level(*, prefix: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    return trained(core, "bpe")


def sentence_pieces() -> models.BPE:
    """Merges of words and their leading spaces; a line break is a byte of its own, as in Llama's vocabulary."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    lines = [line for text in CORPUS for line in text.split("\n")]
    core.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, special_tokens=list(MARKS)))
    learned = json.loads(core.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(pair) for pair in learned["merges"]]
    return models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)


def metaspace(scheme: str) -> Tokenizer:
    core = Tokenizer(sentence_pieces())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    return core


def legacy() -> Tokenizer:
    """Llama's own: a normalizer puts a space before every stretch of text, also after a special token."""
    core = Tokenizer(sentence_pieces())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def wordpiece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return trained(core, "wordpiece")


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return trained(core, "unigram")


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(prefix=False),
    "byte-level, prefix space": lambda: byte_level(prefix=True),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "legacy prepend": legacy,
    "wordpiece": wordpiece,
    "unigram": unigram,
}
ADDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "single_word": {"single_word": True},
    "normalized": {"normalized": True},
}


@functools.cache
def tokenizer(kind: str, added: str, *, bos: bool) -> PreTrainedTokenizerFast:
    core = KINDS[kind]()
    special = added != "normalized"  # a special token is never normalized
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in MARKS[:3]])
    core.add_tokens([AddedToken(word, special=special, **ADDED[added]) for word in MARKS[3:]])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


CHATS = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "markers of text": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "generation marks": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[/INST]{% generation %}"
    " {{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}[INST] {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[/INST]{% endif %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimmed": "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
}
REASONING = (  # as Qwen3's: what was reasoned is shown in the last turn only
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' ~ m.name if m.name else '' }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content | trim }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING_ALWAYS = REASONING.replace(" and loop.last", "")
