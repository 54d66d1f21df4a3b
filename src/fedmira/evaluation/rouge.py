"""Scores of one generated answer against the correct answers."""

from collections.abc import Sequence

from rouge_score import rouge_scorer

from fedmira.errors import DataError

# No stemmer: the papers' figures on Natural Instructions use none; golden values in the tests pin the package.
_ROUGE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Score one prediction, each score in [0, 1], the best over the reference answers.

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
    return {
        "rouge_l": max(float(_ROUGE.score(answer, prediction)["rougeL"].fmeasure) for answer in answers),
        "exact_match": float(any(_words(answer) == predicted for answer in answers)),
        "word_accuracy": max(_position_matches(predicted, _words(answer)) for answer in answers),
    }


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _position_matches(predicted: Sequence[str], answer: Sequence[str]) -> float:
    """Return the fraction of words predicted at their position; an empty answer matches only an empty prediction."""
    if not answer:
        return float(not predicted)
    return sum(word == expected for word, expected in zip(predicted, answer, strict=False)) / len(answer)
