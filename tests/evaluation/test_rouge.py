"""Golden values of the answer scores, each worked by hand beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.errors import DataError
from fedmira.evaluation.rouge import score_answer

WORDS = st.lists(st.sampled_from(["red", "blue", "Green", "7"]), min_size=1, max_size=6).map(" ".join)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # LCS("the cat sat", "the cat sat on the mat") = 3 words; P = 3/3, R = 3/6, F1 = 2 * 1 * 0.5 / 1.5 = 2/3
    assert score_answer("the cat sat", ["the cat sat on the mat"])["rouge_l"] == pytest.approx(2 / 3)


def test_rouge_l_keeps_the_order_of_words():
    # "b a" and "a b" share a subsequence of 1 word: P = R = 1/2, F1 = 1/2 (a bag of words would give 1)
    assert score_answer("b a", ["a b"])["rouge_l"] == pytest.approx(1 / 2)


def test_rouge_l_allows_words_between_matches():
    # LCS("police killed the gunman", "police kill the gunman") = police .. the gunman = 3; P = R = 3/4 (Lin 2004, S2)
    assert score_answer("police kill the gunman", ["police killed the gunman"])["rouge_l"] == pytest.approx(3 / 4)


def test_rouge_l_does_not_stem():
    # a stemmer would make "running" and "run" one word
    assert score_answer("running", ["run"])["rouge_l"] == 0.0


def test_rouge_l_ignores_case_and_punctuation():
    assert score_answer("Yes.", ["yes"])["rouge_l"] == 1.0


def test_rouge_l_takes_the_best_reference():
    # against "a b c d": LCS 2, P = 2/2, R = 2/4, F1 = 2/3; against "a b": 1
    assert score_answer("a b", ["a b c d", "a b"])["rouge_l"] == 1.0


def test_a_script_without_latin_letters_has_no_rouge_words():
    assert score_answer("да", ["да"])["rouge_l"] == 0.0


HYPOTHESIS = (
    "the #### transcript is a written version of each day 's cnn student news program use this transcript to he    lp "
    "students with reading comprehension and vocabulary use the weekly newsquiz to test your knowledge of storie s "
    "you     saw on cnn student news"
)
REFERENCE = (
    "this page includes the show transcript use the transcript to help students with reading comprehension and     "
    "vocabulary at the bottom of the page , comment for a chance to be mentioned on cnn student news . you must be a "
    "teac    her or a student age # # or older to request a mention on the cnn student news roll call . the weekly "
    "newsquiz tests     students ' knowledge of even ts in the news"
)


@pytest.mark.parametrize(
    ("prediction", "answer", "f"),
    [
        (HYPOTHESIS, REFERENCE, 0.44705881864636676),  # as the README of rouge 1.0.1 has it
        # the union of Lin 2004, section 3.2: w1 w2 w3 w5 of 5 and of 8 words: P = 4/8, R = 4/5 (rouge 1.0.1 gives this)
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.6153846106508877),
        ("the cat sat. on the mat", "the cat. sat on a mat", 0.9090909041322315),  # words in sets: 5/5 and 5/6
        ("a a a b", "a b", 0.999999995),  # a word counts once, and the sum has 1e-8 more
        (" YES ", "yes", 0.999999995),  # lower case, stripped, as MIRA's code calls it
        ("да", "да", 0.999999995),  # any script
        ("no", "yes", 0.0),
        ("", "yes", 0.0),  # where the package raises an error
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_paper_is_that_of_the_package_rouge(prediction: str, answer: str, f: float) -> None:
    assert score_answer(prediction, [answer], ["rouge_l_paper"]) == {"rouge_l_paper": pytest.approx(f, abs=1e-15)}


def test_exact_match_ignores_case_and_the_amount_of_white_space():
    assert score_answer("  New\n york ", ["new  York"])["exact_match"] == 1.0


def test_exact_match_folds_case_beyond_latin_lower():
    # casefold turns the sharp s into ss; lower() would not
    assert score_answer("STRASSE", ["straße"])["exact_match"] == 1.0


def test_exact_match_compares_punctuation():
    assert score_answer("Yes.", ["yes"])["exact_match"] == 0.0


def test_exact_match_accepts_any_reference():
    assert score_answer("no", ["nope", "No"])["exact_match"] == 1.0


def test_word_accuracy_counts_words_at_their_position():
    # places 1, 2 and 4 of "a b c d" agree with "a b x d": 3/4
    assert score_answer("a b x d", ["a b c d"])["word_accuracy"] == pytest.approx(3 / 4)


def test_word_accuracy_divides_by_the_answer_not_by_the_prediction():
    # the one word of the answer is met, whatever follows it
    assert score_answer("a b c d", ["a"])["word_accuracy"] == 1.0


def test_a_missing_word_shifts_the_later_words():
    # "b c" against "a b c": b is at place 1, c at place 2: none agrees
    assert score_answer("b c", ["a b c"])["word_accuracy"] == 0.0


def test_word_accuracy_takes_the_best_reference():
    # against "x b": 1/2; against "a c d": 1/3
    assert score_answer("a b", ["a c d", "x b"])["word_accuracy"] == pytest.approx(1 / 2)


def test_an_empty_prediction_scores_nothing():
    assert score_answer("", ["yes"]) == {"rouge_l": 0.0, "exact_match": 0.0, "word_accuracy": 0.0}


def test_an_empty_answer_matches_an_empty_prediction():
    scores = score_answer(" ", [""])
    assert (scores["exact_match"], scores["word_accuracy"]) == (1.0, 1.0)


def test_no_reference_answer_is_refused():
    with pytest.raises(DataError, match="no reference answer"):
        score_answer("yes", [])


@given(WORDS)
def test_a_right_answer_scores_one_everywhere(text: str):
    assert score_answer(text, ["something else", text]) == {"rouge_l": 1.0, "exact_match": 1.0, "word_accuracy": 1.0}


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3), WORDS)
def test_another_reference_never_lowers_a_score(prediction: str, answers: list[str], another: str):
    before, after = score_answer(prediction, answers), score_answer(prediction, [*answers, another])
    assert all(after[name] >= before[name] for name in before)
