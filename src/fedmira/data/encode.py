"""Turn clients' records into token ids: a whole text is encoded at once, and labelled spans are found in its ids.

A tokenizer looks at what precedes a piece of text: after `<|assistant|>` and a line break it may write `T he`, and at
the start of a text ` The`. So the ids of an example are those of its whole text, and not of pieces of it. One thing
comes before that: the prompt that is trained on is, to the token, the prompt that the model is asked with. Where a
tokenizer would join the end of the prompt and the start of the answer in one token, the prompt stays as it is asked,
and the answer goes on after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedmira.data.batches import ClientData, Encoded, Truncation
from fedmira.data.partition import Client
from fedmira.data.templates import Rendered, Template, common_length
from fedmira.errors import DataError
from fedmira.names import shown_name

ANCHORS = ("\n", ".", ":", "a ")  # texts that an answer is encoded after, where it cannot be encoded after its prompt


class Tokenizer(Protocol):
    """What this module needs of a tokenizer; every tokenizer of transformers has it."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def unk_token_id(self) -> int | None: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...


def encode_client(
    client: Client, tokenizer: Tokenizer, *, template: Template, max_length: int, max_question: int | None = None
) -> ClientData:
    """Tokenise all records of a client, cutting prompts at their start so that answers stay whole.

    An example is prompt ids, the first answer's ids, end of text. One that is longer than `max_length` loses prompt ids
    at its start, after the tokenizer's leading ids (BOS); at least one stays. An answer that is still too long loses
    its end, and the end of text. max_question: largest length of a prompt for generation in tokens (None = max_length);
    it is cut in the same way, independently of the reference answer.
    Raises DataError: a tokenizer without an end of text, max_length below 1, a record that the template cannot render,
    or no training example left.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-text token (eos_token), so answers could not end; set one")
    if max_length < 1:
        raise DataError(f"data.max_length = {max_length}: must be at least 1")
    records = [*client.train, *client.validation, *client.test]
    shown = [template.render(record) for record in records]
    prompts = _encode(shown, tokenizer, template, end)
    answers = [_ended(prompt.answer, end) for prompt in prompts]
    scored = range(len(client.train), len(records))
    fitted = [
        _fit(
            prompt,
            answer,
            max_length=max_length,
            max_question=min(max_question or max_length, max_length) if index in scored else None,
            texts=record.answers,
        )
        for index, (prompt, answer, record) in enumerate(zip(prompts, answers, records, strict=True))
    ]
    for index in scored:
        example, counts = fitted[index]
        if example is not None:
            written = tokenizer.decode(answers[index][:-1], skip_special_tokens=True)
            before, after = (_readable(text, tokenizer) for text in shown[index].around)
            references = tuple(_readable(template.escape(text), tokenizer) for text in example.answers)
            closing = _readable(shown[index].closing, tokenizer) if shown[index].closing else ""
            example = replace(example, answers=references, written=written, around=(before, after), closing=closing)
            fitted[index] = example, counts
    after_train = len(client.train)
    after_validation = after_train + len(client.validation)
    splits = (fitted[:after_train], fitted[after_train:after_validation], fitted[after_validation:])
    train, validation, test = (tuple(example for example, _ in part if example is not None) for part in splits)
    if not train:
        raise DataError(
            f"client '{shown_name(client.name)}': no training example keeps a token to train on at data.max_length = "
            f"{max_length} ({len(client.train)} dropped); raise it"
        )
    return ClientData(
        id=client.id,
        name=client.name,
        group=client.group,
        columns=client.columns,
        counts=client.counts,
        train=train,
        validation=validation,
        test=test,
        truncation=sum((counts for _, counts in fitted), Truncation()),
        asked_otherwise=sum(not rendered.begins for rendered in shown),
    )


def _ended(answer: Sequence[int], end: int) -> list[int]:
    """Return an answer with one end of text, whether or not the data writes it."""
    while answer[-1:] == [end]:
        answer = answer[:-1]
    return [*answer, end]


def encode_questions(
    shown: Sequence[Rendered], tokenizer: Tokenizer, template: Template, *, max_question: int | None
) -> list[list[int]]:
    """Tokenise prompts for generation, as `encode_client` does; max_question: None = nothing is cut."""
    end = tokenizer.eos_token_id or 0
    prompts = _encode(shown, tokenizer, template, end)
    questions = [prompt.ids if prompt.question is None else prompt.question for prompt in prompts]
    return [
        list(_cut(question, prompt.prefix, len(question) if max_question is None else max_question)[0])
        for question, prompt in zip(questions, prompts, strict=True)
    ]


@dataclass(frozen=True)
class _Prompt:
    """A prompt as ids, before it is cut, and the answer's ids after it."""

    ids: Sequence[int]
    prefix: int  # number of leading ids that are never cut
    answer: Sequence[int] = ()  # without an end of text that the text does not have
    trained: tuple[tuple[int, int], ...] = ()  # [start, stop) of earlier turns of the assistant
    question: Sequence[int] | None = None  # the prompt for generation, where it is another text


