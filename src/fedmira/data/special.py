"""Special tokens written in the texts of the data: counted, and read as plain text where that is asked for.

A tokenizer reads `</s>` or `<|im_end|>` within a text as that control token, as where a template writes it. With
`data.special_tokens: text` only those of the template are control tokens: those of the data are escaped before the
template shows them, and such a text is encoded by a copy of the tokenizer that has other names for its special tokens.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmira.data.formats import Record, Turn
from fedmira.data.templates import Rendered, Template
from fedmira.errors import DataError

ESCAPE = "\ue002"  # a private-use character within the name of a special token: then it is text
_ALIAS = "\ue003{}\ue003"  # the name of special token number {} in the copy


def special_names(tokenizer: Any) -> tuple[str, ...]:
    """Return the special tokens of a tokenizer as texts, the longest first; not those that are merely added."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda name: (-len(name), name)))


def count_special(records: Iterable[Record], names: Sequence[str]) -> dict[str, int]:
    """Return in how many records each special token is written in a text that a model sees."""
    find = _finder(names)
    counts = Counter(name for record in records for name in {*find("\n".join(_texts(record)))})
    return dict(counts.most_common())


def as_text(template: Template, tokenizer: Any) -> tuple[Template, Any]:
    """Return a template and a tokenizer for which special tokens written in the data are text.

    Raises DataError for a tokenizer that is not of the tokenizers library.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"data.special_tokens 'text': the base's tokenizer ({type(tokenizer).__name__}) cannot tell special tokens "
            "from text; use control, or a base with a tokenizer.json"
        )
    names = special_names(tokenizer)
    escape = functools.partial(_escape, pattern=_pattern(names))

    def render(record: Record) -> Rendered:
        return template.render(_map_texts(record, escape))

    return replace(template, render=render, escape=escape), _TextTokenizer(tokenizer, names)


def _escape(text: str, *, pattern: re.Pattern[str]) -> str:
    if ESCAPE in text or _ALIAS[0] in text:
        raise DataError("a text of the data contains private-use characters (U+E002, U+E003); remove them")
    return pattern.sub(lambda found: f"{found[0][0]}{ESCAPE}{found[0][1:]}", text)


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in names) or "(?!)")


def _finder(names: Sequence[str]) -> Callable[[str], list[str]]:
    return _pattern(names).findall


def _texts(record: Record) -> list[str]:
    """Return the texts of a record that a model sees."""
    turns = [text for turn in record.turns for text in (turn.text, *turn.more.values())]
    return [record.instruction, record.input, *record.answers, *turns, *record.more.values()]


def _map_texts(record: Record, change: Callable[[str], str]) -> Record:
    def more(texts: Mapping[str, str]) -> dict[str, str]:
        return {key: change(text) for key, text in texts.items()}

    def turn(old: Turn) -> Turn:
        return replace(old, text=change(old.text), more=more(old.more))

    return replace(
        record,
        instruction=change(record.instruction),
        input=change(record.input),
        answers=tuple(map(change, record.answers)),
        turns=tuple(map(turn, record.turns)),
        more=more(record.more),
    )


@dataclass(frozen=True, eq=False)
class _TextTokenizer:
    """A tokenizer that encodes texts with escaped special tokens by a copy in which these are not special."""

    tokenizer: Any
    names: Sequence[str]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: list[str], *, add_special_tokens: bool, **options: Any) -> dict[str, list[list[int]]]:
        ids = dict(self.tokenizer(texts, add_special_tokens=add_special_tokens, **options))["input_ids"]
        escaped = [index for index, text in enumerate(texts) if ESCAPE in text]
        if escaped:
            renamed = [self._rename(texts[index]) for index in escaped]
            encoded = self._copy.encode_batch(renamed, add_special_tokens=add_special_tokens)
            for index, encoding in zip(escaped, encoded, strict=True):
                ids[index] = encoding.ids
        return {"input_ids": ids}

    def _rename(self, text: str) -> str:
        numbers = {name: _ALIAS.format(number) for number, name in enumerate(self.names)}
        return _pattern(self.names).sub(lambda found: numbers[found[0]], text).replace(ESCAPE, "")

    @functools.cached_property
    def _copy(self) -> Any:
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        numbers = {name: _ALIAS.format(number) for number, name in enumerate(self.names)}
        for token in state["added_tokens"]:
            token["content"] = numbers.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {numbers.get(token, token): id for token, id in model["vocab"].items()}
        else:  # Unigram
            model["vocab"] = [[numbers.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in numbers:
            model["unk_token"] = numbers[model["unk_token"]]
        copy = Tokenizer.from_str(json.dumps(state))
        copy.no_padding()
        copy.no_truncation()
        return copy
