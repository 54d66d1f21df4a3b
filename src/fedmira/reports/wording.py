"""Figures and names as text for people; `None` and NaN are n/a, a diverged loss is ∞."""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmira.reports.stats import MethodSummary

MINUS = "\u2212"
NAMES = {
    "loss": "Test loss",
    "rouge_l": "ROUGE-L",
    "rouge_l_paper": "ROUGE-L (package rouge)",
    "exact_match": "Exact match",
    "word_accuracy": "Word accuracy",
}
# Control characters, surrogates, and marks that reorder the text around them: shown by number, so that a name can
# neither hide nor rearrange the text beside it.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def title(metric: str) -> str:
    """Name a metric in the head of a table."""
    return NAMES.get(metric, metric)


def phrase(metric: str) -> str:
    """Name a metric inside a sentence."""
    return title(metric) if metric.startswith("rouge_l") else title(metric).lower() if metric in NAMES else metric


def number(value: float | None, digits: int = 3) -> str:
    """Format a measured value; a value that would round to zero keeps two digits."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference with its sign, for the page."""
    if value is None or math.isnan(value):
        return "n/a"
    sign = "+" if value > 0 else MINUS if value < 0 else ""
    return sign + number(abs(value), digits)


def interval(summary: MethodSummary | None) -> str:
    """Format a mean with half of its interval."""
    if summary is None or summary.mean is None:
        return "n/a"
    half = f" ± {number(summary.half_width)}" if summary.half_width is not None else ""
    return number(summary.mean) + half


def counts(summary: MethodSummary) -> str:
    """Format wins/ties/losses; empty where nothing is compared."""
    return f"{summary.against.wins}/{summary.against.ties}/{summary.against.losses}" if summary.against else ""


def chance(p: float) -> str:
    """Format a p value."""
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def count(value: Any) -> str:
    """Format a whole number with separated thousands; anything else is n/a."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "n/a"


def plural(value: int, word: str) -> str:
    """Write a number and a noun: 1 client, 2 clients."""
    return f"{value:,} {word}{'' if value == 1 else 's'}"


def size(value: Any) -> str:
    """Format a number of bytes with a decimal unit; anything else is n/a."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "n/a"
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(value) // 3), len(units) - 1) if value >= 1 else 0
    return f"{value / 1000**power:.{1 if power else 0}f} {units[power]}"


def seconds(value: Any) -> str:
    """Format a time; anything but a number is n/a."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "n/a"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spread(values: Any) -> str:
    """Format a list of numbers as its smallest and largest; anything else is n/a."""
    numbers = [item for item in values if isinstance(item, int | float)] if isinstance(values, Sequence) else []
    return between(f"{min(numbers):.2g}", f"{max(numbers):.2g}") if numbers else "n/a"


def between(low: object, high: object) -> str:
    """Write a range, or its only value."""
    first, last = (f"{end:,}" if isinstance(end, int) else str(end) for end in (low, high))
    return first if first == last else f"{first} to {last}"


def clean(text: object) -> str:
    """Make a name from others' data safe to show: characters that cannot be seen are written as their number."""
    return _UNSEEN.sub(lambda match: f"[U+{ord(match.group()):04X}]", str(text))


def short(text: object, limit: int) -> str:
    """Clean a name and cut it to `limit` characters."""
    cleaned = clean(text)
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"


def fitted(text: object, ems: float) -> str:
    """Clean a name and cut it to a width of about `ems` in a usual font, because letters differ in width."""
    cleaned = clean(text)
    width = 0.0
    for index, letter in enumerate(cleaned):
        width += _width(letter)
        if width > ems:
            return cleaned[: max(index - 1, 1)] + "…"
    return cleaned


def _width(letter: str) -> float:
    """Estimate a letter's width in ems; rather too large than too small."""
    if unicodedata.combining(letter):
        return 0.0
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.1
    return 1.0 if letter in "mwMW@%" else 0.4 if letter in "ijlftrI.,:;'|!()[] " else 0.8 if letter.isupper() else 0.68


def listed(names: Iterable[object], most: int) -> str:
    """List at most `most` names, and the number of those left out."""
    all_names = list(names)
    rest = f" and {len(all_names) - most:,} more" if len(all_names) > most else ""
    return ", ".join(short(name, 40) for name in all_names[:most]) + rest


def unbroken(text: str) -> str:
    """Keep "p = 0.01" on one line."""
    return re.sub(r"\bp ([=<]) ", "p\u00a0\\1\u00a0", text)


def pretty(fields: Mapping[str, Any]) -> str:
    """Write settings as indented JSON."""
    return json.dumps(dict(fields), indent=2, ensure_ascii=False)
