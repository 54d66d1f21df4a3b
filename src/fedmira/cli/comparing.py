"""`fedmira compare`: methods on equal terms; `fedmira sweep`: a study at every point of a grid of settings."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmira import bundled
from fedmira.cli.options import AsJson, Debug, Overrides, Quiet, Verbose

DEFAULT_BUDGET = 4  # runs of tuning for each method


def compare(
    config: Annotated[str, typer.Argument(help=f"YAML file, or one of: {', '.join(bundled.presets())}")],
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="names or labels, separated by commas; default: those of the config")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="how many, from the first on; default: the config's")] = None,
    budget: Annotated[
        int, typer.Option(help="runs of tuning for each method: learning rate, then its own setting; 1: none is tuned")
    ] = DEFAULT_BUDGET,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="test every client's adapter on every client, of at most 100")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a comparison in output_dir")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tune methods by equal budgets on validation data, run them with every seed, and compare them with training alone.

    Called again it uses what is complete, goes on with what was stopped, and adds methods and seeds.
    """
    from fedmira.study.loading import load_compared

    named = None if methods is None else [name.strip() for name in methods.split(",")]
    checked = load_compared(config, overrides or [], methods=named, seeds=seeds, budget=budget)
    from fedmira.cli.ending import course
    from fedmira.cli.main import show_study
    from fedmira.cli.progress import Watch
    from fedmira.study import compare as comparing

    with Watch(quiet or as_json) as watch:
        words = ["fedmira", "compare", config, *(overrides or [])]
        for name, value in (("methods", methods), ("seeds", seeds), ("budget", budget)):
            words += [] if value is None else [f"--{name}", str(value)]
        course.again = [*words, *(["--matrix"] if matrix else [])]
        done = comparing.compare(checked, budget=budget, observer=watch, overwrite=overwrite, matrix=matrix)
    show_study(done, as_json)
    if matrix:
        _tell_of_matrices(done)


def _tell_of_matrices(study: Path) -> None:
    """Say how many clients would do better with the adapter of another, and where the matrices are."""
    from fedmira.cli.show import visible
    from fedmira.reports.crossing import crossings
    from fedmira.reports.record import read_study
    from fedmira.study.compare import MATRICES

    for one in crossings(read_study(study)):
        said = f"{one.label}: {one.better_elsewhere} of {len(one.clients)} clients would have a lower test loss with"
        print(visible(f"{said} some other client's adapter"), file=sys.stderr)
    print(visible(f"matrices: {study.parent / MATRICES}"), file=sys.stderr)


def sweep(
    config: Annotated[str, typer.Argument(help=f"YAML file, or one of: {', '.join(bundled.presets())}")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=v1,v2: a setting and its values; key=low..high, with --trials: a range; a.b=c: applied to the "
            "config",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="points, proposed by optuna from the validation losses so far, not a grid")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the studies in output_dir")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a study at every point of a grid of settings, each in a folder of its own, and print one table of all.

    With --trials the points are searched instead: each is proposed from the validation losses of those before it.
    A setting is named whole (training.learning_rate) or by its last word (learning_rate), or is one of the methods' own
    (lambda). Called again it uses what is complete and goes on with what was stopped.
    """
    from fedmira.cli.show import visible
    from fedmira.study import sweep as sweeping

    grid, overrides = sweeping.split_words(settings or [])
    points = [] if trials is not None else sweeping.plan_sweep(config, grid, overrides)
    from fedmira.cli.ending import course
    from fedmira.cli.progress import Watch
    from fedmira.study import search as searching

    best = None
    with Watch(quiet or as_json) as watch:
        course.again = ["fedmira", "sweep", config, *(settings or [])]
        if trials is None:
            lines = sweeping.sweep(points, watch, overwrite=overwrite)
        else:
            course.again += ["--trials", str(trials)]
            lines, best = searching.search(config, grid, overrides, trials=trials, observer=watch, overwrite=overwrite)
    if as_json:
        print(json.dumps(lines))
    else:
        _show_sweep(lines, list(grid))
    if best is not None:
        print(f"lowest validation loss: {visible(best.config.output_dir)}", file=sys.stderr)
    output = Path((best or points[0]).config.output_dir).parent
    _tell_of_figures(output, len(grid))


def _tell_of_figures(output: Path, swept: int) -> None:
    """Say where the figures of a sweep are, or what they need."""
    from fedmira.cli.show import visible
    from fedmira.reports.paper import HINT, available
    from fedmira.reports.sweeps import FIGURES

    if swept > 2:
        return
    print(visible(f"figures: {output / FIGURES}" if available() else f"note: {HINT}"), file=sys.stderr)


def _show_sweep(lines: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Print a table for each metric: a line for each point and method."""
    from rich.console import Console
    from rich.table import Table

    from fedmira.cli.main import PLAIN_WIDTH
    from fedmira.cli.show import visible
    from fedmira.reports.wording import number, signed, title

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for metric in dict.fromkeys(line["metric"] for line in lines):
        table = Table(title=visible(title(metric)), title_justify="left")
        for head in (*keys, "method"):
            table.add_column(visible(head))
        for head in ("mean", "± 95 %", "worst", "minus local", "p"):
            table.add_column(head, justify="right")
        for line in (line for line in lines if line["metric"] == metric):
            p = "" if line["p"] is None else f"{line['p']:.2g}"
            cells = [
                number(line["mean"]),
                number(line["half_width"]),
                number(line["worst"]),
                signed(line["difference"]),
            ]
            table.add_row(*(visible(str(line[key])) for key in keys), visible(line["method"]), *cells, p)
        console.print(table)
