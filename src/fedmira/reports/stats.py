"""Statistics of a study over its clients, read from the runs' results.csv.

The client is the unit: seeds are averaged within a client first, so n is the number of clients and repeating a seed
never narrows an interval. Tests and corrections are scipy's and statsmodels', not ours.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from fedmira.config.sections import MethodEntry
from fedmira.config.yaml_text import parse_yaml
from fedmira.disk.folders import RESULT_COLUMNS
from fedmira.errors import FedMiraError, StoreError

LOWER_IS_BETTER = frozenset({"loss"})
UNTOUCHED_BASE = "untouched base"
FEWEST_PAIRS = 6  # with 5 pairs the smallest two-sided p is 2 / 2^5 = 0.06: no outcome could be significant


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline, paired over the clients that have a value for both.

    difference: mean over pairs of (method - baseline), None without pairs; half_width: of its 95 % t-interval, as in
    MethodSummary. wins, ties, losses: pairs where the method is better, exactly equal, worse, in the metric's own
    direction. p: two-sided Wilcoxon signed-rank (zero differences dropped), None with a reason. p_holm: adjusted over
    the m methods of this metric that have a p; in ascending order p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)).
    Source: Wilcoxon 1945; Holm 1979.
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


@dataclass(frozen=True)
class MethodSummary:
    """One method on one metric at each run's last round; x_k is client k's mean over seeds, K the clients with a value.

    mean = sum_k x_k / K; half_width = t_{0.975, K-1} s / sqrt(K) with s^2 = sum_k (x_k - mean)^2 / (K - 1), None below
    two clients; lowest_tenth = mean of the worst ceil(K / 10) clients. missing: clients of the study without a value
    (n/a), left out of everything else. mean and worst are None if K = 0. views: whose adapter was measured, each
    client's own (personal) or the shared one (global); empty for the untouched base. against: None for the baseline
    itself, or if the study has no baseline.
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
    against: Comparison | None = None


def find_runs(study: Path) -> list[Path]:
    """List the run folders STUDY/<method>/seed-<n>, methods in the order of STUDY/config.yaml, then by name and seed.

    Raises StoreError if there is no such folder or it holds no run.
    """
    runs = [
        run
        for run in study.glob("*/seed-*")
        if run.name.removeprefix("seed-").isdigit()
        and ((run / "run.json").is_file() or (run / "results.csv").is_file())
    ]
    if not runs:
        found = "holds no <method>/seed-<n>/ with results" if study.is_dir() else "is no folder"
        raise StoreError(f"'{study}' {found}: a study is the output_dir of 'fedmira run'; give that folder")
    order = _configured_order(study / "config.yaml")
    return sorted(
        runs,
        key=lambda run: (
            order.get(run.parent.name, len(order)),
            run.parent.name,
            int(run.name.removeprefix("seed-")),
        ),
    )


def read_results(study: Path) -> pd.DataFrame:
    """Read the results of all runs of a study into one table with RESULT_COLUMNS; value NaN = n/a.

    A loss that was written as `nan` has diverged and is read as infinite: as n/a it would make its method look better.
    A row that is written twice (a resumed run) counts once, as written last.
    Raises StoreError if there are no results, or a file is damaged.
    """
    tables = [_read_table(run / "results.csv") for run in find_runs(study) if (run / "results.csv").is_file()]
    if not any(len(table) for table in tables):
        raise StoreError(f"'{study}' has no results yet: a run writes results.csv when it has been evaluated")
    return pd.concat(tables, ignore_index=True)


def client_values(frame: pd.DataFrame, *, metric: str, split: str = "test") -> pd.DataFrame:
    """Return x_k as a table [clients, methods]: the mean over seeds at each run's last round, NaN = n/a.

    A method that was not yet measured after round 0 has no column. Clients without any value keep their line.
    """
    rows = _last_rounds(frame, metric=metric, split=split)
    means = rows.groupby(["client", "method"])["value"].mean().unstack("method")
    methods = [name for name in frame["method"].unique() if name in means.columns]
    return means.reindex(index=pd.Index(frame["client"].unique(), name="client"), columns=methods)


def base_values(
    frame: pd.DataFrame, *, metric: str, split: str = "test", baseline: str = "local"
) -> "pd.Series[float]":
    """Return the untouched base's value of each client [clients], NaN = n/a.

    It is the common start, read from round 0 of the baseline's runs, or of the first method that has any.
    """
    rows = _served(frame, metric=metric, split=split)
    rows = rows[rows["round"] == 0]
    measured = list(rows["method"].unique())
    source = baseline if baseline in measured else next(iter(measured), baseline)
    means = rows[rows["method"] == source].groupby("client")["value"].mean()
    return means.reindex(pd.Index(frame["client"].unique(), name="client")).astype(float)


