"""A study's report: one self-contained HTML page, and summary.json for programs."""

import json
import math
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from fedmira.disk.files import write_atomic
from fedmira.reports import axes, curves, facts, gain, network, wording
from fedmira.reports.headline import headline
from fedmira.reports.record import StudyRecord, read_study
from fedmira.reports.stats import UNTOUCHED_BASE, curve
from fedmira.reports.terminal import summary_tables

__all__ = ["summary_tables", "write_report"]

SCHEMA = 1
LONGEST_TEXT = 4000  # characters of an example that are shown


def write_report(study: Path) -> Path:
    """Write STUDY/report.html and STUDY/summary.json, each at once or not at all; return the page's path.

    Raises StoreError if the study has no results, or cannot be written.
    """
    record = read_study(study)
    page, summary = render_page(record), _summary_json(record)
    write_atomic(study / "summary.json", summary.encode("utf-8", "backslashreplace"))
    write_atomic(study / "report.html", page.encode("utf-8", "backslashreplace"))
    return study / "report.html"


def render_page(record: StudyRecord) -> str:
    """Return the page's HTML. Raises StoreError if a graph.json is damaged."""
    styles = axes.styles(record.labels, record.baseline)
    examples, examples_left_out = facts.shown_examples(record)
    ordered = sorted(record.metrics, key=lambda metric: metric is not record.judged)
    config = record.path / "config.yaml"
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            base_name=UNTOUCHED_BASE,
            statements=headline(record),
            basis=facts.basis(record),
            notices=facts.notices(record),
            styles=styles,
            tables=[(metric, *gain.dots(metric)) for metric in ordered],
            dots_box=gain.DOTS,
            charts=[
                (name, chart)
                for name, box in (("wide", curves.WIDE), ("narrow", curves.NARROW))
                if (chart := curves.curve_chart(record, styles, box))
            ],
            curve_table=curves.curve_table(record),
            mergings=[found for label in record.labels if (found := curves.merging(record, label))],
            gains=[gain.gain_panels(record, metric) for metric in ordered],
            networks=network.networks(record),
            clients=facts.client_tables(record),
            examples=examples,
            examples_left_out=examples_left_out,
            runs=facts.run_lines(record),
            data=facts.data_facts(record),
            sampling=facts.sampling_facts(record),
            setup=facts.setup_facts(record),
            config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
            marks={"better": axes.CIRCLE, "worse": axes.SQUARE, "level": axes.DIAMOND},
            colours={"better": axes.BETTER, "worse": axes.WORSE, "level": "#767676"},
        )
    )


@cache
def _environment() -> Environment:
    """The templates beside this file; compiled once in a process."""
    # Client names come from data that others wrote: autoescape stays on, and nothing is marked safe.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters |= {
        "number": wording.number,
        "signed": wording.signed,
        "interval": wording.interval,
        "chance": wording.chance,
        "clean": wording.clean,
        "short": wording.short,
        "plural": wording.plural,
        "count": wording.count,
        "unbroken": wording.unbroken,
        "pretty": wording.pretty,
        "phrase": wording.phrase,
        "cut": lambda text: text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " […]",
    }
    return environment


def _summary_json(record: StudyRecord) -> str:
    """Return summary.json: every figure of the headline tables, numbers unrounded, null = n/a."""
    summary = {
        "schema": SCHEMA,
        "study": record.name,
        "baseline": record.baseline,
        "judged": record.judged.name if record.judged else None,
        "headline": [asdict(statement) for statement in headline(record)],
        "metrics": {
            metric.name: {
                "split": "test",
                "lower_is_better": metric.lower_is_better,
                "base": asdict(metric.base) if metric.base else None,
                "methods": [asdict(item) for item in metric.methods],
            }
            for metric in record.metrics
        },
        "validation_loss": curve(record.results),
        "runs": [
            {"folder": run.folder, "label": run.label, "seed": run.seed, "state": run.state}
            | {"adapters": run.adapters, "never_sampled": run.never_sampled}
            | {"method": run.facts.method, "bytes_up": run.facts.bytes_up, "bytes_down": run.facts.bytes_down}
            | {"seconds": run.facts.seconds}
            for run in record.runs
        ],
    }
    return json.dumps(_plain(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Make a value fit for JSON, which has no infinity: a diverged loss becomes the text "inf"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
