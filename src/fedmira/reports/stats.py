"""Statistics of a study over its clients, read from the runs' results.csv.

The client is the unit: seeds are averaged within a client first, so n is the number of clients and repeating a seed
never narrows an interval.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fedmira.reports.averages import deviation, half_width, holm, mean, rank_biserial, signed_rank_p, weighted_mean
from fedmira.reports.results import LOWER_IS_BETTER, Results, Row

UNTOUCHED_BASE = "untouched base"
FEWEST_PAIRS = 6  # with 5 pairs the smallest two-sided p is 2 / 2^5 = 0.06: no outcome could be significant

NO_COUNTS: Mapping[str, int] = MappingProxyType({})

Values = dict[str, float]  # of every client of the study, NaN = n/a


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline, paired over the clients that have a value for both.

    difference: mean over pairs of (method - baseline), None without pairs; half_width: of its 95 % t-interval, as in
    MethodSummary. wins, ties, losses: pairs where the method is better, exactly equal, worse, in the metric's own
    direction. p: two-sided Wilcoxon signed-rank (zero differences dropped), None with a reason. p_holm: adjusted over
    the m methods of this metric that have a p; in ascending order p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)).
    effect: matched-pairs rank-biserial correlation r = (R+ - R-) / (R+ + R-) of the same ranks, positive where the
    method is better; None if all differences are zero. Source: Wilcoxon 1945; Holm 1979; Kerby 2014.
    """

    baseline: str
    pairs: int
    difference: float | None
    half_width: float | None
    wins: int
    ties: int
    losses: int
    p: float | None
    p_holm: float | None
    reason: str
    effect: float | None = None


@dataclass(frozen=True)
class MethodSummary:
    """One method on one metric at each run's last round, or those it keeps; x_k is client k's mean over seeds.

    x_k is client k's mean over seeds, K the clients with a value. mean = sum_k x_k / K; half_width = t_{0.975, K-1} s /
    sqrt(K) with s^2 = sum_k (x_k - mean)^2 / (K - 1), None below two clients; lowest_tenth = mean of the worst
    ceil(K / 10) clients. missing: clients of the study without a value (n/a), left out of everything else. mean and
    worst are None if K = 0. views: whose adapter was measured, each client's own (personal) or the shared one (global);
    empty for the untouched base. against: None for the baseline itself, or if the study has no baseline.

    by_seed: for each seed the mean over its clients; seed_deviation: their sample standard deviation, None below two
    seeds. It says how much a repetition changes the mean, the interval how much another choice of clients would.
    weighted_mean: sum_k n_k x_k / sum_k n_k over the same clients, n_k test examples; None where they are unknown.
    """

    method: str
    metric: str
    split: str
    seeds: tuple[int, ...]
    rounds: tuple[int, ...]
    clients: int
    missing: int
    mean: float | None
    half_width: float | None
    worst_client: str | None
    worst: float | None
    lowest_tenth: float | None
    views: tuple[str, ...]
    by_seed: Mapping[int, float] = field(default_factory=dict)
    seed_deviation: float | None = None
    against: Comparison | None = None
    weighted_mean: float | None = None


def client_values(results: Results, *, metric: str, split: str = "test") -> dict[str, Values]:
    """Return x_k of each method, for every client: the mean over seeds at each run's last round, or those it keeps.

    A method that was not yet measured after round 0 is left out.
    """
    measured = _by_method(_last_rounds(results, metric=metric, split=split))
    return {method: _of_all(results, measured[method]) for method in results.methods if method in measured}


def base_values(results: Results, *, metric: str, split: str = "test", baseline: str = "local") -> Values:
    """Return the untouched base's value for every client.

    It is the common start, read from round 0 of the baseline's runs, or of the first method that has a round 0.
    """
    starts = _by_method(row for row in _served(results, metric=metric, split=split) if row.round == 0)
    source = baseline if baseline in starts else next(iter(starts), baseline)
    return _of_all(results, starts.get(source, {}))