def summarise(frame: pd.DataFrame, *, metric: str, split: str = "test", baseline: str = "local") -> list[MethodSummary]:
    """Summarise every method on one metric, in the table's order; MethodSummary and Comparison state the formulas.

    The personal view is read where a client has one, else the global view. Holm's adjustment runs over the methods
    that are compared on this metric. Empty if nothing was measured after round 0.
    """
    values = client_values(frame, metric=metric, split=split)
    rows = _last_rounds(frame, metric=metric, split=split)
    summaries = []
    for method in values.columns:
        own = rows[rows["method"] == method]
        summary = _summary(values[method], method=str(method), metric=metric, split=split, runs=own)
        if baseline in values.columns and method != baseline:
            summary = replace(
                summary, against=_compare(values[method], values[baseline], metric=metric, baseline=baseline)
            )
        summaries.append(summary)
    return _adjust(summaries)


def summarise_base(
    frame: pd.DataFrame, *, metric: str, split: str = "test", baseline: str = "local"
) -> MethodSummary | None:
    """Summarise the untouched base (round 0) on one metric; None if it was not measured."""
    values = base_values(frame, metric=metric, split=split, baseline=baseline)
    if values.isna().all():
        return None
    return _summary(values, method=UNTOUCHED_BASE, metric=metric, split=split, runs=frame.head(0))


def gains(
    frame: pd.DataFrame, *, metric: str, split: str = "test", baseline: str = "local"
) -> tuple[str, pd.DataFrame]:
    """Return who the clients are compared with, and by how much each is better off [clients, methods], NaN = n/a.

    gain_k = reference_k - x_k for a loss, x_k - reference_k for a score: positive is better. The reference is the
    baseline, which then has no column, or the untouched base where the baseline was not measured.
    """
    values = client_values(frame, metric=metric, split=split)
    if baseline in values.columns:
        reference, other = baseline, values.pop(baseline)
    else:
        reference, other = UNTOUCHED_BASE, base_values(frame, metric=metric, split=split, baseline=baseline)
    gained = {method: _gain(values[method], other, metric) for method in values.columns}
    return reference, pd.DataFrame(gained, index=values.index)


def curve(frame: pd.DataFrame, metric: str = "loss", split: str = "validation") -> dict[str, list[tuple[int, float]]]:
    """Return for each method (round, mean over clients of their mean over seeds), rounds ascending, n/a left out."""
    rows = _served(frame, metric=metric, split=split).dropna(subset=["value"])
    clients = rows.groupby(["method", "round", "client"], as_index=False)["value"].mean()
    means = clients.groupby(["method", "round"], as_index=False)["value"].mean()
    return {
        str(method): [(int(r), float(v)) for r, v in zip(own["round"], own["value"], strict=True)]
        for method in frame["method"].unique()
        if len(own := means[means["method"] == method].sort_values("round"))
    }


def _gain(own: "pd.Series[float]", other: "pd.Series[float]", metric: str) -> "pd.Series[float]":
    """own - other in the metric's own direction: positive is better."""
    # Two infinite losses are a tie; their difference as numbers would be NaN.
    differences = (own - other).mask(own == other, 0.0)
    return -differences if metric in LOWER_IS_BETTER else differences


def _half_width(values: "pd.Series[float]") -> float | None:
    """Half of the 95 % t-interval of a mean over clients; None below two, or if one is infinite."""
    count = len(values)
    if count < 2 or not all(math.isfinite(value) for value in values):
        return None
    return float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count))


def _served(frame: pd.DataFrame, *, metric: str, split: str) -> pd.DataFrame:
    """Keep the rows of one metric and split, for the adapter the client would use: its personal view if it has one."""
    rows = frame[(frame["metric"] == metric) & (frame["split"] == split)]
    personal_first = rows.sort_values("view", key=lambda view: view != "personal", kind="stable")
    return personal_first.drop_duplicates(["client", "method", "seed", "round"]).sort_index()


def _last_rounds(frame: pd.DataFrame, *, metric: str, split: str) -> pd.DataFrame:
    """Keep the rows of one metric and split at the last round each run was measured; round 0 is never a result."""
    rows = _served(frame, metric=metric, split=split)
    rows = rows[rows["round"] > 0]
    last = rows.groupby(["method", "seed"])["round"].transform("max")
    return rows[rows["round"] == last]


