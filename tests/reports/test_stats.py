"""The study's statistics, on tables small enough to work by hand."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira import load_config
from fedmira.config.yaml_text import dump_config
from fedmira.errors import StoreError
from fedmira.reports.results import Results, Row, find_runs, read_results
from fedmira.reports.stats import Comparison, MethodSummary, client_values, curve, gains, summarise, summarise_base


def table(*rows: tuple[Any, ...]) -> Results:
    """Rows (client, method, seed, round, value) of the test loss, personal view."""
    return Results(
        [
            Row(client, method, seed, number, "personal", "test", "loss", value)
            for client, method, seed, number, value in rows
        ]
    )


def changed(results: Results, **fields: str) -> Results:
    """The same rows of another metric, split or view."""
    return Results([row._replace(**fields) for row in results.rows])


def losses(method: str, values: Sequence[float | None], seed: int = 0) -> list[tuple[object, ...]]:
    """One value for each client c0, c1, ... after round 1."""
    return [(f"c{place}", method, seed, 1, math.nan if v is None else v) for place, v in enumerate(values)]


def scores(frame: Results) -> Results:
    return changed(frame, metric="rouge_l")


def one(frame: Results, method: str = "mira", metric: str = "loss") -> MethodSummary:
    return next(item for item in summarise(frame, metric=metric) if item.method == method)


def compared(own: Sequence[float | None], local: Sequence[float | None], metric: str = "loss") -> Comparison:
    frame = changed(table(*losses("local", local), *losses("mira", own)), metric=metric)
    against = one(frame, metric=metric).against
    assert against is not None
    return against


def test_the_mean_is_taken_over_clients():
    assert one(table(*losses("mira", [1, 2, 6]))).mean == pytest.approx(3)


def test_seeds_are_averaged_within_a_client_first():
    # c0: mean(1, 3) = 2, c1: only seed 0 has a value, 5; over clients (2 + 5) / 2, not (1 + 3 + 5) / 3
    frame = table(*losses("mira", [1, 5]), *losses("mira", [3, None], seed=1))
    assert one(frame).mean == pytest.approx(3.5)


def test_more_seeds_do_not_narrow_the_interval():
    first = table(*losses("mira", [1, 2, 6]))
    twice = table(*losses("mira", [1, 2, 6]), *losses("mira", [1, 2, 6], seed=1))
    assert one(first).half_width == one(twice).half_width


def test_the_interval_is_student_t_over_clients():
    # values 1 2 3: s = 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt 3 = 2.484138
    assert one(table(*losses("mira", [1, 2, 3]))).half_width == pytest.approx(2.484138, abs=1e-6)


def test_one_client_has_no_interval():
    assert one(table(*losses("mira", [1]))).half_width is None


def test_the_worst_client_has_the_highest_loss():
    summary = one(table(*losses("mira", [1, 6, 2])))
    assert (summary.worst_client, summary.worst) == ("c1", 6)


def test_the_worst_client_has_the_lowest_score():
    summary = one(scores(table(*losses("mira", [0.5, 0.9, 0.1]))), metric="rouge_l")
    assert (summary.worst_client, summary.worst) == ("c2", 0.1)


def test_the_lowest_tenth_is_rounded_up():
    # 11 clients with losses 1..11: ceil(1.1) = 2 worst, 11 and 10
    assert one(table(*losses("mira", range(1, 12)))).lowest_tenth == pytest.approx(10.5)


def test_missing_values_are_left_out_and_counted():
    summary = one(table(*losses("mira", [1, None, 3])))
    assert (summary.mean, summary.clients, summary.missing) == (2, 2, 1)


def test_a_client_that_only_another_method_has_is_counted_as_missing():
    frame = table(*losses("local", [1, 2, 3]), *losses("mira", [1, 2]))
    assert one(frame).missing == 1


def test_a_method_without_any_value_has_no_mean():
    summary = one(table(*losses("mira", [None, None])))
    assert (summary.mean, summary.worst, summary.lowest_tenth) == (None, None, None)


def test_the_last_round_counts():
    frame = table(("a", "mira", 0, 1, 9.0), ("a", "mira", 0, 4, 2.0))
    assert (one(frame).mean, one(frame).rounds) == (2, (4,))


def test_each_run_has_its_own_last_round():
    frame = table(("a", "mira", 0, 4, 2.0), ("a", "mira", 1, 3, 4.0))
    assert (one(frame).mean, one(frame).rounds) == (3, (3, 4))


def test_the_common_start_is_never_a_result():
    assert summarise(table(("a", "mira", 0, 0, 9.0)), metric="loss") == []


def test_the_personal_view_goes_before_the_global_one():
    shared = changed(table(("a", "mira", 0, 1, 9.0)), view="global")
    own = table(("a", "mira", 0, 1, 2.0))
    assert one(Results(shared.rows + own.rows)).mean == 2


def test_the_global_view_stands_in_where_no_personal_one_is():
    assert one(changed(table(*losses("mira", [1, 3])), view="global")).mean == 2


def test_the_difference_is_method_minus_local():
    assert compared([1, 2], [2, 5]).difference == pytest.approx(-2)


def test_a_lower_loss_wins():
    against = compared([1, 2, 3], [2, 2, 1])
    assert (against.wins, against.ties, against.losses) == (1, 1, 1)


def test_a_higher_score_wins():
    against = compared([0.9, 0.8, 0.1], [0.1, 0.2, 0.1], metric="rouge_l")
    assert (against.wins, against.ties, against.losses) == (2, 1, 0)


def test_a_client_without_a_value_on_one_side_is_no_pair():
    assert compared([1, None, 3], [2, 2, None]).pairs == 1


def test_the_difference_has_its_own_paired_interval():
    # differences -1 and -3: mean -2, s = sqrt 2, t(0.975, 1) = 12.706, half = 12.706 * sqrt 2 / sqrt 2
    assert compared([1, 2], [2, 5]).half_width == pytest.approx(12.7062, abs=1e-4)


def test_one_pair_has_no_interval():
    assert compared([1], [2]).half_width is None


def test_a_difference_with_a_diverged_client_has_no_interval():
    assert compared([1, math.inf], [2, 5]).half_width is None


def test_no_pair_at_all_has_no_difference():
    against = compared([None, 1], [1, None])
    assert (against.pairs, against.difference, against.p) == (0, None, None)


def test_six_pairs_that_all_win_reach_the_smallest_p():
    # all 2^6 sign patterns are equally likely, the most extreme two have p = 2 / 64
    assert compared([0] * 6, [1, 2, 3, 4, 5, 6]).p == pytest.approx(2 / 64)


def test_five_pairs_are_too_few_for_a_test():
    against = compared([0] * 5, [1, 2, 3, 4, 5])
    assert against.p is None
    assert "5 pairs" in against.reason


def test_equal_methods_have_no_p():
    against = compared([1] * 7, [1] * 7)
    assert (against.p, against.reason) == (None, "all differences are zero")


def test_the_effect_size_is_positive_where_a_lower_loss_or_a_higher_score_wins():
    # gains 1 2 3 -4 0: ranks of the first three 1 + 2 + 3 against 4, (6 - 4) / 10; the zero is dropped
    own, local = [1.0, 1.0, 1.0, 5.0, 1.0], [2.0, 3.0, 4.0, 1.0, 1.0]
    assert compared(own, local).effect == pytest.approx(0.2)
    assert compared(own, local, metric="rouge_l").effect == pytest.approx(-0.2)
    assert compared(local, local).effect is None


def test_a_weighted_mean_counts_each_test_example_once():
    # 1 example of loss 1 and 3 of loss 5: (1 + 15) / 4; c2 has no value
    frame = table(*losses("mira", [1, 5, None]))
    (found,) = summarise(frame, metric="loss", examples={"c0": 1, "c1": 3})
    assert (found.weighted_mean, found.mean) == (4, 3)
    assert summarise(frame, metric="loss", examples={"c0": 1})[0].weighted_mean is None
    diverged = table(*losses("mira", [1, math.inf]))
    assert summarise(diverged, metric="loss", examples={"c0": 1, "c1": 3})[0].weighted_mean == math.inf


def test_local_is_not_compared_with_itself():
    assert one(table(*losses("local", [1, 2])), "local").against is None


def test_without_local_nothing_is_compared():
    assert one(table(*losses("mira", [1, 2]))).against is None


def test_another_baseline_can_be_named():
    frame = table(*losses("alone", [1, 2]), *losses("mira", [1, 1]))
    summaries = summarise(frame, metric="loss", baseline="alone")
    assert [item.against.baseline for item in summaries if item.against] == ["alone"]


def test_holm_doubles_the_smaller_of_two_p():
    # differences -1..-6 give p = 2/64, which Holm doubles; -1..-5 and +6 give a larger p, which stays
    frame = table(
        *losses("local", [1, 2, 3, 4, 5, 6]),
        *losses("mira", [0] * 6),
        *losses("fedavg", [0, 0, 0, 0, 0, 12]),
    )
    mira, fedavg = one(frame).against, one(frame, "fedavg").against
    assert mira is not None
    assert fedavg is not None
    assert (mira.p_holm, fedavg.p_holm) == (pytest.approx(2 * 2 / 64), pytest.approx(fedavg.p))


def test_holm_counts_only_methods_that_have_a_p():
    frame = table(
        *losses("local", [1, 2, 3, 4, 5, 6]),
        *losses("mira", [0] * 6),
        *losses("same", [1, 2, 3, 4, 5, 6]),
    )
    mira = one(frame).against
    assert mira is not None
    assert mira.p_holm == pytest.approx(2 / 64)


def test_a_diverged_client_makes_the_mean_infinite():
    summary = one(table(*losses("mira", [1, math.inf])))
    assert (summary.mean, summary.half_width, summary.worst_client) == (math.inf, None, "c1")


def test_two_diverged_losses_tie():
    assert compared([math.inf, 1], [math.inf, 1]).ties == 2


def test_methods_keep_the_order_of_the_table():
    frame = table(*losses("mira", [1]), *losses("fedavg", [1]), *losses("local", [1]))
    assert [item.method for item in summarise(frame, metric="loss")] == ["mira", "fedavg", "local"]


def test_the_untouched_base_is_round_zero_of_local():
    frame = table(("a", "mira", 0, 0, 7.0), ("a", "local", 0, 0, 8.0), ("a", "local", 0, 1, 2.0))
    base = summarise_base(frame, metric="loss")
    assert base is not None
    assert base.mean == 8


def test_without_local_the_first_method_gives_the_untouched_base():
    base = summarise_base(table(("a", "mira", 0, 0, 7.0), ("a", "fedavg", 0, 0, 6.0)), metric="loss")
    assert base is not None
    assert base.mean == 7


def test_an_unmeasured_base_is_none():
    assert summarise_base(table(*losses("mira", [1])), metric="loss") is None


def test_the_view_that_was_measured_is_named():
    shared = changed(table(*losses("fedavg", [1])), view="global")
    frame = Results(table(("a", "local", 0, 0, 9.0), *losses("local", [1])).rows + shared.rows)
    base = summarise_base(frame, metric="loss")
    assert base is not None
    assert (one(frame, "local").views, one(frame, "fedavg").views, base.views) == (("personal",), ("global",), ())


def test_gain_is_positive_where_a_client_is_better_off():
    frame = table(*losses("local", [2, 2, 2]), *losses("mira", [1, 2, 5]))
    assert list(gains(frame, metric="loss")[1]["mira"].values()) == [1, 0, -3]
    assert list(gains(scores(frame), metric="rouge_l")[1]["mira"].values()) == [-1, 0, 3]


def test_gain_is_against_training_alone_which_has_none_itself():
    reference, found = gains(table(*losses("local", [2]), *losses("mira", [1])), metric="loss")
    assert (reference, list(found)) == ("local", ["mira"])


def test_without_training_alone_gain_is_against_the_untouched_base():
    reference, found = gains(table(("c0", "mira", 0, 0, 9.0), *losses("mira", [1])), metric="loss")
    assert (reference, list(found["mira"].values())) == ("untouched base", [8])


def test_gain_without_a_value_on_one_side_is_not_available():
    found = gains(table(*losses("local", [2, None]), *losses("mira", [None, 1])), metric="loss")[1]
    assert all(map(math.isnan, found["mira"].values()))


def test_two_diverged_losses_are_no_gain_and_one_is_an_infinite_one():
    found = gains(table(*losses("local", [math.inf] * 2), *losses("mira", [math.inf, 1])), metric="loss")[1]
    assert list(found["mira"].values()) == [0, math.inf]


def test_gain_with_nothing_but_training_alone_is_an_empty_table():
    assert gains(table(*losses("local", [2, 3])), metric="loss")[1] == {}


def test_client_values_keep_a_line_for_a_client_without_value():
    values = client_values(table(*losses("mira", [1, None])), metric="loss")
    assert list(values["mira"]) == ["c0", "c1"]
    assert math.isnan(values["mira"]["c1"])


def test_the_curve_is_the_mean_over_clients_by_round():
    frame = table(
        ("a", "mira", 0, 0, 4.0), ("b", "mira", 0, 0, 6.0), ("a", "mira", 0, 2, 1.0), ("b", "mira", 0, 2, 2.0)
    )
    assert curve(changed(frame, split="validation")) == {"mira": [(0, 5.0), (2, 1.5)]}


def test_the_curve_leaves_missing_values_out():
    frame = changed(table(("a", "mira", 0, 1, 4.0), ("b", "mira", 0, 1, math.nan)), split="validation")
    assert curve(frame) == {"mira": [(1, 4.0)]}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=25), st.lists(st.integers(0, 20), min_size=25, max_size=25))
def test_wins_ties_and_losses_add_up_and_swap_with_the_sides(own: list[int], other: list[int]):
    forth, back = compared(own, other[: len(own)]), compared(other[: len(own)], own)
    assert forth.wins + forth.ties + forth.losses == forth.pairs == len(own)
    assert (forth.wins, forth.losses, forth.p) == (back.losses, back.wins, back.p)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=25))
def test_the_mean_lies_between_the_worst_tenth_and_the_best(values: list[float]):
    summary = one(table(*losses("mira", values)))
    assert summary.mean is not None
    assert summary.lowest_tenth is not None
    assert np.min(values) - 1e-9 <= summary.mean <= summary.lowest_tenth + 1e-9 <= np.max(values) + 2e-9


def test_an_empty_value_is_read_as_not_available(study: Path, write_run):
    write_run("local", [("a", 1, "test", "loss", None), ("b", 1, "test", "loss", 2.5)])
    assert [math.isnan(row.value) for row in read_results(study).rows] == [True, False]


def test_client_names_stay_text(study: Path, write_run):
    write_run("local", [("007", 1, "test", "loss", 1), ("NA", 1, "test", "loss", 1)])
    assert [row.client for row in read_results(study).rows] == ["007", "NA"]


def test_a_loss_that_is_not_a_number_is_read_as_infinite(study: Path, write_run):
    write_run("local", [("a", 1, "test", "loss", "nan")])
    assert [row.value for row in read_results(study).rows] == [math.inf]


def test_all_runs_are_read(study: Path, write_run):
    for seed in (0, 1):
        write_run("local", [("a", 1, "test", "loss", 1)], seed=seed)
        write_run("mira", [("a", 1, "test", "loss", 1)], seed=seed)
    assert len(read_results(study).rows) == 4


def test_a_row_written_twice_counts_once_as_written_last(study: Path, write_run):
    write_run("local", [("a", 1, "test", "loss", 9), ("a", 1, "test", "loss", 2)])
    assert [row.value for row in read_results(study).rows] == [2]


def test_a_line_that_a_crash_cut_short_is_left_out(study: Path, write_run):
    run = write_run("local", [("a", 1, "test", "loss", 2)])
    with (run / "results.csv").open("a") as file:
        file.write("b,local,0,1,per")
    assert [row.client for row in read_results(study).rows] == ["a"]


def test_methods_come_in_the_order_of_the_config(study: Path, write_run):
    for method in ("fedavg", "local", "strong"):
        write_run(method, [("a", 1, "test", "loss", 1)])
    (study / "config.yaml").write_text("methods:\n- name: local\n- {name: mira, label: strong}\n- name: fedavg\n")
    assert [run.parent.name for run in find_runs(study)] == ["local", "strong", "fedavg"]


@pytest.mark.parametrize("label", ["best", "a-b", "no", '"null"', '"1e5"', '"007"', '"True"'])
def test_a_config_as_a_study_writes_it_gives_the_order_too(study: Path, write_run, label: str):
    config = load_config("demo", [f"methods.1.label={label}"])
    folders = [entry.folder for entry in config.methods]
    for folder in folders:
        write_run(folder, [("a", 1, "test", "loss", 1)])
    (study / "config.yaml").write_text(dump_config(config))
    assert [run.parent.name for run in find_runs(study)] == folders


def test_seeds_are_ordered_as_numbers(study: Path, write_run):
    for seed in (10, 9):
        write_run("local", [("a", 1, "test", "loss", 1)], seed=seed)
    assert [run.name for run in find_runs(study)] == ["seed-9", "seed-10"]


def test_a_missing_study_is_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="is not a folder"):
        read_results(tmp_path / "nowhere")


def test_a_study_without_results_is_refused(study: Path, write_run):
    write_run("local", [])
    with pytest.raises(StoreError, match="no results yet"):
        read_results(study)


def test_a_line_with_a_value_too_few_is_refused(study: Path, write_run):
    run = write_run("local", [("a", 1, "test", "loss", 2)])
    with (run / "results.csv").open("a") as file:
        file.write("b,local,0\r\na,local,0,2,personal,test,loss,1\r\n")
    with pytest.raises(StoreError, match="3 values under 8 columns"):
        read_results(study)


def test_a_table_without_a_column_is_refused_by_name(study: Path, write_run):
    run = write_run("local", [])
    (run / "results.csv").write_text("client,method,seed,round,view,split,metric\n")
    with pytest.raises(StoreError, match="no column value"):
        read_results(study)


def test_a_value_that_is_no_number_is_refused_with_its_file(study: Path, write_run):
    write_run("local", [("a", 1, "test", "loss", "low")])
    with pytest.raises(StoreError, match=r"results\.csv' has a seed, round or value that is not a number"):
        read_results(study)
