"""Turn clients' records into token ids, and token ids into batches with a leading client axis.

Axes: S clients of a batch, B examples per client, T tokens. Loss is taken on the answer and the end of text, and in
conversations also on the assistant's earlier turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedmira.data.partition import Client, shown_name
from fedmira.data.templates import Rendered, Template
from fedmira.errors import DataError, ShapeError

NO_LOSS = -100  # the label that cross-entropy ignores, as in transformers


class Tokenizer(Protocol):
    """What this module needs of a tokenizer; every tokenizer of transformers has it."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...


@dataclass(frozen=True)
class Encoded:
    """One tokenised example: prompt, answer and end of text, at most `max_length` ids."""

    ids: tuple[int, ...]
    prompt_length: int  # the answer's labels start here; at least 1: there must be a token to predict from
    answers: tuple[str, ...]  # for scoring
    own_question: tuple[int, ...] | None = None  # see `question`; None = the prompt of `ids`
    earlier: tuple[
        tuple[int, int], ...
    ] = ()  # [start, stop) of labels inside the prompt: the assistant's earlier turns

    @property
    def question(self) -> tuple[int, ...]:
        """The prompt for generation; unlike the prompt in `ids`, its cut does not depend on the answer."""
        return self.ids[: self.prompt_length] if self.own_question is None else self.own_question

    @property
    def labelled(self) -> tuple[tuple[int, int], ...]:
        """All spans [start, stop) of `ids` that loss is taken on."""
        return (*self.earlier, (self.prompt_length, len(self.ids)))

    @property
    def labels(self) -> int:
        """Tokens that loss is taken on."""
        return sum(stop - start for start, stop in self.labelled)


def asking(prompt: Sequence[int], pad_id: int) -> Encoded:
    """Return an example that selects the state at a prompt's last token: an unused, labelled token follows it."""
    return Encoded((*prompt, pad_id), len(prompt), ())


@dataclass(frozen=True)
class Truncation:
    """What was cut or dropped to keep within `max_length`; counts of examples, which add up."""

    examples: int = 0  # all examples seen, including dropped ones
    prompts_cut: int = 0  # lost prompt tokens at the start
    answers_cut: int = 0  # lost the end of the answer, and the end of text
    questions_cut: int = 0  # of validation and test: lost tokens at the start of the prompt for generation
    dropped: int = 0  # left no room for a token to train on

    def __add__(self, other: "Truncation") -> "Truncation":
        return Truncation(
            self.examples + other.examples,
            self.prompts_cut + other.prompts_cut,
            self.answers_cut + other.answers_cut,
            self.questions_cut + other.questions_cut,
            self.dropped + other.dropped,
        )


@dataclass(frozen=True)
class ClientData:
    """A client with its examples as token ids."""

    id: str
    name: str
    group: str | None
    columns: Mapping[str, str]
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    truncation: Truncation  # over all three splits
    asked_otherwise: int = 0  # examples whose prompt for generation is not a prefix of them
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # column -> value -> training records with it

    @property
    def trained_tokens(self) -> int:
        """Labelled tokens of the training examples: answers and ends of text."""
        return sum(example.labels for example in self.train)

    @property
    def tokens(self) -> int:
        """All tokens of the training examples, prompts included."""
        return sum(len(example.ids) for example in self.train)


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of S clients, padded on the right to one shape."""

    ids: Tensor  # [S, B, T] int64
    labels: Tensor  # [S, B, T] int64, NO_LOSS on prompts and padding; not shifted: labels[t] is ids[t]
    lengths: Tensor  # [S, B] int64; 0 = an empty example, padding for a client with fewer


def encode_client(
    client: Client, tokenizer: Tokenizer, *, template: Template, max_length: int, max_question: int | None = None
) -> ClientData:
    """Tokenise all records of a client, cutting prompts at their start so that answers stay whole.

    An example is prompt ids, the first answer's ids, end of text; the pieces of a template are tokenised separately, so
    that labelled spans start and end at token boundaries. An example longer than `max_length` loses prompt ids at its
    start, after the tokenizer's leading ids (BOS); at least one stays. An answer that is still too long loses its end,
    and the end of text. max_question: largest length of a prompt for generation in tokens (None = max_length); it is
    cut in the same way, independently of the reference answer.
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
    prompts = _chats(shown, tokenizer, end) if template.complete else _prompts(shown, tokenizer, end)
    answers = [
        ids if template.complete and ids[-1:] == [end] else [*ids, end]
        for ids in _tokenize([rendered.answer for rendered in shown], tokenizer, special=False)
    ]
    fitted = [
        _fit(
            prompt,
            answer,
            max_length=max_length,
            max_question=None if index < len(client.train) else min(max_question or max_length, max_length),
            texts=record.answers,
        )
        for index, (prompt, answer, record) in enumerate(zip(prompts, answers, records, strict=True))
    ]
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


def encode_questions(
    shown: Sequence[Rendered], tokenizer: Tokenizer, template: Template, *, max_question: int | None
) -> list[list[int]]:
    """Tokenise prompts for generation, as `encode_client` does; max_question: None = nothing is cut."""
    end = tokenizer.eos_token_id or 0
    prompts = _chats(shown, tokenizer, end) if template.complete else _prompts(shown, tokenizer, end)
    questions = [prompt.ids if prompt.question is None else prompt.question for prompt in prompts]
    return [
        list(_cut(question, prompt.prefix, len(question) if max_question is None else max_question)[0])
        for question, prompt in zip(questions, prompts, strict=True)
    ]


