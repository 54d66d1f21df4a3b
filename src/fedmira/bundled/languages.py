"""The demo's tasks: invented languages, so that everything about them is known and no model has seen them.

A family is a lexicon from 48 source words to target words of a pool common to all languages. A client speaks its
family's language except for a few private words, which it translates differently. A sentence is three source words;
the answer is their three translations in order.

Why it is built this way:
- Each family word is in the training data of exactly two members and in the test data of all: training alone cannot
  learn the others, because a lexicon, unlike a rule, does not generalise. They can only come from a neighbour.
- The prompt has one form and names neither family nor client: one averaged model cannot distinguish languages.
- Private words contradict the family, so averaging the family into one model is not the best answer either.

With the default sizes a client trains on 30 of the 48 words: 24 of its 42 family words and its 6 private ones. So
word accuracy is at most 30/48 = .625 for training alone and 42/48 = .875 for one model of the family.
All draws use numpy's seeded generator.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np

from fedmira.errors import DataError

SOURCE_COUNT = 48  # words of a sentence's prompt; the same for every language
TARGET_COUNT = 96  # pool of translations; twice the source words, so that private ones differ from the family's
SENTENCE_WORDS = 3
OPENING, CLOSING = "translate", ":"  # a prompt is opening, three source words, closing
FAMILY_NAMES = ("north", "east", "south", "west", "coast", "hill", "lake", "isle")

VOCABULARY_SEED = 11  # the bundled base knows these words: they do not depend on a run's seed
TASKS_STREAM, PRETRAINING_STREAM = 1, 2  # separate, so that no seed of the demo draws a language of pretraining
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Speaker:
    """A client: its whole lexicon (tested), the words it trains on, and those with private translations."""

    client: str
    lexicon: Mapping[str, str]
    seen: tuple[str, ...]
    private: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A language and its speakers; a speaker's lexicon differs from it in its private words only."""

    name: str
    lexicon: Mapping[str, str]
    speakers: tuple[Speaker, ...]


def source_words() -> tuple[str, ...]:
    """Return the 48 words that sentences are made of, such as `bado`; the same for every language and seed."""
    return _vocabulary()[0]


def target_words() -> tuple[str, ...]:
    """Return the pool of 96 translations, such as `molak`, that all languages draw from."""
    return _vocabulary()[1]


@cache
def _vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    rng = np.random.default_rng(VOCABULARY_SEED)
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    stems = [first + second for first in syllables for second in syllables if first != second]
    chosen = [stems[i] for i in rng.permutation(len(stems))[: SOURCE_COUNT + TARGET_COUNT]]
    endings = rng.integers(len(CONSONANTS), size=TARGET_COUNT)
    # Sources end in a vowel and targets in a consonant, so that a reader can distinguish them.
    targets = [stem + CONSONANTS[end] for stem, end in zip(chosen[SOURCE_COUNT:], endings, strict=True)]
    return tuple(chosen[:SOURCE_COUNT]), tuple(targets)


def draw_lexicon(rng: np.random.Generator) -> dict[str, str]:
    """Draw a language: 48 different targets of the pool for the 48 source words."""
    targets = target_words()
    order = rng.permutation(TARGET_COUNT)
    return {word: targets[i] for word, i in zip(source_words(), order, strict=False)}


def pretraining_languages(count: int) -> list[dict[str, str]]:
    """Draw the languages of pretraining: the demo's words, other lexicons, the same for every seed."""
    return [draw_lexicon(np.random.default_rng([PRETRAINING_STREAM, i])) for i in range(count)]


def prompt_of(words: Sequence[str]) -> str:
    """Return the prompt of a sentence, `translate w1 w2 w3 :`."""
    return " ".join([OPENING, *words, CLOSING])


def make_families(seed: int, *, families: int = 4, clients: int = 4, private_words: int = 6) -> list[Family]:
    """Draw the languages of the demo and who sees which word.

    private_words: words that one client translates differently, another set for every client of a family.
    A family word is seen by exactly two of the clients with the family's translation, dealt evenly.

    Raises DataError if the sizes do not fit the vocabulary.
    """
    most = min(SOURCE_COUNT, TARGET_COUNT - SOURCE_COUNT) // max(clients, 1)
    # A client's private words are not its family words: with three clients, two others share the word.
    if not (1 <= families <= len(FAMILY_NAMES) and clients >= 3 and 0 <= private_words <= most):
        raise DataError(
            f"families={families}, clients={clients}, private_words={private_words}: allowed are 1 to "
            f"{len(FAMILY_NAMES)} families, at least 3 clients in each and 0 to {most} private words for this "
            "number of clients; change the arguments of make_families"
        )
    rng = np.random.default_rng([TASKS_STREAM, seed])
    return [_draw_family(rng, name, clients, private_words) for name in FAMILY_NAMES[:families]]