def _readable(text: str, tokenizer: Tokenizer) -> str:
    """Return a text as it reads once it was encoded and decoded, without special tokens.

    A text with words that the tokenizer does not know, which would vanish, is returned as it is; so is one of which
    nothing would be left.
    """
    (ids,) = _tokenize([text], tokenizer, special=False)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id and unknown in ids:
        return text
    return tokenizer.decode(ids, skip_special_tokens=True) or text


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    try:
        # verbose=False: the warning about the model's longest sequence is premature, examples are cut afterwards
        return tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise DataError(
            "the tokenizer cannot encode some of the examples; a vocabulary of words needs an unknown token (unk_token)"
        ) from error


@dataclass(frozen=True)
class _Encoder:
    """Encodes whole texts. Templates that are not complete get the tokenizer's leading ids, and no end of text.

    first: ids that the tokenizer puts before a text; suffix: how many it puts after one.
    """

    tokenizer: Tokenizer
    special: bool
    first: tuple[int, ...]
    suffix: int
    end: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = _tokenize(texts, self.tokenizer, special=self.special)
        bos = self.tokenizer.bos_token_id
        first = self.first if self.special else () if bos is None else (bos,)
        for ids in encoded:
            for _ in range(self.suffix):
                if len(ids) > len(self.first) and ids[-1] == self.end:
                    ids.pop()
            while first and tuple(ids[: 2 * len(first)]) == 2 * first:  # the text has them too
                del ids[: len(first)]
            if not self.special:  # the data end a turn that the template ends too
                ids[:] = [id for index, id in enumerate(ids) if index == 0 or id != self.end or ids[index - 1] != id]
        return encoded

    def protected(self, ids: Sequence[int]) -> int:
        """Return how many leading ids are never cut: the tokenizer's, or a BOS that the text begins with."""
        bos = self.tokenizer.bos_token_id
        return len(self.first) if self.special else int(bos is not None and list(ids[:1]) == [bos])

    def after(self, answer: str) -> list[int]:
        """Encode an answer that goes on after other text, as it is where that text ends at a token's end."""
        for anchor in ANCHORS:
            alone, both = _tokenize([anchor, anchor + answer], self.tokenizer, special=False)
            if both[: len(alone)] == alone:
                return both[len(alone) :]
        return _tokenize([answer], self.tokenizer, special=False)[0]


def _encoder(texts: Sequence[str], tokenizer: Tokenizer, *, complete: bool, end: int) -> _Encoder:
    """Find what the tokenizer puts around texts, by encoding one with and without it.

    BOS and EOS may be the same id (GPT-2), so that an id alone does not say which it is.
    """
    if complete:
        return _Encoder(tokenizer, False, (), 0, end)
    added = _tokenize([""], tokenizer, special=True)[0]
    suffix = int(len(added) > 1 and added[-1] == end)
    first = added[: len(added) - suffix]
    for probe in texts:
        plain = _tokenize([probe], tokenizer, special=False)[0]
        full = _tokenize([probe], tokenizer, special=True)[0]
        starts = [start for start in range(len(full)) if full[start : start + len(plain)] == plain]
        if plain and starts:
            first, suffix = full[: starts[0]], len(full) - starts[0] - len(plain)
            break
    return _Encoder(tokenizer, True, tuple(first), suffix, end)