@dataclass(frozen=True)
class _Prompt:
    """A prompt as ids, before it is cut."""

    ids: Sequence[int]
    prefix: int  # number of leading ids that are never cut
    trained: tuple[tuple[int, int], ...] = ()  # [start, stop) of earlier turns of the assistant
    question: Sequence[int] | None = None  # the prompt for generation, where it is another text


def _tokenize(texts: list[str], tokenizer: Tokenizer, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    try:
        # verbose=False: the warning about the model's longest sequence is premature, examples are cut afterwards
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise DataError(
            "the tokenizer cannot encode some of the examples; a vocabulary of words needs an unknown token (unk_token)"
        ) from error


def _prompts(shown: Sequence[Rendered], tokenizer: Tokenizer, end: int) -> list[_Prompt]:
    """Return prompts with the tokenizer's leading ids, and without an added end of text.

    The added ids are found by encoding one text with and without them: BOS and EOS may be the same id (GPT-2), so
    that an id alone does not say which it is. A prompt without ids becomes one end of text.
    """
    texts = [rendered.question for rendered in shown]
    prompts = _tokenize(texts, tokenizer, special=True)
    added = _tokenize([""], tokenizer, special=True)[0]
    suffix = int(len(added) > 1 and added[-1] == end)
    prefix = len(added) - suffix
    for probe in texts:
        plain = _tokenize([probe], tokenizer, special=False)[0]
        full = _tokenize([probe], tokenizer, special=True)[0]
        starts = [start for start in range(len(full)) if full[start : start + len(plain)] == plain]
        if plain and starts:
            prefix, suffix = starts[0], len(full) - starts[0] - len(plain)
            break
    for prompt in prompts:
        for _ in range(suffix):
            if len(prompt) > prefix and prompt[-1] == end:
                prompt.pop()
        if not prompt:
            prompt.append(end)
    return [_Prompt(prompt, prefix) for prompt in prompts]


def _chats(shown: Sequence[Rendered], tokenizer: Tokenizer, end: int) -> list[_Prompt]:
    """Tokenise conversations piece by piece: their special tokens are in the text; a leading BOS is never cut."""
    pieces = iter(_tokenize([part.text for rendered in shown for part in rendered.prompt], tokenizer, special=False))
    questions = _tokenize([rendered.question for rendered in shown], tokenizer, special=False)
    prompts = []
    for rendered, question in zip(shown, questions, strict=True):
        ids: list[int] = []
        trained = []
        for part in rendered.prompt:
            start = len(ids)
            ids += next(pieces)
            if part.trained and len(ids) > max(start, 1):
                trained.append((max(start, 1), len(ids)))
        prefix = int(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
        prompts.append(_Prompt(ids or [end], prefix, tuple(trained), question if question != ids else None))
    return prompts


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


def collate(
    examples: Sequence[Sequence[Encoded]], *, pad_id: int, batch_size: int | None = None, multiple: int = 1
) -> Batch:
    """Stack S clients' examples: B = batch_size, or the longest list; T = the longest example, up to a multiple.

    Raises ShapeError if there is no client, or a list is longer than `batch_size`.
    """
    longest = max((len(client_examples) for client_examples in examples), default=0)
    size = max(longest, 1) if batch_size is None else batch_size
    if not examples or longest > size:
        raise ShapeError(
            f"{len(examples)} clients with up to {longest} examples: need a client, and at most {size} examples each"
        )
    width = max((len(example.ids) for client_examples in examples for example in client_examples), default=1)
    shape = (len(examples), size, -(-width // multiple) * multiple)
    # filled in numpy: writing short lists into tensors takes nearly ten times as long
    ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, NO_LOSS, dtype=np.int64)
    lengths = np.zeros(shape[:2], dtype=np.int64)
    for client, client_examples in enumerate(examples):
        for index, example in enumerate(client_examples):
            length = len(example.ids)
            ids[client, index, :length] = example.ids
            for start, stop in example.labelled:
                labels[client, index, start:stop] = example.ids[start:stop]
            lengths[client, index] = length
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(lengths))


def local_batches(
    count: int, *, seed: int, round: int, key: int, batch_size: int, steps: int | None, epochs: int | None
) -> list[np.ndarray]:
    """Return the indices of the training examples of each local step, independent of where the client runs.

    Epoch e is default_rng([seed, round, key, e]).permutation(count), cut into batches, the last one smaller.
    Returned are `epochs` epochs, or the first `steps` batches of enough epochs. key: client_key of the client.
    Raises DataError unless there is an example, and exactly one of steps and epochs, at least 1.
    """
    length = steps if epochs is None else epochs
    if count < 1 or batch_size < 1 or (steps is None) == (epochs is None) or length is None or length < 1:
        raise DataError(
            f"local batches of {batch_size} from {count} examples, steps = {steps}, epochs = {epochs}: need "
            "an example, a batch size of at least 1, and exactly one of steps and epochs, at least 1"
        )
    per_epoch = -(-count // batch_size)
    passes = length if epochs is not None else -(-length // per_epoch)
    batches: list[np.ndarray] = []
    for epoch in range(passes):
        order = np.random.default_rng([seed, round, key, epoch]).permutation(count)
        batches += [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return batches if steps is None else batches[:steps]


def count_examples(count: int, *, batch_size: int, steps: int | None, epochs: int | None) -> int:
    """Return how many examples `local_batches` takes in one round, repeats counted."""
    if epochs is not None:
        return epochs * count
    per_epoch = -(-count // batch_size)
    full_epochs, remaining_steps = divmod(steps or 0, per_epoch)
    return full_epochs * count + min(remaining_steps * batch_size, count)
