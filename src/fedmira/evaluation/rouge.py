"""Scores of one generated answer against the correct answers."""

import re
from collections.abc import Callable, Mapping, Sequence

from fedmira.errors import DataError

SCORES = ("rouge_l", "exact_match", "word_accuracy")
PAPER = "rouge_l_paper"  # ROUGE-L as MIRA's paper has it, from the package `rouge`


def score_answer(prediction: str, answers: Sequence[str], scores: Sequence[str] = SCORES) -> dict[str, float]:
    """Score one prediction by each of `scores`, all in [0, 1], the best over the reference answers.

    rouge_l        F1 = 2 P R / (P + R) with P = LCS / words predicted, R = LCS / words of the answer; words are runs of
                   [a-z0-9] in lower case: an answer in another script has none and scores 0. Equal to the package
                   rouge-score without stemmer.
    rouge_l_paper  ROUGE-L of the package rouge (1.0.1), on lower case: sentences end at ".", words at white space;
                   U = the set of words that are in a longest common subsequence of any sentence predicted and any
                   sentence of the answer; P = |U| / distinct words predicted, R = |U| / distinct words of the answer,
                   F1 = 2 P R / (P + R + 1e-8). 0 without a sentence, where the package raises an error.
    exact_match    1 if the texts are equal after strip, casefold and collapsing of white space, else 0.
    word_accuracy  words of the answer that the prediction has at the same position / words of the answer, on the same
                   text as exact_match (so exact_match 1 implies word_accuracy 1).
    Raises DataError if there is no reference answer.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sections 3.1 and 3.2; MIRA
    (arXiv:2410.15524), whose code scores with the package rouge.
    """
    if not answers:
        raise DataError("no reference answer: a prediction is scored against at least one; check the answer column")
    return {name: max(_SCORES[name](prediction, answer) for answer in answers) for name in scores}


def rouge_words(text: str) -> list[str]:
    """Return the words of a text that rouge_l knows; none of a text in another script."""
    return re.findall("[a-z0-9]+", text.lower())


def _rouge_l(prediction: str, answer: str) -> float:
    from rapidfuzz.distance import LCSseq  # 40 ms, and only where answers are scored

    predicted, expected = rouge_words(prediction), rouge_words(answer)
    common = LCSseq.similarity(predicted, expected)
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _rouge_l_paper(prediction: str, answer: str) -> float:
    predicted, expected = _sentences(prediction), _sentences(answer)
    if not predicted or not expected:
        return 0.0
    union = {word for one in expected for other in predicted for word in _common_words(one, other)}
    precision = len(union) / len({word for sentence in predicted for word in sentence})
    recall = len(union) / len({word for sentence in expected for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence as the package splits them; one of white space has one empty word."""
    return [sentence.split() or [""] for sentence in text.lower().strip().split(".") if sentence]


def _common_words(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return a longest common subsequence, last word first; of several, the one that the package finds."""
    lengths = [[0] * (len(other) + 1)]
    for word in one:
        above, row = lengths[-1], [0]
        for column, candidate in enumerate(other):
            row.append(above[column] + 1 if word == candidate else max(above[column + 1], row[-1]))
        lengths.append(row)
    i, j, words = len(one), len(other), []
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            words.append(one[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _exact_match(prediction: str, answer: str) -> float:
    return float(_words(prediction) == _words(answer))


def _word_accuracy(prediction: str, answer: str) -> float:
    """Return the fraction of words predicted at their position; an empty answer matches only an empty prediction."""
    predicted, expected = _words(prediction), _words(answer)
    if not expected:
        return float(not predicted)
    return sum(word == other for word, other in zip(predicted, expected, strict=False)) / len(expected)


def _words(text: str) -> list[str]:
    return text.casefold().split()


_SCORES: Mapping[str, Callable[[str, str], float]] = {
    "rouge_l": _rouge_l,
    PAPER: _rouge_l_paper,
    "exact_match": _exact_match,
    "word_accuracy": _word_accuracy,
}
