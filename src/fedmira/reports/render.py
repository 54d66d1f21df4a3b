"""A study's report: one self-contained HTML page, and summary.json for programs."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmira.disk.files import write_atomic
from fedmira.reports import axes, choices, curves, facts, gain, network
from fedmira.reports.headline import headline
from fedmira.reports.paths import config_without_folders
from fedmira.reports.record import StudyRecord, read_study
from fedmira.reports.stats import UNTOUCHED_BASE, curve
from fedmira.reports.tables import results_csv
from fedmira.reports.templates import page_template

SCHEMA = 1


def write_report(study: Path) -> Path:
    """Write STUDY/report.html, summary.json and results.csv, each atomically; return the page's path.

    Raises StoreError if the study has no results, or cannot be written.
    """
    record = read_study(study)
    write_pages(record)
    return study / "report.html"


def write_pages(record: StudyRecord) -> None:
    """Write report.html, summary.json and results.csv of a study that has been read.

    Raises StoreError if they cannot be written.
    """
    page, summary = render_page(record), _summary_json(record)
    write_atomic(record.path / "results.csv", results_csv(record).encode("utf-8", "backslashreplace"))
    write_atomic(record.path / "summary.json", summary.encode("utf-8", "backslashreplace"))
    write_atomic(record.path / "report.html", page.encode("utf-8", "backslashreplace"))


def render_page(record: StudyRecord) -> str:
    """Return the page's HTML. Raises StoreError if a graph.json is damaged."""
    styles = axes.styles(record.labels, record.baseline)
    examples, examples_left_out = facts.shown_examples(record)
    ordered = sorted(record.metrics, key=lambda metric: metric is not record.judged)
    config = record.path / "config.yaml"
    return page_template().render(
        record=record,
        base_name=UNTOUCHED_BASE,
        statements=headline(record),
        basis=facts.basis(record),
        notices=[*network.notices(record), *facts.notices(record)],
        styles=styles,
        tables=[(metric, *gain.dots(metric)) for metric in ordered],
        dots_box=gain.DOTS,
        charts=[
            (name, chart)
            for name, box in (("wide", curves.WIDE), ("narrow", curves.NARROW))
            if (chart := curves.curve_chart(record, styles, box))
        ],
        curve_table=curves.curve_table(record),
        mergings=[merging for label in record.labels if (merging := curves.merging(record, label))],
        gains=[gain.gain_panels(record, metric) for metric in ordered],
        networks=network.networks(record),
        choices=choices.shown_choices(record),
        clients=facts.client_tables(record),
        examples=examples,
        examples_left_out=examples_left_out,
        runs=facts.run_lines(record),
        data=facts.data_facts(record),
        sampling=facts.sampling_facts(record),
        setup=facts.setup_facts(record),
        config=config_without_folders(config.read_text(encoding="utf-8", errors="replace")) if config.is_file() else "",
        marks={"better": axes.CIRCLE, "worse": axes.SQUARE, "level": axes.DIAMOND},
        colours={"better": axes.BETTER, "worse": axes.WORSE, "level": "#767676"},
    )


def _summary_json(record: StudyRecord) -> str:
    """Return summary.json: every figure of the headline tables, numbers unrounded, null = n/a."""
    kept = record.of_last_round
    summary = {
        "schema": SCHEMA,
        "study": record.name,
        "baseline": record.baseline,
        "judged": record.judged.name if record.judged else None,
        "headline": [statement._asdict() for statement in headline(record)],
        "metrics": {
            metric.name: {
                "split": "test",
                "lower_is_better": metric.lower_is_better,
                "base": asdict(metric.base) if metric.base else None,
                "methods": [asdict(item) for item in metric.methods],
                **({"of_last_round": [asdict(item) for item in last]} if (last := kept.get(metric.name)) else {}),
            }
            for metric in record.metrics
        },
        "costs": {label: costs._asdict() for label, costs in record.costs.items()},
        "validation_loss": curve(record.results),
        "runs": [
            {"folder": run.folder, "label": run.label, "seed": run.seed, "state": run.state}
            | {"adapters": run.adapters, "never_sampled": run.never_sampled}
            | {"method": run.facts.method, "bytes_up": run.facts.bytes_up, "bytes_down": run.facts.bytes_down}
            | {"seconds": run.facts.seconds}
            | ({"keep": "best"} if run.facts.keep == "best" else {})
            | ({"stopped_early": run.facts.stopped_early} if run.stopped_early else {})
            for run in record.runs
        ],
    }
    return json.dumps(_plain(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Replace numbers that JSON does not have: a diverged loss becomes the text "inf", NaN becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
