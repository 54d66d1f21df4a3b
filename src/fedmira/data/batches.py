"""Examples as token ids, and batches of them with a leading client axis.

Axes: S clients of a batch, B examples per client, T tokens. Loss is taken on the answer and the end of text, and in
conversations also on the assistant's earlier turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedmira.errors import DataError, ShapeError

NO_LOSS = -100  # the label that cross-entropy ignores, as in transformers


@dataclass(frozen=True)
class Encoded:
    """One tokenised example: prompt, answer and end of text, at most `max_length` ids."""

    ids: tuple[int, ...]
    prompt_length: int  # the answer's labels start here; at least 1: there must be a token to predict from
    answers: tuple[str, ...]  # for scoring; in validation and test as they read once encoded and decoded
    own_question: tuple[int, ...] | None = None  # see `question`; None = the prompt of `ids`
    earlier: tuple[tuple[int, int], ...] = ()  # [start, stop) of labels in the prompt: the assistant's earlier turns
    written: str = ""  # what a model writes that gives exactly the trained ids; "" where nothing is scored
    around: tuple[str, str] = ("", "")  # of this, what the template writes before and after the answer
    closing: str = ""  # of what is before it: the end of a reasoning, which may be another one than in the data

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
    return full_epochs * count + remaining_steps * batch_size  # fewer batches than make an epoch: all are full
