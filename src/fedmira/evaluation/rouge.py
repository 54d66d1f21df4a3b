"""Scores of one generated answer against the answers that count as right."""

from collections.abc import Sequence

from rouge_score import rouge_scorer

from fedmira.errors import DataError

# No stemmer: the papers' Natural Instructions figures use plain words; golden values in the tests freeze the package.
_ROUGE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Score one prediction, each score in [0, 1] and the best over the reference answers.

    rouge_l        F1 = 2 P R / (P + R) with P = LCS / words predicted, R = LCS / words of the answer. The package reads
                   words as runs of [a-z0-9] after lowering: an answer in another script has none and scores 0.
    exact_match    1 if the texts are equal after strip, casefold and collapsing of white space, else 0.
    word_accuracy  words of the answer that the prediction has at the same position / words of the answer, on the same
                   text as exact_match (so exact_match 1 implies word_accuracy 1).
    Raises DataError if there is no reference answer.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3 (sentence-level LCS, beta 1).
    """
    if not answers:
        raise DataError(
            "found no reference answer: a prediction is scored against at least one; check the answer column"
        )
    predicted = _words(prediction)
    return {
        "rouge_l": max(float(_ROUGE.score(answer, prediction)["rougeL"].fmeasure) for answer in answers),
        "exact_match": float(any(_words(answer) == predicted for answer in answers)),
        "word_accuracy": max(_position_matches(predicted, _words(answer)) for answer in answers),
    }


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _position_matches(predicted: Sequence[str], answer: Sequence[str]) -> float:
    """Return the fraction of the answer's words met in place; an empty answer is met by an empty prediction only."""
    if not answer:
        return float(not predicted)
    return sum(found == wanted for found, wanted in zip(predicted, answer, strict=False)) / len(answer)
