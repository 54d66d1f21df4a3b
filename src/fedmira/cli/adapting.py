"""`fedmira adapt`: an adapter for a client that comes when the study is over."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmira.cli.options import AsJson, Debug, Quiet, Verbose

if TYPE_CHECKING:
    from fedmira.study.adapt import Adapted


def adapt(
    run: Annotated[Path, typer.Argument(help="a complete run: STUDY/<method>/seed-<n>")],
    data: Annotated[Path, typer.Option(help="the new client's data, in the study's format")],
    client: Annotated[str | None, typer.Option(help="its name; default: the file's")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="its local steps; default: as many as a client of the run took on average")
    ] = None,
    output: Annotated[Path, typer.Option(help="the adapter goes to OUTPUT/CLIENT")] = Path("adapted"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter that is there")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Give a client that comes when the study is over an adapter; the run does not change.

    It starts as the method lets a newcomer start, then trains alone; scored beside its start and training alone.
    """
    from fedmira.cli.progress import Watch
    from fedmira.study.adapt import adapt as carry_out

    with Watch(quiet or as_json) as watch:
        done = carry_out(run, data, client=client, steps=steps, output=output, overwrite=overwrite, observer=watch)
    if as_json:
        print(json.dumps({**asdict(done), "path": str(done.path)}))
    else:
        _show(done)


def _show(done: "Adapted") -> None:
    """Print one line for each adapter that was scored, and where the new one is."""
    from fedmira.cli.show import visible

    metrics = list(done.scores[0].test)
    lines = [["", "validation loss", *(f"test {metric}" for metric in metrics)]]
    for one in done.scores:
        values = [one.validation, *(one.test[metric] for metric in metrics)]
        lines.append([one.what, *("n/a" if value is None else f"{value:.3f}" for value in values)])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for first, *rest in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print(visible(f"{done.examples} examples, {done.steps} local steps, from the start of {done.method} and alone"))
    print(visible(f"adapter: {done.path}"))
