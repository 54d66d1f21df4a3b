"""`fedmira compare`: methods on equal terms, each tuned by the same number of runs."""

from typing import Annotated

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

    checked = load_compared(
        config, overrides or [], methods=None if methods is None else methods.split(","), seeds=seeds, budget=budget
    )
    from fedmira.cli.ending import course
    from fedmira.cli.main import show_study
    from fedmira.cli.progress import Watch
    from fedmira.study import compare as comparing

    with Watch(quiet or as_json) as watch:
        words = ["fedmira", "compare", config, *(overrides or [])]
        for name, value in (("methods", methods), ("seeds", seeds), ("budget", budget)):
            words += [] if value is None else [f"--{name}", str(value)]
        course.again = words
        done = comparing.compare(checked, budget=budget, observer=watch, overwrite=overwrite)
    show_study(done, as_json)