def _summary(values: "pd.Series[float]", *, method: str, metric: str, split: str, runs: pd.DataFrame) -> MethodSummary:
    """Summarise the values [clients] of one method; `runs` are the rows that name its seeds and rounds."""
    worst_first = values.dropna().sort_values(ascending=metric not in LOWER_IS_BETTER, kind="stable")
    count = len(worst_first)
    return MethodSummary(
        method=method,
        metric=metric,
        split=split,
        seeds=tuple(sorted({int(seed) for seed in runs["seed"]})),
        rounds=tuple(sorted({int(number) for number in runs["round"]})),
        clients=count,
        missing=len(values) - count,
        mean=float(worst_first.mean()) if count else None,
        half_width=_half_width(worst_first),
        worst_client=str(worst_first.index[0]) if count else None,
        worst=float(worst_first.iloc[0]) if count else None,
        lowest_tenth=float(worst_first.head(math.ceil(count / 10)).mean()) if count else None,
        views=tuple(sorted({str(view) for view in runs["view"]})),
    )


def _compare(own: "pd.Series[float]", other: "pd.Series[float]", *, metric: str, baseline: str) -> Comparison:
    """Compare the values [clients] of a method with the baseline's; Holm's p is filled in later."""
    both = pd.DataFrame({"own": own, "other": other}).dropna()
    gains = _gain(both["own"], both["other"], metric)
    differences = -gains if metric in LOWER_IS_BETTER else gains
    p: float | None = None
    reason = ""
    if len(both) < FEWEST_PAIRS:
        reason = f"{len(both)} pairs: the signed-rank test needs {FEWEST_PAIRS}"
    elif not differences.any():
        reason = "all differences are zero"
    else:
        p = float(stats.wilcoxon(differences.to_numpy()).pvalue)
    with np.errstate(invalid="ignore"):  # infinite both ways: the mean is no number, and that is meant
        difference = float(differences.mean()) if len(both) else None
    return Comparison(
        baseline=baseline,
        pairs=len(both),
        difference=difference,
        half_width=_half_width(differences),
        wins=int((gains > 0).sum()),
        ties=int((gains == 0).sum()),
        losses=int((gains < 0).sum()),
        p=p,
        p_holm=None,
        reason=reason,
    )


def _adjust(summaries: list[MethodSummary]) -> list[MethodSummary]:
    """Fill in Holm's p over all comparisons that have one."""
    raw = {item.method: item.against.p for item in summaries if item.against and item.against.p is not None}
    adjusted: Mapping[str, float] = {}
    if raw:
        adjusted = dict(zip(raw, multipletests(list(raw.values()), method="holm")[1].tolist(), strict=True))
    return [
        replace(item, against=replace(item.against, p_holm=adjusted.get(item.method))) if item.against else item
        for item in summaries
    ]


def _read_table(path: Path) -> pd.DataFrame:
    """Read one results.csv. Raises StoreError with the file and what is wrong in it."""
    try:
        # Text first: a client may be called "007", "nan" or "NA".
        table = pd.read_csv(io.StringIO(_whole_lines(path)), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise StoreError(f"'{path}' cannot be read as CSV ({error}): resume the run to write it again") from None
    missing = [name for name in RESULT_COLUMNS if name not in table.columns]
    if missing:
        raise StoreError(f"'{path}' has no column {', '.join(missing)}: results.csv has {', '.join(RESULT_COLUMNS)}")
    written = table["value"].str.strip()
    try:
        table["seed"] = pd.to_numeric(table["seed"]).astype("int64")
        table["round"] = pd.to_numeric(table["round"]).astype("int64")
        table["value"] = [float(text) if text else math.nan for text in written]
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"'{path}' has a seed, round or value that is no number ({error}): n/a is written as an empty value"
        ) from None
    diverged = (written != "") & table["value"].isna() & table["metric"].isin(list(LOWER_IS_BETTER))
    table.loc[diverged, "value"] = math.inf
    return table[list(RESULT_COLUMNS)].drop_duplicates(
        [name for name in RESULT_COLUMNS if name != "value"], keep="last"
    )


def _whole_lines(path: Path) -> str:
    """Read a CSV file without a last line that a crash left short; resuming writes that line again."""
    text = path.read_text(encoding="utf-8")
    head, newline, last = text.rpartition("\n")
    return head + newline if last.count(",") < len(RESULT_COLUMNS) - 1 else text


def _configured_order(path: Path) -> dict[str, int]:
    """Return the place of each method folder in a study's config; empty if the config is absent or unreadable."""
    try:
        entries = parse_yaml(path.read_text(encoding="utf-8"), str(path))["methods"]
        return {MethodEntry.model_validate(entry).folder: place for place, entry in enumerate(entries)}
    except (OSError, ValueError, TypeError, KeyError, FedMiraError):
        return {}  # only the order of the lines depends on it
