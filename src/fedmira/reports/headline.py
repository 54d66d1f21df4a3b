"""The conclusions that a study's figures support, as sentences."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from fedmira.reports.record import Metric, StudyRecord
from fedmira.reports.stats import FEWEST_PAIRS, Comparison
from fedmira.reports.wording import chance, clean, number, phrase, plural

ALPHA = 0.05
Verdict = Literal["better", "worse", "mixed", "unclear", "equal", "few", "none"]
OPPOSITE = {"better": "worse", "worse": "better"}


class Statement(NamedTuple):
    """One method against training alone.

    verdict, from p after Holm's correction: better | worse (p < 0.05, with mean and majority on that side), mixed
    (p < 0.05, but they disagree), unclear (p >= 0.05), equal (no client differs), few (too few clients for a test),
    none (no pair).
    """

    method: str
    verdict: Verdict
    text: str


def headline(record: StudyRecord) -> list[Statement]:
    """Return one statement per method on the judged metric, the largest gain first; never empty.

    If there is nothing to compare, the only statement says so.
    """
    judged = record.judged
    if judged is None:
        return [Statement("", "none", "No run has been tested yet.")]
    by_gain = [
        (_gain(judged, item.against), _statement(record.metrics, judged, item.method, item.against))
        for item in judged.methods
        if item.against
    ]
    if by_gain:
        return [statement for _, statement in sorted(by_gain, key=lambda pair: pair[0], reverse=True)]
    if all(run.label != record.baseline for run in record.runs):
        said = "No client was trained alone (method local), so no method can be compared with that."
    elif all(run.label == record.baseline for run in record.runs):
        said = f"Only {clean(record.baseline)} was run, so there is nothing to compare it with."
    else:
        said = "There is nothing to compare yet: training alone and another method have to be tested first."
    return [Statement("", "none", said)]


def verdict(metric: Metric, against: Comparison) -> Verdict:
    """Return what one comparison supports; see Statement."""
    if not against.pairs:
        return "none"
    if not against.wins and not against.losses:
        return "equal"
    if against.p_holm is None:
        return "few"
    if against.p_holm >= ALPHA:
        return "unclear"
    gain = _gain(metric, against)
    if gain > 0 and against.wins > against.losses:
        return "better"
    return "worse" if gain < 0 and against.losses > against.wins else "mixed"


def _gain(metric: Metric, against: Comparison) -> float:
    """Mean gain, positive is better; -inf, which sorts last, without a number (no pair, infinities on both sides)."""
    if against.difference is None or against.difference != against.difference:
        return float("-inf")
    return -against.difference if metric.lower_is_better else against.difference


def _statement(metrics: Sequence[Metric], judged: Metric, method: str, against: Comparison) -> Statement:
    decided = verdict(judged, against)
    name, what = clean(method), phrase(judged.name)
    alone = "training alone" if against.baseline == "local" else f"training alone ({clean(against.baseline)})"
    of = f"{against.wins:,} of {plural(against.pairs, 'client')}"
    split = f"better for {of}, worse for {against.losses:,}"
    p = _p(against)
    text = {
        "better": f"{name} beat {alone} on {what} for {of}: {_shift(against)} ({p}).",
        "worse": f"{name} did worse than {alone} on {what} for {against.losses:,} of "
        f"{plural(against.pairs, 'client')}: {_shift(against)} ({p}).",
        "mixed": f"{name} and {alone} differ on {what} ({p}), but not one way: {split}, {_shift(against)}.",
        "unclear": f"{name} and {alone} cannot be told apart on {what}: {split}, {_shift(against)} ({p}).",
        "equal": f"{name} and {alone} have the same {what} for every client ({against.pairs:,} compared).",
        "few": f"Too few clients to tell {name} from {alone}: on {what} {split}; a test needs {FEWEST_PAIRS} clients.",
        "none": f"{name} cannot be compared with {alone}: no client has a {what} under both.",
    }[decided]
    return Statement(method, decided, text + _disagreement(metrics, judged, method, decided))


def _disagreement(metrics: Sequence[Metric], judged: Metric, method: str, decided: Verdict) -> str:
    """Name the metrics on which a method's verdict is the opposite."""
    said = ""
    for metric in metrics:
        against = next((item.against for item in metric.methods if item.method == method), None)
        if metric is judged or against is None or OPPOSITE.get(decided) != verdict(metric, against):
            continue
        clients = against.wins if decided == "worse" else against.losses
        said += (
            f" On {phrase(metric.name)} it is the other way round: {OPPOSITE[decided]} for {clients:,} of "
            f"{against.pairs:,} ({_p(against)})."
        )
    return said


def _p(against: Comparison) -> str:
    if against.p_holm is None:
        return ""
    said = chance(against.p_holm)
    return f"p {said}" if said.startswith("<") else f"p = {said}"


def _shift(against: Comparison) -> str:
    """Describe how far the mean moved."""
    difference = against.difference
    if difference is None or difference != difference:
        return "without a mean, because losses diverged"
    if not difference:
        return "level on average"
    return f"{number(abs(difference))} {'higher' if difference > 0 else 'lower'} on average"