def _draw_family(rng: np.random.Generator, name: str, clients: int, private_words: int) -> Family:
    lexicon = draw_lexicon(rng)
    used = set(lexicon.values())
    unused = [word for word in target_words() if word not in used]
    order = [source_words()[i] for i in rng.permutation(SOURCE_COUNT)]
    own_words = [order[k * private_words : (k + 1) * private_words] for k in range(clients)]
    free = iter(rng.permutation(len(unused)))
    translations = [{word: unused[next(free)] for word in words} for words in own_words]

    seen: list[set[str]] = [set(words) for words in own_words]
    shares = [(words, [m for m in range(clients) if m != k]) for k, words in enumerate(own_words)]
    shares.append((order[clients * private_words :], list(range(clients))))
    for words, members in shares:
        pairs = list(combinations(members, 2))
        turn = rng.permutation(len(pairs))
        for i, word in enumerate(words):
            for member in pairs[turn[i % len(pairs)]]:
                seen[member].add(word)
    speakers = (
        Speaker(
            f"{name}-{k + 1}",
            lexicon | translations[k],
            tuple(word for word in source_words() if word in seen[k]),
            tuple(own_words[k]),
        )
        for k in range(clients)
    )
    return Family(name, lexicon, tuple(speakers))


def make_tasks(
    seed: int,
    *,
    families: int = 4,
    clients: int = 4,
    private_words: int = 6,
    train: int = 160,
    validation: int = 32,
    test: int = 48,
) -> list[dict[str, str]]:
    """Make the rows of the demo: client, family, split, prompt, completion.

    train, validation, test: sentences per client. Training sentences use the client's seen words only; validation and
    test sentences use all 48, each equally often (16 sentences use every word once). No sentence is in two splits of a
    client.

    Raises DataError if a size does not fit the vocabulary, or a split is too small for every word to occur.
    """
    whole = SOURCE_COUNT // SENTENCE_WORDS
    if min(train, validation, test) < whole:
        raise DataError(
            f"train={train}, validation={validation}, test={test} sentences: each needs at least {whole}, so that "
            "every word occurs; increase the arguments of make_tasks"
        )
    rows: list[dict[str, str]] = []
    for family in make_families(seed, families=families, clients=clients, private_words=private_words):
        for speaker in family.speakers:
            # A separate stream for each client: another family or client does not change its sentences.
            rng = np.random.default_rng([TASKS_STREAM, seed, *speaker.client.encode()])
            taken: set[tuple[str, ...]] = set()
            # Held-out splits first: they must be balanced; training then avoids their sentences.
            held_out = {
                split: _draw_sentences(rng, source_words(), count, taken)
                for split, count in (("validation", validation), ("test", test))
            }
            sentences = {"train": _draw_sentences(rng, speaker.seen, train, taken)} | held_out
            for split, lines in sentences.items():
                for words in lines:
                    completion = " ".join(speaker.lexicon[word] for word in words)
                    rows.append(
                        {
                            "client": speaker.client,
                            "family": family.name,
                            "split": split,
                            "prompt": prompt_of(words),
                            "completion": completion,
                        }
                    )
    return rows


def _draw_sentences(
    rng: np.random.Generator, words: Sequence[str], count: int, taken: set[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Draw `count` new sentences of three different words, in repeated passes through all words; fills `taken`."""
    possible = len(words) * (len(words) - 1) * (len(words) - 2)
    if count > possible // 2:
        raise DataError(
            f"{count} sentences of {len(words)} words: at most {possible // 2} (half of all possible) can be drawn "
            "without repetition in reasonable time; use fewer sentences"
        )
    lines: list[tuple[str, ...]] = []
    while len(lines) < count:
        order = [words[i] for i in rng.permutation(len(words))]
        # One or two remaining words are completed by the first ones, so that every pass uses every word.
        order += order[: -len(order) % SENTENCE_WORDS]
        sentences = [tuple(order[i : i + SENTENCE_WORDS]) for i in range(0, len(order), SENTENCE_WORDS)]
        sentences = sentences[: count - len(lines)]
        # The whole pass is drawn again if one sentence is taken: dropping it would unbalance the words.
        if taken.isdisjoint(sentences):
            taken.update(sentences)
            lines.extend(sentences)
    return lines


def write_tasks(path: Path, seed: int, **sizes: int) -> Path:
    """Write `make_tasks(seed, **sizes)` as JSONL, the same bytes for the same arguments; returns the path."""
    text = "".join(json.dumps(row) + "\n" for row in make_tasks(seed, **sizes))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path