def summarise(
    results: Results,
    *,
    metric: str,
    split: str = "test",
    baseline: str = "local",
    examples: Mapping[str, int] = NO_COUNTS,
) -> list[MethodSummary]:
    """Summarise every method on one metric, in the table's order; MethodSummary and Comparison state the formulas.

    The personal view is used if a client has one, else the global view. Holm's adjustment is over the methods that are
    compared on this metric. Empty if nothing was measured after round 0. examples: of the split, by client.
    """
    values = client_values(results, metric=metric, split=split)
    rows = _last_rounds(results, metric=metric, split=split)
    summaries = []
    for method, method_values in values.items():
        runs = [row for row in rows if row.method == method]
        summary = _summary(method_values, method=method, metric=metric, split=split, runs=runs, examples=examples)
        if baseline in values and method != baseline:
            against = _compare(method_values, values[baseline], metric=metric, baseline=baseline)
            summary = replace(summary, against=against)
        summaries.append(summary)
    return _adjust(summaries)


def summarise_base(
    results: Results,
    *,
    metric: str,
    split: str = "test",
    baseline: str = "local",
    examples: Mapping[str, int] = NO_COUNTS,
) -> MethodSummary | None:
    """Summarise the untouched base (round 0) on one metric; None if it was not measured."""
    values = base_values(results, metric=metric, split=split, baseline=baseline)
    if all(map(math.isnan, values.values())):
        return None
    return _summary(values, method=UNTOUCHED_BASE, metric=metric, split=split, runs=[], examples=examples)


def gains(
    results: Results, *, metric: str, split: str = "test", baseline: str = "local"
) -> tuple[str, dict[str, Values]]:
    """Return what the clients are compared with, and by how much each is better under each method.

    gain_k = reference_k - x_k for a loss, x_k - reference_k for a score: positive is better. The reference is the
    baseline, which then has no gains, or the untouched base where the baseline was not measured.
    """
    values = client_values(results, metric=metric, split=split)
    if baseline in values:
        reference, reference_values = baseline, values.pop(baseline)
    else:
        reference = UNTOUCHED_BASE
        reference_values = base_values(results, metric=metric, split=split, baseline=baseline)
    return reference, {
        method: {client: _gain(value, reference_values[client], metric) for client, value in method_values.items()}
        for method, method_values in values.items()
    }


def curve(results: Results, metric: str = "loss", split: str = "validation") -> dict[str, list[tuple[int, float]]]:
    """Return for each method (round, mean over clients of their mean over seeds), rounds ascending, n/a left out."""
    return {
        method: [(turn, mean(values.values())) for turn, values in rounds.items()]
        for method, rounds in client_curves(results, metric, split).items()
    }


def client_curves(
    results: Results, metric: str = "loss", split: str = "validation"
) -> dict[str, dict[int, dict[str, float]]]:
    """Return for each method, round by round, each client's mean over seeds; n/a, and methods without any, left out."""
    rounds: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in _served(results, metric=metric, split=split):
        if not math.isnan(row.value):
            rounds.setdefault((row.method, row.round), {}).setdefault(row.client, []).append(row.value)
    curves: dict[str, dict[int, dict[str, float]]] = {method: {} for method in results.methods}
    for (method, turn), clients in sorted(rounds.items()):
        curves[method][turn] = {client: mean(values) for client, values in clients.items()}
    return {method: by_round for method, by_round in curves.items() if by_round}


def _gain(value: float, reference: float, metric: str) -> float:
    """value - reference in the metric's direction: positive is better."""
    # Two infinite losses are a tie; their difference as numbers would be NaN.
    difference = 0.0 if value == reference else value - reference
    return -difference if metric in LOWER_IS_BETTER else difference


def _served(results: Results, *, metric: str, split: str) -> list[Row]:
    """Return the rows of one metric and split for the adapter that a client uses: the personal view if it has one."""
    rows = results.of(metric=metric, split=split)
    chosen: dict[tuple[str, str, int, int], Row] = {}
    for row in rows:
        key = row[:4]
        if key not in chosen or (row.view == "personal" and chosen[key].view != "personal"):
            chosen[key] = row
    return [row for row in rows if chosen[row[:4]] is row]


