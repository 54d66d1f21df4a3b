"""The command line: parse, call one function, print.

Results go to standard output, progress and logs to standard error; exit codes are the contract's. A command imports
what it needs when it runs: help, lists, reports and refusals do not wait for torch. Annotations are evaluated when this
file is read (no `from __future__ import annotations`): typer compiles those that are text, of all commands, every time.
"""

import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmira import bundled
from fedmira.cli.adapting import adapt
from fedmira.cli.arguments import PlainGroup
from fedmira.cli.comparing import compare, sweep
from fedmira.cli.ending import (
    INTERRUPTED,
    Terminated,
    catch_signals,
    course,
    flush_streams,
    output_failed,
    steady_streams,
)
from fedmira.cli.federation import federation
from fedmira.cli.options import AsJson, Debug, Overrides, Quiet, Verbose
from fedmira.cli.show import questions, show_examples, show_plan, side_by_side, visible
from fedmira.errors import ConfigError, FedMiraError, Stopped

if TYPE_CHECKING:
    from fedmira.export.merged_model import Merged
    from fedmira.reports.record import StudyRecord

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(federation, name="federation")
app.command()(adapt)
app.command()(compare)
app.command()(sweep)

# Newer typer contains its own click: its errors are not those of the package `click`, which may not be installed.
USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

PLAIN_WIDTH = 120  # of tables in a file or a pipe


def _show_version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        print(f"fedmira {importlib.metadata.version('fedmira')}")
        raise typer.Exit


@app.callback()
def fedmira(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Federated multi-task fine-tuning of language models with LoRA: one base, one personal adapter per client."""


@app.command()
def init(
    file: Annotated[str, typer.Argument(help="the config to write")] = "fedmira.yaml",
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="your data, read once to find format and clients")] = None,
    model: Annotated[str | None, typer.Option(help="base model: a folder or a hub name")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a commented config to start with; it runs as it is, unless a note says what is missing."""
    from fedmira.cli.init import UNDECIDED, draft_config

    words = list(overrides or [])
    if re.match(r"[a-z_]+(\.[\w-]+)*=", file):  # no file, and an override first
        file, words = "fedmira.yaml", [file, *words]
    draft = draft_config(Path(file), data=data, model=model, overrides=words)
    if as_json:
        print(json.dumps({"config": file, **draft}))
        return
    clients = f"one client per {draft['by']}" if draft["by"] != UNDECIDED else "clients: not decided yet"
    clients = clients if draft["partitioner"] is None else f"clients: {json.dumps(draft['partitioner'])}"
    for note in draft["notes"]:
        print(visible(f"note: {note}"), file=sys.stderr)
    print(visible(f"wrote {file}: format {draft['format']}, {clients}"))
    print(visible(f"next: fedmira run {shlex.quote(file)} --show-example, then --dry-run"))


@app.command()
def run(
    config: Annotated[str, typer.Argument(help=f"YAML file, or one of: {', '.join(bundled.presets())}")],
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a study in output_dir")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what it would cost; write nothing")] = False,
    show_example: Annotated[
        bool, typer.Option("--show-example", help="print one example per client as the model gets it")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a study: every method with every seed of a config."""
    from fedmira.study.loading import load_config

    checked = load_config(config, overrides or [])  # what follows is imported once the config is not refused
    from fedmira.cli.progress import Watch
    from fedmira.study import face as study

    with Watch(quiet or as_json) as watch:
        if show_example:
            from fedmira.study import dry_run as preview

            shown = list(preview.show_examples(checked, observer=watch))
        elif dry_run:
            from fedmira.study import dry_run as preview

            plan = preview.plan_study(checked, overwrite=overwrite, observer=watch)
        else:
            done = study.run(checked, observer=watch, overwrite=overwrite)
    if show_example:
        show_examples(shown, as_json)
    elif dry_run:
        show_plan(plan, as_json)
    else:
        show_study(done.path, as_json)


@app.command()
def resume(
    path: Annotated[Path, typer.Argument(help="a study, or one of its runs")],
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Continue a study that was stopped, or for more rounds (federation.rounds=N)."""
    from fedmira.cli.progress import Watch
    from fedmira.study import face as study

    with Watch(quiet or as_json) as watch:
        course.study = path  # whatever happens now, this goes on with it
        done = study.resume(path, overrides or [], observer=watch)
    show_study(done.path, as_json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="a study, or one of its runs")],
    table: Annotated[str | None, typer.Option(help="print the main table as csv, md or latex")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="folder for the charts as SVG and, with matplotlib, for papers")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write report.html, summary.json and results.csv again from a study's files."""
    from fedmira.disk.folders import find_study
    from fedmira.reports.record import read_study
    from fedmira.reports.render import write_pages

    folder, _ = find_study(path)
    record = read_study(folder.path)
    text = None
    if table is not None:
        from fedmira.reports.tables import table_text

        text = table_text(record, table)
    write_pages(record)
    if figures is not None:
        from fedmira.reports import paper
        from fedmira.reports.figures import write_figures

        for written in write_figures(record, figures):
            print(visible(f"figure: {written}"), file=sys.stderr)
        if not paper.available():
            print(f"note: {paper.HINT}", file=sys.stderr)
    if text is not None:
        print(text, end="")
    else:
        _show(record, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run: STUDY/<method>/seed-<n>")],
    client: Annotated[str | None, typer.Option(help="one client, by name or id; default: all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the copies; default: adapters, or merged with --merge")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="write whole models: adapters merged into the base")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="of merged models: float32, bfloat16, float64; default: the run's")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy clients' adapters out of a run, as PEFT folders or merged into the base, and print how to serve them."""
    from fedmira.study import face as study

    opened = study.load_run(run)
    if merge:
        models = study.merge(opened, client=client, out=out or Path("merged"), dtype=dtype)
        _show_merged(models, opened.clients, as_json)
        return
    if dtype is not None:
        raise ConfigError(["--dtype is for merged models only; give --merge too"], "export")
    from fedmira.export.vllm import serve_line

    settings, architecture = opened.config.model, opened.facts.architecture
    copies = study.export(opened, client=client, out=out or Path("adapters"))
    line = visible(serve_line(settings.base_model, copies, revision=settings.revision, architecture=architecture))
    if as_json:
        print(json.dumps({"adapters": [str(path) for path in copies], "vllm": line}))
        return
    print("\n".join(visible(str(path)) for path in copies))
    print(line, file=sys.stderr)


