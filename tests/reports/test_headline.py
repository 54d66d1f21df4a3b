"""The sentence at the top of the page: what the figures support, and no more."""

from pathlib import Path

import pytest
from tests.reports.hand_made import rows, six

from fedmira.reports.headline import Statement, headline
from fedmira.reports.record import read_study


def first(study: Path) -> Statement:
    return headline(read_study(study))[0]


def accuracy(*values: float) -> list[tuple[object, ...]]:
    return rows(six(*values), "word_accuracy")


def test_a_clear_gain_is_told_with_clients_size_and_p(study: Path, write_run):
    # six wins of six: p = 2 / 64 = 0.03125; mean difference (1 + 2 + 3 + 4 + 5 + 6) / 6 = 3.5
    write_run("local", accuracy(1, 2, 3, 4, 5, 6))
    write_run("mira", accuracy(2, 4, 6, 8, 10, 12))
    found = first(study)
    assert found.verdict == "better"
    assert found.text == (
        "mira beat training alone on word accuracy for 6 of 6 clients: 3.500 higher on average (p = 0.0312)."
    )


def test_a_clear_loss_is_told_as_plainly(study: Path, write_run):
    write_run("local", rows(six(1, 2, 3, 4, 5, 6)))
    write_run("fedavg", rows(six(2, 4, 6, 8, 10, 12)))
    assert first(study).text == (
        "fedavg did worse than training alone on test loss for 6 of 6 clients: 3.500 higher on average (p = 0.0312)."
    )


def test_p_is_the_one_after_holm(study: Path, write_run):
    # alone each p is 2 / 64; of two methods the smaller doubles, so neither is below 0.05
    write_run("local", accuracy(1, 2, 3, 4, 5, 6))
    write_run("mira", accuracy(2, 4, 6, 8, 10, 12))
    write_run("fedavg", accuracy(1.5, 2.6, 3.7, 4.8, 5.9, 7))
    assert [said.verdict for said in headline(read_study(study))] == ["unclear", "unclear"]
    assert "(p = 0.0625)" in first(study).text


def test_no_difference_is_claimed_where_the_test_finds_none(study: Path, write_run):
    write_run("local", accuracy(1, 2, 3, 4, 5, 6))
    write_run("mira", accuracy(2, 1, 5, 2, 8, 3))
    found = first(study)
    assert found.verdict == "unclear"
    assert found.text.startswith(
        "mira and training alone cannot be told apart on word accuracy: better for 3 of 6 clients, worse for 3, level"
    )


def test_few_clients_are_too_few_however_they_fare(study: Path, write_run):
    write_run("local", accuracy(1, 2))
    write_run("mira", accuracy(5, 6))
    assert first(study).text == (
        "Too few clients to tell mira from training alone: on word accuracy better for 2 of 2 clients, worse for 0; "
        "a test needs 6 clients."
    )


def test_equal_values_are_called_equal(study: Path, write_run):
    write_run("local", accuracy(1, 2))
    write_run("mira", accuracy(1, 2))
    assert first(study).verdict == "equal"
    assert "the same word accuracy for every client (2 compared)" in first(study).text


def test_mean_and_majority_on_different_sides_are_told_as_that(study: Path, write_run):
    # nineteen small gains, 0.01 to 0.19, and one loss of 10: the ranks say better (p = 0.0007), the mean -8.1 / 20
    write_run("local", accuracy(*[10.0] * 20))
    write_run("mira", accuracy(*[10 + step / 100 for step in range(1, 20)], 0.0))
    assert first(study) == Statement(
        "mira",
        "mixed",
        "mira and training alone differ on word accuracy (p = 0.0007), but not one way: better for 19 of 20 clients, "
        "worse for 1, 0.405 lower on average.",
    )


def test_clients_without_a_common_metric_cannot_be_compared(study: Path, write_run):
    write_run("local", rows({"a": 1, "b": None}, "word_accuracy"))
    write_run("mira", rows({"a": None, "b": 1}, "word_accuracy"))
    assert first(study).text == (
        "mira cannot be compared with training alone: no client has a word accuracy under both."
    )


def test_a_higher_mean_of_fewer_winners_is_not_called_better(study: Path, write_run):
    # 21 losses, 0.01 to 0.21, and 19 gains, 1 to 19: the ranks say better (p = 0.02), and so does the mean
    write_run("local", accuracy(*[10.0] * 40))
    write_run("mira", accuracy(*[10 - step / 100 for step in range(1, 22)], *[10.0 + step for step in range(1, 20)]))
    assert first(study).verdict == "mixed"


def test_the_greatest_gain_comes_first(study: Path, write_run):
    write_run("local", accuracy(1, 1, 1, 1, 1, 1))
    write_run("fedavg", accuracy(0, 0, 0, 0, 0, 0))
    write_run("mira", accuracy(2, 2, 2, 2, 2, 2))
    assert [said.method for said in headline(read_study(study))] == ["mira", "fedavg"]


def test_an_opposite_verdict_of_another_metric_is_not_hidden(study: Path, write_run):
    lower, higher = six(1, 2, 3, 4, 5, 6), six(2, 4, 6, 8, 10, 12)
    write_run("local", rows(higher, "word_accuracy") + rows(higher))
    write_run("fedavg", rows(lower, "word_accuracy") + rows(lower))
    found = first(study)
    assert found.verdict == "worse"
    assert found.text.endswith(" On test loss it is the other way round: better for 6 of 6 (p = 0.0312).")


def test_agreeing_metrics_are_not_repeated(study: Path, write_run):
    lower, higher = six(1, 2, 3, 4, 5, 6), six(2, 4, 6, 8, 10, 12)
    write_run("local", rows(lower, "word_accuracy") + rows(higher))
    write_run("mira", rows(higher, "word_accuracy") + rows(lower))
    assert "other way" not in first(study).text


def test_a_renamed_baseline_is_named(study: Path, write_run):
    write_run("solo", accuracy(1), method="local")
    write_run("mira", accuracy(2))
    assert "training alone (solo)" in first(study).text


def test_a_diverged_method_has_no_mean_to_tell(study: Path, write_run):
    write_run("local", rows(six(1, 2, 3, 4, 5, float("inf"), 1)))
    write_run("mira", rows(six(2, 4, 6, 8, 10, 12, float("inf"))))
    assert "without a mean, because losses diverged" in first(study).text


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["local"], "Only local was run, so there is nothing to compare it with."),
        (["mira"], "No client was trained alone (method local), so no method can be compared with that."),
    ],
)
def test_with_nothing_to_compare_it_says_why(labels: list[str], said: str, study: Path, write_run):
    for label in labels:
        write_run(label, accuracy(1))
    assert first(study).text == said


def test_half_a_study_waits_for_the_other_half(study: Path, write_run):
    write_run("local", accuracy(1))
    write_run("mira", [])
    assert first(study).text.startswith("There is nothing to compare yet")


def test_an_untested_study_says_so(study: Path, write_run):
    write_run("local", rows({"a": 1}, number=0))
    assert first(study).text == "No run has been tested yet."
