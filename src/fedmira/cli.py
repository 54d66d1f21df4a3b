"""The command line: parse, call one function, print.

Results go to standard output, progress and logs to standard error; exit codes are the contract's.
"""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedmira import bundled, study
from fedmira.errors import FedMiraError, Stopped
from fedmira.reports.render import summary_tables

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated multi-task fine-tuning of language models with LoRA: one base, one personal adapter per client.",
)

# Newer typer carries a click of its own: its errors are no errors of the package `click`, which may not even be there.
USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

Overrides = Annotated[list[str] | None, typer.Argument(help="a.b=c, applied to the config", show_default=False)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="no progress")]
AsJson = Annotated[bool, typer.Option("--json", help="print machine-readable JSON")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


PLAIN_WIDTH = 120  # of tables that go to a file or a pipe


class Watch:
    """Prints what a study does: live bars on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.name = ""

    def __enter__(self) -> "Watch":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        show = getattr(self, f"on_{event}", None)
        if show is not None:
            show(facts)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_data(self, facts: Mapping[str, Any]) -> None:
        clients, cut = facts["clients"], facts["truncation"]
        counts = [len(client.train) for client in clients]
        self.say(
            f"data: {facts['format']}, {len(clients)} clients, {sum(counts)} training examples "
            f"({min(counts)} to {max(counts)} each), {sum(client.trained_tokens for client in clients)} trained tokens"
        )
        if cut.prompts_cut or cut.answers_cut or cut.dropped:
            self.say(
                f"truncation: of {cut.examples} examples {cut.prompts_cut} prompts cut at their start, "
                f"{cut.answers_cut} answers cut at their end, {cut.dropped} dropped"
            )
        if cut.questions_cut:
            self.say(f"truncation: {cut.questions_cut} prompts cut at their start where an answer is written to them")

    def on_model(self, facts: Mapping[str, Any]) -> None:
        federation = facts["federation"]
        base = federation.base
        self.say(
            f"base: {federation.config.model.base_model}, {str(base.dtype).removeprefix('torch.')} on {base.device}; "
            f"adapters: rank {federation.config.lora.r} on {len(base.shapes)} layers, "
            f"{federation.layout.parameters:,} parameters each; {facts['sampled']} clients a round, "
            f"{federation.cohort} in one pass"
        )

    def on_start(self, facts: Mapping[str, Any]) -> None:
        self.say(f"{facts['what']} ...")

    def on_run(self, facts: Mapping[str, Any]) -> None:
        run = facts["facts"]
        self.name = f"{run['label']}, seed {run['seed']}"
        pull = run["pull_percent"]
        coupled = f": pull per round {pull[1]:.3g} % (from {pull[0]:.3g} to {pull[2]:.3g})" if pull else ""
        self.say(f"{self.name}{coupled}")
        for note in facts["notes"]:
            self.say(f"warning: {note}")
        self._bar(self.name, run["rounds"])

    def on_round(self, facts: Mapping[str, Any]) -> None:
        record = facts["record"]
        loss = "" if record.validation_loss is None else f", validation loss {record.validation_loss:.4f}"
        trained = sum(record.train_loss) / len(record.train_loss)
        line = f"train loss {trained:.4f}{loss}, {record.seconds:.1f} s"
        if self.console.is_terminal:
            self._move(record.round, f"{self.name}: {line}")
        else:
            self.say(f"{self.name}: round {record.round}/{facts['rounds']}: {line}")
        for name, reason in record.refused.items():
            self.say(f"warning: round {record.round}: upload of '{name}' refused: {reason}")

    def on_scoring(self, facts: Mapping[str, Any]) -> None:
        if self.task is None or facts["done"] == facts["clients"] or self.bars.tasks[-1].total != facts["clients"]:
            self._bar(f"{self.name or 'base'}: writing test answers", facts["clients"])
        self._move(facts["done"])

    def on_complete(self, facts: Mapping[str, Any]) -> None:
        self._drop()
        if facts["refused"]:
            self.say(f"warning: {self.name}: {facts['refused']} uploads were refused; log.txt says which and why")

    def _bar(self, text: str, total: int) -> None:
        self._drop()
        self.task = self.bars.add_task(text, total=total)

    def _move(self, done: int, text: str | None = None) -> None:
        if self.task is not None:
            if text is None:
                self.bars.update(self.task, completed=done)
            else:
                self.bars.update(self.task, completed=done, description=text)

    def _drop(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None


@app.command()
def run(
    config: Annotated[str, typer.Argument(help=f"YAML file, or one of: {', '.join(bundled.presets())}")],
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a study in output_dir")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a study: every method with every seed of a config."""
    with Watch(quiet or as_json) as watch:
        done = study.run(study.load_config(config, overrides or []), observer=watch, overwrite=overwrite)
    _show(done, as_json)


@app.command()
def resume(
    path: Annotated[Path, typer.Argument(help="a study, or one of its runs")],
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go on with a study that was stopped, or for more rounds (federation.rounds=N)."""
    with Watch(quiet or as_json) as watch:
        done = study.resume(path, overrides or [], observer=watch)
    _show(done, as_json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="a study, or one of its runs")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write report.html and summary.json again from what a study has on disk."""
    _show(study.Study(study.report(path).parent), as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run: STUDY/<method>/seed-<n>")],
    client: Annotated[str | None, typer.Option(help="one client; default: all")] = None,
    out: Annotated[Path, typer.Option(help="folder for the copies")] = Path("adapters"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy clients' adapters out of a run, as standard PEFT folders."""
    copies = [str(path) for path in study.export(run, client=client, out=out)]
    print(json.dumps({"adapters": copies}) if as_json else "\n".join(copies))


@app.command()
def methods(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the methods, with the first line of each one's description."""
    found = {name: (study.load_method(name).__doc__ or "").strip().splitlines()[0] for name in study.methods()}
    if as_json:
        print(json.dumps(found))
        return
    for name, line in found.items():
        print(f"{name:12s} {line}")


def _show(done: study.Study, as_json: bool) -> None:
    """Print the table of a study and where its results lie."""
    if as_json:
        print((done.path / "summary.json").read_text(encoding="utf-8").rstrip())
        return
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for table in summary_tables(done.path):
        console.print(table)
    for opened in done.runs:
        console.print(f"adapters: {opened.path / 'adapters'}", highlight=False, soft_wrap=True)
    console.print(f"report:   {done.path / 'report.html'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line and turn every error into one message and an exit code of the contract."""
    logger = logging.getLogger("fedmira")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries set up the root logger as they like
    logger.addHandler(_warnings_to_stderr())
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what came of them is our message
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, _stop)
    try:
        ended = app(standalone_mode=False)
        if ended == 130:  # newer typer swallows Ctrl-C and returns the code it would exit with
            raise KeyboardInterrupt
        code = 0
    except USAGE_ERROR as error:
        error.show()  # type: ignore[attr-defined]
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted: finished rounds are saved; go on with 'fedmira resume STUDY'", file=sys.stderr)
        code = 130
    except _Terminated:
        print("stopped: finished rounds are saved; go on with 'fedmira resume STUDY'", file=sys.stderr)
        code = Stopped.exit_code
    except FedMiraError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        traceback.print_exc()
        print(f"bug: {type(error).__name__}; please report it with the lines above", file=sys.stderr)
        code = 1
    sys.exit(code)


class _Terminated(SystemExit):
    """SIGTERM came; unlike other exits (a closed pipe) it is told as a stop."""


def _stop(number: int, frame: object) -> None:
    """End a run that a scheduler stops (SIGTERM) as Ctrl-C does: SystemExit passes every `except Exception`."""
    raise _Terminated(Stopped.exit_code)


def _warnings_to_stderr() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return handler