@app.command()
def chat(
    run: Annotated[Path | None, typer.Argument(help="a run: STUDY/<method>/seed-<n>", show_default=False)] = None,
    client: Annotated[str | None, typer.Option(help="whose adapter: a name or an id")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="a PEFT folder, beside or without a run")] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="one question; default: ask until Ctrl-D")
    ] = None,
    model: Annotated[str | None, typer.Option(help="another base: a folder or a hub name")] = None,
    template: Annotated[
        str | None, typer.Option(help="another template: alpaca, chat, none, plain, chatml, zephyr or a file")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="length of an answer; default: 128")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Ask a client's adapter and the untouched base the same questions, side by side."""
    from fedmira.cli.chat import open_chat

    opened = open_chat(
        run, client=client, folders=adapter or (), model=model, template=template, max_new_tokens=max_new_tokens
    )
    print(visible(f"template {opened.template.name}; greedy answers; Ctrl-D ends"), file=sys.stderr)
    for text in [prompt] if prompt is not None else questions():
        replies = opened.ask(text)
        print(json.dumps(replies, ensure_ascii=False) if as_json else side_by_side(replies), flush=True)
        if output_failed():
            break


@app.command()
def methods(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the methods: what each does, who gets an adapter, what the server must see, what travels, the papers.

    Bytes are those of a round. S: its clients. P: numbers of a client's row. With default settings.
    """
    from fedmira.cli.method_list import stored_facts

    facts_by_name = stored_facts()
    if as_json:
        print(json.dumps({name: asdict(facts) for name, facts in facts_by_name.items()}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # one line each, for grep
        print("\n".join(f"{name:12s} {facts.about} {facts.line}" for name, facts in facts_by_name.items()))
        return
    table = Table.grid(padding=(0, 2))
    for name, facts in facts_by_name.items():
        table.add_row(Text(name), Text(f"{facts.about}\n{facts.line}"))
    console.print(table)
    console.print("\nBytes are those of a round. S: its clients. P: numbers of a client's row.")


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Print versions, device, memory, disk and speed of this machine, for a bug report."""
    from fedmira.cli.doctor import describe_machine, examine

    facts = examine(Path.cwd())
    print(json.dumps(facts, indent=2) if as_json else visible("\n".join(describe_machine(facts))))


def show_study(path: Path, as_json: bool) -> None:
    """Print the results of a study whose report is written."""
    from fedmira.reports.record import read_study

    _show(read_study(path), as_json)


def _show(record: "StudyRecord", as_json: bool) -> None:
    """Print the table of a study and where its results are."""
    if as_json:
        print((record.path / "summary.json").read_text(encoding="utf-8").rstrip())
        return
    from rich.console import Console

    from fedmira.reports.terminal import summary_tables

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for table in summary_tables(record, encoding=console.encoding, width=console.width):
        console.print(table)
    for run in record.runs:
        adapters = record.path / run.folder / "adapters"
        if adapters.is_dir():  # those of a federation are at its sites
            print(visible(f"adapters: {adapters}"))
    print(visible(f"report:   {record.path / 'report.html'}"))


def _show_merged(models: "Sequence[Merged]", names: Mapping[str, str], as_json: bool) -> None:
    """Print where merged models are, and how far their logits are from those of the base with a separate adapter.

    names: each client's, by id.
    """
    if as_json:
        differences = {model.client: model.difference for model in models}
        print(json.dumps({"models": [str(model.path) for model in models], "differences": differences}))
        return
    from fedmira.export.vllm import serve_merged_line

    print("\n".join(visible(str(model.path)) for model in models))
    for model in models:
        blurred = "; rounding hides much of what the adapter does: --dtype float32 keeps it" if model.blurred else ""
        name = visible(names.get(model.client, model.client))
        about = (
            f"{name}: logits differ by at most {model.difference:.1e} of the largest from base and adapter "
            f"apart ({model.dtype}); the adapter moves them by {model.effect:.1e}{blurred}"
        )
        print(visible(about), file=sys.stderr)
    print(visible(serve_merged_line(models[0].path)), file=sys.stderr)


def main() -> None:
    """Run the command line and turn every error into one message and an exit code of the contract."""
    steady_streams()
    catch_signals()
    logger = logging.getLogger("fedmira")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries configure the root logger
    logger.addHandler(_log_to_stderr(logging.INFO if {"-v", "--verbose"} & set(sys.argv) else logging.WARNING))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs retries; we report their outcome
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells of kernels for its own layers, which we replace
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looking for them reads the metadata of every package
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is first asked for something
    code = _run_command(debug="--debug" in sys.argv)
    flush_streams()
    sys.exit(code)


def _run_command(*, debug: bool) -> int:
    """Run one command; print what went wrong and return the exit code."""
    try:
        ended = app(standalone_mode=False)
        if ended == INTERRUPTED:  # newer typer catches Ctrl-C and returns the exit code
            raise KeyboardInterrupt
    except USAGE_ERROR as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print(visible(f"interrupted: {course.how_to_go_on()}"), file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print(visible(f"stopped: {course.how_to_go_on()}"), file=sys.stderr)
        return Stopped.exit_code
    except FedMiraError as error:
        if debug:
            _trace(error)
        text = str(error)
        if isinstance(error, Stopped) and course.command is not None:
            text += f"; continue with: {course.command}"
        print(f"error: {visible(text)}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if course.interrupted:  # a library has turned it into an error of its own
            print(visible(f"interrupted: {course.how_to_go_on()}"), file=sys.stderr)
            return INTERRUPTED
        _trace(error)
        print(f"bug: {type(error).__name__}; please report it with the lines above", file=sys.stderr)
        return 1
    return 0


def _trace(error: BaseException) -> None:
    """Print the tracebacks of an error and its causes, with the messages of our own errors only.

    A library's message may contain text of an example (KeyError and ValueError show the value); from Python the
    exception has the whole message.
    """
    chain = [error]
    while cause := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        chain.append(cause)
    for link in reversed(chain):
        message = f": {visible(str(link))}" if isinstance(link, FedMiraError) else " (its message is not shown)"
        frames = "".join(traceback.format_tb(link.__traceback__))
        print(f"Traceback (most recent call last):\n{frames}{type(link).__qualname__}{message}\n", file=sys.stderr)


class _Plain(logging.Formatter):
    """Writes one log record on one line that cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(f"{record.levelname.lower()}: {record.getMessage()}")


def _log_to_stderr(level: int) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(_Plain())
    return handler