def _last_rounds(results: Results, *, metric: str, split: str) -> list[Row]:
    """Return the rows of one metric and split at the last measured round of each run; round 0 is never a result.

    Of tests in a run that keeps the best rounds: each client's row of the round that it keeps, the earlier one.
    """
    rows = [row for row in _served(results, metric=metric, split=split) if row.round > 0]
    last: dict[tuple[str, int], int] = {}
    kept: dict[tuple[str, str, int], int] = {}
    for row in rows:
        last[row.method, row.seed] = max(row.round, last.get((row.method, row.seed), 0))
        if split == "test" and (row.method, row.seed) in results.kept:
            kept[row[:3]] = min(row.round, kept.get(row[:3], row.round))
    return [row for row in rows if row.round == kept.get(row[:3], last[row.method, row.seed])]


def _by_method(rows: Iterable[Row]) -> dict[str, Values]:
    """Average the rows of each client under each method; clients without a row are absent."""
    sorted_values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        sorted_values.setdefault(row.method, {}).setdefault(row.client, []).append(row.value)
    return {
        method: {client: mean(values) for client, values in clients.items()}
        for method, clients in sorted_values.items()
    }


def _of_all(results: Results, values: Values) -> Values:
    return {client: values.get(client, math.nan) for client in results.clients}


def _summary(
    values: Values, *, method: str, metric: str, split: str, runs: Sequence[Row], examples: Mapping[str, int]
) -> MethodSummary:
    """Summarise the values of one method; `runs` are the rows that name its seeds and rounds."""
    known = [(client, value) for client, value in values.items() if not math.isnan(value)]
    worst_first = sorted(known, key=lambda item: item[1], reverse=metric in LOWER_IS_BETTER)
    ordered = [value for _, value in worst_first]
    counts = [examples.get(client, 0) for client, _ in known]
    count = len(ordered)
    of_seeds = {seed: [row.value for row in runs if row.seed == seed] for seed in sorted({row.seed for row in runs})}
    by_seed = {seed: mean(seed_values) for seed, seed_values in of_seeds.items()}
    return MethodSummary(
        method=method,
        metric=metric,
        split=split,
        seeds=tuple(of_seeds),
        rounds=tuple(sorted({row.round for row in runs})),
        clients=count,
        missing=len(values) - count,
        mean=mean(ordered) if count else None,
        half_width=half_width(ordered),
        worst_client=worst_first[0][0] if count else None,
        worst=ordered[0] if count else None,
        lowest_tenth=mean(ordered[: math.ceil(count / 10)]) if count else None,
        views=tuple(sorted({row.view for row in runs})),
        by_seed=by_seed,
        seed_deviation=deviation(list(by_seed.values())),
        weighted_mean=weighted_mean([value for _, value in known], counts) if all(counts) else None,
    )


def _compare(values: Values, baseline_values: Values, *, metric: str, baseline: str) -> Comparison:
    """Compare the values of a method with the baseline's; Holm's p is filled in later."""
    pairs = [(value, baseline_values[client]) for client, value in values.items()]
    gained = [_gain(*pair, metric) for pair in pairs if not any(map(math.isnan, pair))]
    differences = [-gain if metric in LOWER_IS_BETTER else gain for gain in gained]
    p: float | None = None
    reason = ""
    if len(gained) < FEWEST_PAIRS:
        reason = f"{len(gained)} pairs: the signed-rank test needs {FEWEST_PAIRS}"
    elif not any(differences):
        reason = "all differences are zero"
    else:
        p = signed_rank_p(differences)
    return Comparison(
        baseline=baseline,
        pairs=len(gained),
        difference=mean(differences) if gained else None,
        half_width=half_width(differences),
        wins=sum(gain > 0 for gain in gained),
        ties=sum(gain == 0 for gain in gained),
        losses=sum(gain < 0 for gain in gained),
        p=p,
        p_holm=None,
        reason=reason,
        effect=rank_biserial(gained),
    )


def _adjust(summaries: list[MethodSummary]) -> list[MethodSummary]:
    """Fill in Holm's p over all comparisons that have one."""
    adjusted = holm({item.method: item.against.p for item in summaries if item.against and item.against.p is not None})
    return [
        replace(item, against=replace(item.against, p_holm=adjusted.get(item.method))) if item.against else item
        for item in summaries
    ]
