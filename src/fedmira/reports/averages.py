"""Means, intervals and tests over clients without scipy and statsmodels, whose import takes seconds."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

# Quantiles of Student's t at 0.975 for 1 to 30 degrees of freedom.
T_975 = (
    12.706204736174694,
    4.302652729749462,
    3.1824463052837078,
    2.7764451051977934,
    2.5705818356363146,
    2.4469118511449786,
    2.364624251592784,
    2.306004135204166,
    2.262157162798205,
    2.228138851986274,
    2.200985160091639,
    2.1788128296672284,
    2.1603686564627913,
    2.144786687917804,
    2.131449545559776,
    2.1199052992212546,
    2.1098155778333156,
    2.1009220402410382,
    2.0930240544083087,
    2.085963447265864,
    2.0796138447276795,
    2.0738730679040254,
    2.0686576104190486,
    2.0638985616280245,
    2.0595385527532972,
    2.0555294386428735,
    2.0518305164802846,
    2.0484071417952454,
    2.045229642132703,
    2.0422724563012378,
)
MOST_EXACT = 50  # pairs up to which the signed-rank test is exact if no two differences tie and none is zero
MOST_EXACT_TIED = 13  # and if some do


def mean(values: Iterable[float]) -> float:
    """Average, independent of the order of the values; NaN are left out; NaN if no value is left."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan
    total = math.fsum(known) if all(map(math.isfinite, known)) else sum(known)
    return total / len(known)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """sum_k n_k x_k / sum_k n_k; None if the weights add up to nothing. An infinite value with a weight counts."""
    total = math.fsum(weights)
    if not total > 0:
        return None
    parts = [weight * value for value, weight in zip(values, weights, strict=True) if weight]
    return (math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)) / total


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % t-interval of a mean over clients; None below two, or if one is infinite."""
    count = len(values)
    if count < 2 or not all(math.isfinite(value) for value in values):
        return None
    return t_quantile(count - 1) * _deviation(values) / math.sqrt(count)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None below two values, or if one is infinite or NaN."""
    return None if len(values) < 2 or not all(map(math.isfinite, values)) else _deviation(values)


def _deviation(values: Sequence[float]) -> float:
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def t_quantile(freedom: int) -> float:
    """Return the quantile of Student's t at 0.975."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def signed_rank_p(differences: Sequence[float]) -> float:
    """The two-sided p of Wilcoxon's signed-rank test; zero differences are dropped, at least one is not zero.

    With few pairs all 2^n signs of the ranks are counted; else R+ is assumed normal, its variance corrected for ties.
    The choice is that of scipy.stats.wilcoxon. Source: Wilcoxon 1945; Cureton 1967.
    """
    nonzero = [value for value in differences if value != 0]
    ranks = _doubled_ranks([abs(value) for value in nonzero])
    positive = sum(rank for rank, value in zip(ranks, nonzero, strict=True) if value > 0)
    tied = len(set(ranks)) < len(ranks) or len(nonzero) < len(differences)
    if len(differences) <= (MOST_EXACT_TIED if tied else MOST_EXACT):
        return _exact_p(ranks, positive)
    count = len(nonzero)
    ties = sum(size**3 - size for size in Counter(ranks).values())
    deviation = math.sqrt((count * (count + 1.0) * (2.0 * count + 1.0) - ties / 2) / 24)
    z = (positive / 2 - count * (count + 1.0) * 0.25) / deviation
    return math.erfc(abs(z) / math.sqrt(2))


def rank_biserial(differences: Sequence[float]) -> float | None:
    """The effect size of the signed-rank test, (R+ - R-) / (R+ + R-); zero differences dropped, None if all are.

    1: every difference is positive; 0: both sides weigh the same. Source: Kerby 2014.
    """
    nonzero = [value for value in differences if value != 0]
    if not nonzero:
        return None
    ranks = _doubled_ranks([abs(value) for value in nonzero])
    signed = sum(rank if value > 0 else -rank for rank, value in zip(ranks, nonzero, strict=True))
    return signed / sum(ranks)


def _doubled_ranks(sizes: Sequence[float]) -> list[int]:
    """Twice the rank of each size, which is an integer: equal sizes have the mean of their ranks."""
    ordered = sorted(sizes)
    first = {size: index for index, size in reversed(list(enumerate(ordered)))}
    last = {size: index for index, size in enumerate(ordered)}
    return [first[size] + last[size] + 2 for size in sizes]


def _exact_p(ranks: Sequence[int], positive: int) -> float:
    """Count the signs of the ranks whose positive sum is at most, and at least, the one found."""
    ways = [1] + [0] * sum(ranks)  # number of signs with each sum
    for rank in ranks:
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    return min(1.0, 2 * min(sum(ways[: positive + 1]), sum(ways[positive:])) / 2 ** len(ranks))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number: in ascending order p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)).

    Source: Holm 1979.
    """
    ordered = sorted(p, key=lambda name: p[name])
    adjusted = accumulate((p[name] * (len(p) - index) for index, name in enumerate(ordered)), max)
    return {name: min(1.0, value) for name, value in zip(ordered, adjusted, strict=True)}
