"""Scores of one generated answer against the correct answers."""

import functools
from collections.abc import Sequence
from typing import Any

from fedmira.errors import DataError

SCORES = ("rouge_l", "exact_match", "word_accuracy")


def score_answer(prediction: str, answers: Sequence[str], scores: Sequence[str] = SCORES) -> dict[str, float]:
    """Score one prediction by each of `scores`, all in [0, 1], the best over the reference answers.

    rouge_l        F1 = 2 P R / (P + R) with P = LCS / words predicted, R = LCS / words of the answer. For the
                   package words are runs of [a-z0-9] in lower case: an answer in another script has none and scores 0.
    exact_match    1 if the texts are equal after strip, casefold and collapsing of white space, else 0.
    word_accuracy  words of the answer that the prediction has at the same position / words of the answer, on the same
                   text as exact_match (so exact_match 1 implies word_accuracy 1).
    Raises DataError if there is no reference answer.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3 (sentence-level LCS, beta 1).
    """
    if not answers:
        raise DataError("no reference answer: a prediction is scored against at least one; check the answer column")
    predicted = _words(prediction)
    found = {
        "exact_match": float(any(_words(answer) == predicted for answer in answers)),
        "word_accuracy": max(_position_matches(predicted, _words(answer)) for answer in answers),
    }
    if "rouge_l" in scores:
        found["rouge_l"] = max(float(_rouge().score(answer, prediction)["rougeL"].fmeasure) for answer in answers)
    return {name: found[name] for name in scores}


@functools.cache
def _rouge() -> Any:
    """The package imports nltk, which takes seconds."""
    from rouge_score import rouge_scorer

    # No stemmer: the papers' Natural Instructions figures use plain words. Tests freeze what it gives.
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _position_matches(predicted: Sequence[str], answer: Sequence[str]) -> float:
    """Return the fraction of words predicted at their position; an empty answer matches only an empty prediction."""
    if not answer:
        return float(not predicted)
    return sum(word == expected for word, expected in zip(predicted, answer, strict=False)) / len(answer)