def _encode(shown: Sequence[Rendered], tokenizer: Tokenizer, template: Template, end: int) -> list[_Prompt]:
    """Encode examples: prompt, answer, the assistant's earlier turns; a prompt without ids becomes one end of text."""
    encode = _encoder([rendered.question for rendered in shown], tokenizer, complete=template.complete, end=end)
    texts = ["".join(part.text for part in rendered.prompt) for rendered in shown]
    prompts = encode(texts)
    wholes = encode([text + rendered.answer for text, rendered in zip(texts, shown, strict=True)])
    others = [index for index, rendered in enumerate(shown) if rendered.question != texts[index]]
    questions = dict(zip(others, encode([shown[index].question for index in others]), strict=True))
    return [
        _place(rendered, text, prompt, whole, questions.get(index), encode)
        for index, (rendered, text, prompt, whole) in enumerate(zip(shown, texts, prompts, wholes, strict=True))
    ]


def _place(
    rendered: Rendered,
    text: str,
    prompt: list[int],
    whole: list[int],
    question: list[int] | None,
    encode: _Encoder,
) -> _Prompt:
    """Split the ids of a whole example where its prompt ends, and find the assistant's earlier turns in it."""
    answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else encode.after(rendered.answer)
    cuts, position = [], 0
    for part in rendered.prompt:
        if part.trained:
            cuts += [position, position + len(part.text)]
        position += len(part.text)
    trained = []
    before = encode([text[:cut] for cut in cuts])
    for start, stop in zip(before[::2], before[1::2], strict=True):
        # where a prefix of the text differs, one token reaches across the place where the text was cut
        first, last = max(common_length(start, prompt), 1), common_length(stop, prompt)
        last += int(stop != prompt[: len(stop)])
        if first < last:
            trained.append((first, min(last, len(prompt))))
    ids = prompt or [encode.end]
    return _Prompt(ids, encode.protected(prompt), answer, tuple(trained), question if question != ids else None)


def _fit(
    prompt: _Prompt, answer: Sequence[int], *, max_length: int, max_question: int | None, texts: tuple[str, ...]
) -> tuple[Encoded | None, Truncation]:
    """Cut one example to max_length. Returns None if no answer token is left, and what was cut.

    max_question: None for an example that no answer is generated for.
    """
    cut_answer = answer[: max_length - 1]
    if not cut_answer:
        return None, Truncation(examples=1, dropped=1)
    cut_prompt, removed = _cut(prompt.ids, prompt.prefix, max_length - len(cut_answer))
    first = max(prompt.prefix, 1)  # index of the first id after a cut; id 0 has no label
    moved = [(max(start - removed, first if removed else 1), stop - removed) for start, stop in prompt.trained]
    own_question, questions_cut = None, 0
    if max_question is not None:
        whole = prompt.ids if prompt.question is None else prompt.question
        question, lost = _cut(whole, prompt.prefix, max_question)
        questions_cut = int(lost > 0)
        own_question = tuple(question) if prompt.question is not None or len(question) != len(cut_prompt) else None
    example = Encoded(
        ids=(*cut_prompt, *cut_answer),
        prompt_length=len(cut_prompt),
        answers=texts,
        own_question=own_question,
        earlier=tuple((start, stop) for start, stop in moved if start < stop),
    )
    return example, Truncation(
        examples=1,
        prompts_cut=int(removed > 0),
        answers_cut=int(len(cut_answer) < len(answer)),
        questions_cut=questions_cut,
    )


def _cut(prompt: Sequence[int], prefix: int, room: int) -> tuple[Sequence[int], int]:
    """Keep `room` ids of a prompt, its prefix (BOS) and its last ones; return them and the number removed."""
    if len(prompt) <= room:
        return prompt, 0
    first = prompt[: min(prefix, room)]
    return [*first, *prompt[len(prompt) - (room - len(first)) :]], len(prompt) - room
