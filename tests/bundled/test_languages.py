"""The demo's tasks are what the demo says they are."""

import hashlib
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.bundled.languages import (
    TARGET_COUNT,
    Family,
    make_families,
    make_tasks,
    pretraining_languages,
    source_words,
    target_words,
    write_tasks,
)
from fedmira.errors import DataError

Row = dict[str, str]
SEEDS = st.integers(min_value=0, max_value=2**32)


def words_of(row: Row) -> list[str]:
    """The three source words: the prompt is `translate w1 w2 w3 :`."""
    return row["prompt"].split()[1:-1]


def pairs_in(rows: list[Row], client: str, split: str) -> set[tuple[str, str]]:
    """Every (source, translation) a client's split contains."""
    chosen = [row for row in rows if (row["client"], row["split"]) == (client, split)]
    return {pair for row in chosen for pair in zip(words_of(row), row["completion"].split(), strict=True)}


def agreement(first: dict[str, str], second: dict[str, str]) -> float:
    return sum(first[word] == second[word] for word in source_words()) / len(source_words())


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make_tasks(0)


@pytest.fixture(scope="module")
def families() -> list[Family]:
    return make_families(0)


def test_there_are_four_families_of_four_clients(rows: list[Row]) -> None:
    members = Counter(family for _, family in {(row["client"], row["family"]) for row in rows})
    assert list(members.values()) == [4, 4, 4, 4]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first = write_tasks(tmp_path / "a.jsonl", 3).read_bytes()
    assert first == write_tasks(tmp_path / "deeper" / "b.jsonl", 3).read_bytes()


def test_the_bytes_of_seed_zero_are_the_released_ones(tmp_path: Path) -> None:
    # Published results name these tasks by seed: a change here is a change of the benchmark.
    digest = hashlib.sha256(write_tasks(tmp_path / "tasks.jsonl", 0).read_bytes()).hexdigest()
    assert digest == "ac0a6178be22b8ec3b9b7ab79668b202332775b5a84dee45a6fbb14b7b6de198"


def test_another_seed_makes_other_tasks(rows: list[Row]) -> None:
    assert make_tasks(1) != rows


def test_a_written_line_is_a_row(tmp_path: Path, rows: list[Row]) -> None:
    lines = write_tasks(tmp_path / "tasks.jsonl", 0).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_another_family_does_not_change_the_sentences_of_others() -> None:
    assert make_tasks(5, families=3) == [row for row in make_tasks(5) if row["family"] != "west"]


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, private_words=st.integers(min_value=0, max_value=12))
def test_each_family_word_is_in_the_training_data_of_exactly_two_members(seed: int, private_words: int) -> None:
    rows = make_tasks(seed, private_words=private_words)
    for family in make_families(seed, private_words=private_words):
        taught = [pairs_in(rows, speaker.client, "train") for speaker in family.speakers]
        readers = [sum(pair in pairs for pairs in taught) for pair in family.lexicon.items()]
        assert readers == [2] * 48


def test_every_client_sees_its_private_words_in_training(rows: list[Row], families: list[Family]) -> None:
    for speaker in (speaker for family in families for speaker in family.speakers):
        own = {(word, speaker.lexicon[word]) for word in speaker.private}
        assert own <= pairs_in(rows, speaker.client, "train")


def test_every_client_trains_on_thirty_words(families: list[Family]) -> None:
    assert {len(speaker.seen) for family in families for speaker in family.speakers} == {30}


@pytest.mark.parametrize(("split", "times"), [("validation", 2), ("test", 3)])
def test_every_word_occurs_equally_often_for_every_client(rows: list[Row], split: str, times: int) -> None:
    asked = Counter((row["client"], word) for row in rows if row["split"] == split for word in words_of(row))
    assert asked == {(client, word): times for client in {row["client"] for row in rows} for word in source_words()}


def test_a_sentence_has_three_different_words(rows: list[Row]) -> None:
    assert {len(set(words_of(row))) for row in rows} == {3}


def test_no_sentence_of_a_client_occurs_twice(rows: list[Row]) -> None:
    assert max(Counter((row["client"], row["prompt"]) for row in rows).values()) == 1


def test_answers_are_the_clients_translations_in_order(rows: list[Row], families: list[Family]) -> None:
    lexicons = {speaker.client: speaker.lexicon for family in families for speaker in family.speakers}
    assert all(row["completion"].split() == [lexicons[row["client"]][word] for word in words_of(row)] for row in rows)


def test_private_words_contradict_the_family_and_no_other_word_does(families: list[Family]) -> None:
    for family in families:
        for speaker in family.speakers:
            differing = {word for word in source_words() if speaker.lexicon[word] != family.lexicon[word]}
            assert differing == set(speaker.private)
            assert len(differing) == 6


def test_a_word_is_private_to_one_client_of_a_family_at_most(families: list[Family]) -> None:
    for family in families:
        assert all(not set(a.private) & set(b.private) for a, b in combinations(family.speakers, 2))


def test_a_client_never_uses_one_translation_for_two_words(families: list[Family]) -> None:
    assert {len(set(speaker.lexicon.values())) for family in families for speaker in family.speakers} == {48}


def test_without_private_words_a_family_speaks_one_language() -> None:
    for family in make_families(0, private_words=0):
        assert all(speaker.lexicon == family.lexicon for speaker in family.speakers)


def test_every_prompt_has_the_same_form(rows: list[Row]) -> None:
    known = set(source_words())
    for row in rows:
        opening, *words, closing = row["prompt"].split(" ")
        assert (opening, closing) == ("translate", ":")
        assert set(words) <= known


def test_no_prompt_or_answer_names_a_family_or_client(rows: list[Row]) -> None:
    names = {row["family"] for row in rows} | {row["client"] for row in rows}
    text = " ".join(row["prompt"] + " " + row["completion"] for row in rows)
    assert not any(name in text for name in names)


def test_source_and_target_words_are_all_different() -> None:
    assert len({*source_words(), *target_words()}) == 48 + 96


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS)
def test_the_pretraining_languages_agree_with_the_demos_by_chance_only(seed: int) -> None:
    taught, spoken = pretraining_languages(64), [dict(family.lexicon) for family in make_families(seed)]
    mean = sum(agreement(a, b) for a in taught for b in spoken) / (len(taught) * len(spoken))
    # 64 x 4 x 48 draws of probability 1/96: the standard error is .0009, five of them are .0046.
    assert mean == pytest.approx(1 / TARGET_COUNT, abs=0.0046)
    assert max(agreement(a, b) for a in taught for b in spoken) < 0.25


@pytest.mark.parametrize("sizes", [{"private_words": 13}, {"clients": 2}, {"families": 9}, {"test": 15}, {"train": 0}])
def test_sizes_out_of_range_are_refused_with_the_allowed_ones(sizes: dict[str, int]) -> None:
    (name, value), *_ = sizes.items()
    with pytest.raises(DataError, match=f"{name}={value}"):
        make_tasks(0, **sizes)


def test_more_sentences_than_the_words_allow_are_refused() -> None:
    with pytest.raises(DataError, match="at most 12180"):
        make_tasks(0, train=20_000)
