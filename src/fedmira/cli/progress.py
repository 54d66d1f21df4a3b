"""What a user sees while FedMira works: live bars on a terminal, plain lines elsewhere, all on standard error."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedmira.adapters.ranks import shown
from fedmira.cli.ending import course
from fedmira.cli.show import override, plural, time_of, visible
from fedmira.data.rows import FAULTS_SHOWN
from fedmira.engine.events import AnswersWritten, ClientsDone, ClientsTuned, Event, RoundDone, StoppedEarly
from fedmira.names import shown_name, told_apart
from fedmira.study.events import (
    AdaptersWritten,
    ClientsEncoded,
    DataRead,
    RunBegun,
    RunDone,
    StepBegun,
    StudyBegun,
    StudyPrepared,
    Tracked,
)

if TYPE_CHECKING:
    from fedmira.disk.folders import RoundRecord
    from fedmira.disk.run_facts import RunFacts
    from fedmira.engine.federation import Federation
    from fedmira.study.assemble import Prepared
    from fedmira.study.intake import Intake

SPELLINGS_SHOWN = 8
ALIKE_SHOWN = 5
OWNERS_SHOWN = 3
UNKNOWN_SHARE = 0.01  # of the tokens, or of the answers, of a split; below it, rare characters


def _adapter(of: Federation, layers: int) -> str:
    """Say what every client trains."""
    what = f"rank {shown(of.ranks)} on {layers} layers"
    if not of.layout.low_rank:
        what = plural(of.layout.virtual_tokens, "virtual token")
    return f"{what}, {of.layout.parameters:,} parameters each"


@dataclass
class Remaining:
    """How long the runs of a study will still take, if their rounds go on as those seen so far.

    seconds left = (seconds since the first run began / rounds seen) x rounds left, of this run and the runs after it.
    What a finished run needed beside its rounds (tests, adapters) is in the mean.
    """

    runs: int  # to be carried out, this one included
    began: float | None = None  # when the first of them began, in seconds of any clock
    begun: int = 0  # runs
    seen: int = 0  # rounds

    def begin_run(self, now: float) -> None:
        self.began = now if self.began is None else self.began
        self.begun += 1

    def end_round(self, number: int, rounds: int, now: float) -> float:
        """Return the seconds left after round `number` of `rounds`."""
        self.seen += 1
        left = rounds - number + max(self.runs - self.begun, 0) * rounds
        return 0.0 if self.began is None else (now - self.began) / self.seen * left


class Watch:
    """Prints what a study does: live bars on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, markup=False, emoji=False)
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.name = ""  # of the run under way
        self.step = ""  # what the bar counts, if not rounds
        self.remaining = Remaining(1)

    def __enter__(self) -> Watch:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case DataRead():
                self._show_data(event.intake)
            case StudyPrepared():
                self._show_study(event.prepared)
            case StepBegun():
                self.say(f"{event.what} ...")
            case StudyBegun():
                course.study = event.folder
                self.remaining = Remaining(event.runs)
            case RunBegun():
                self._show_run(event.facts)
            case RoundDone():
                self._show_round(event.record, event.rounds)
            case StoppedEarly():
                self.say(f"{self.name}: stopped early after round {event.round} of {event.rounds}: {event.reason}")
            case ClientsEncoded():
                self._move_step("tokenising clients", event)
            case AnswersWritten():
                self._move_step(f"{self.name or 'base'}: writing test answers", event)
            case ClientsTuned():
                self._move_step(f"{self.name}: fine-tuning client by client", event)
            case AdaptersWritten():
                self._move_step(f"{self.name}: writing adapters", event)
            case RunDone():
                self._drop()
                if event.refused:
                    self.say(f"warning: {self.name}: {event.refused} uploads were refused; log.txt says which and why")

            case Tracked():
                self.say(f"{event.tracker}: {event.command}")

    def say(self, text: str) -> None:
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=True)

    def _show_data(self, intake: Intake) -> None:
        self._drop()
        clients, cut = intake.clients, intake.truncation
        counts = [len(client.train) for client in clients]
        keys = f" ({', '.join(intake.keys.values())})" if intake.keys else ""
        self.say(
            f"data: format {intake.format}{keys}, template {intake.template.name}; {plural(len(clients), 'client')}, "
            f"{plural(sum(counts), 'training example')} ({min(counts)} to {max(counts)} each), "
            f"{sum(client.trained_tokens for client in clients)} trained tokens"
        )
        if intake.found:
            more = f"; and {len(intake.found) - FAULTS_SHOWN} more" if len(intake.found) > FAULTS_SHOWN else ""
            self.say(f"found: {'; '.join(intake.found[:FAULTS_SHOWN])}{more}")
        if intake.others:
            self.say(f"warning: {plural(intake.others, 'file')} of another kind in the folder, not read")
        if intake.empty:
            self.say(f"warning: {plural(intake.empty, 'file')} without an example")
        if odd := sum(client.asked_otherwise for client in clients):
            self.say(
                f"warning: {plural(odd, 'example')} do not begin with the prompt that the template asks with "
                "(add_generation_prompt), so answers are asked for as never in training; compare them in the template"
            )
        if intake.skipped:
            total = intake.examples + len(intake.skipped)
            self.say(f"warning: {len(intake.skipped)} of {total} examples cannot be read and are skipped:")
            for fault in intake.skipped[:FAULTS_SHOWN]:
                self.say(f"  - {fault}")
        unknown = intake.unknown.items()
        if any(max(found.share, found.answers / found.examples) > UNKNOWN_SHARE for _, found in unknown):
            shares = ", ".join(f"{found.share:.1%} of the {split}" for split, found in unknown)
            answers = ", ".join(f"{found.answers} of {found.examples} in {split}" for split, found in unknown)
            self.say(
                f"warning: the base's tokenizer does not know {shares} tokens; answers with such tokens: {answers}. "
                "Nothing can be learned from them, and no method can match such an answer: take a base whose tokenizer "
                "knows these texts"
            )
        if intake.glued:
            self.say(
                f"warning: {plural(intake.glued, 'prompt')} {'runs' if intake.glued == 1 else 'run'} into the answer "
                "without a space or line break; put one at the end of the prompt, or take a template (alpaca, chat, a "
                "file)"
            )
        if intake.pooled:
            column, names = intake.pooled
            self.say(
                f"warning: the data's own splits ({', '.join(map(shown_name, names))}) are mixed and drawn anew; to "
                f"keep them: {override('data.split_column', column)}"
            )
        if intake.spelled:
            read = ", ".join(
                f"{shown_name(value)} as {split}" for value, split in list(intake.spelled.items())[:SPELLINGS_SHOWN]
            )
            more = ", ..." if len(intake.spelled) > SPELLINGS_SHOWN else ""
            self.say(f"splits: read {read}{more}")
        for column, groups in intake.alike.items():
            listed = "; ".join(
                " and ".join(f"'{name}'" for name in told_apart(group)) for group in groups[:ALIKE_SHOWN]
            )
            more = f"; and {len(groups) - ALIKE_SHOWN} more" if len(groups) > ALIKE_SHOWN else ""
            self.say(
                f"warning: {plural(len(groups), 'value')} of '{shown_name(column)}' in several spellings, of which "
                f"each counts as another: {listed}{more}; if they are the same, make them equal in the data"
            )
        for key, (count, first) in intake.unread.items():
            self.say(f"warning: {key} is not read, in {plural(count, 'example')}; the first is {first}")
        if intake.special:
            written = ", ".join(f"{name} in {plural(count, 'example')}" for name, count in intake.special.items())
            effect = (
                "read as plain text"
                if intake.special_as_text
                else "read as control tokens; to read them as plain text: data.special_tokens=text"
            )
            self.say(f"warning: special tokens of the base in the data: {written}; {effect}")
        if intake.special_in_template:
            self.say(f"special tokens of the base in the template: {', '.join(intake.special_in_template)}")
        if intake.left_out:
            self.say(f"warning: the partitioner leaves out {intake.left_out} of {intake.examples} examples")
        if intake.mixed:
            columns = ", ".join(f"'{shown_name(name)}' ({count} values)" for name, count in intake.mixed[:OWNERS_SHOWN])
            first = override("data.clients.by", intake.mixed[0].column)
            self.say(
                f"note: the partitioner mixes what {columns} separates; for a client per value: {first} "
                "data.clients.partitioner=null"
            )
        if cut.prompts_cut or cut.answers_cut or cut.dropped:
            self.say(
                f"truncation: of {cut.examples} examples {cut.prompts_cut} prompts cut at their start, "
                f"{cut.answers_cut} answers cut at their end, {cut.dropped} dropped"
            )
        if cut.questions_cut:
            self.say(f"truncation: {cut.questions_cut} prompts cut at their start where an answer is written to them")
        if intake.too_long:
            self.say(
                f"warning: {len(intake.too_long)} of {plural(intake.asked, 'test answer')} cannot be written in full, "
                f"so no method can match them: they have up to {max(intake.too_long)} tokens; raise "
                "evaluation.max_new_tokens"
            )
        if intake.wordless:
            self.say(
                f"warning: {intake.wordless} of {plural(intake.asked, 'test answer')} have no letter a to z and no "
                "digit: their rouge_l is 0 whatever is written; exact_match, word_accuracy and rouge_l_paper know all "
                "letters"
            )
        if alone := [client.name for client in clients if len(client.train) == 1]:
            self.say(
                f"warning: {plural(len(alone), 'client')} with one training example only, such as "
                f"'{shown_name(alone[0])}': scores on an empty split are n/a, and an adapter trained on one text may "
                "give it away"
            )

    def _show_study(self, prepared: Prepared) -> None:
        workplace = prepared.workplace
        base = workplace.base
        adapters = " or ".join(_adapter(kind, len(base.shapes)) for kind in prepared.kinds().values())
        self.say(
            f"base: {prepared.config.model.base_model}, {str(base.dtype).removeprefix('torch.')} on {base.device}; "
            f"adapters: {adapters}; {prepared.sampled} clients a round, {workplace.cohort} in one pass"
            f"{'' if prepared.workers is None else f', computed by {prepared.workers} actors of Ray'}"
            f"{', whose blocks are recomputed in backward' if workplace.recompute else ''}"
            f"{'' if workplace.at_once is None else f', {workplace.at_once} examples of each at once'}"
        )

        for split in ("validation", "test"):
            if not any(getattr(client, split) for client in workplace.clients):
                self.say(f"warning: no client has a {split} example (data.split, split_column): its scores are n/a")

    def _show_run(self, facts: RunFacts) -> None:
        self.remaining.begin_run(time.monotonic())
        self.name = f"{facts.label}, seed {facts.seed}"
        pull = facts.pull_percent
        coupled = f": pull per round {pull[1]:.3g} % (from {pull[0]:.3g} to {pull[2]:.3g})" if pull else ""
        self.say(f"{self.name}{coupled}")
        self._bar(self.name, facts.rounds)

    def _show_round(self, record: RoundRecord, rounds: int) -> None:
        loss = "" if record.validation_loss is None else f", validation loss {record.validation_loss:.4f}"
        trained = [loss for loss in record.train_loss if not math.isnan(loss)]  # of those whose upload counts
        learned = f"train loss {sum(trained) / len(trained):.4f}" if trained else "nobody trains"
        named = {"signal_to_noise": "signal to noise", "epsilon": "epsilon of a client"}
        noise = "".join(f", {what} {record.notes[name]:.3g}" for name, what in named.items() if name in record.notes)
        left = self.remaining.end_round(record.round, rounds, time.monotonic())
        further = f", about {time_of(left)} left" if left else ""
        line = f"{learned}{loss}{noise}, {record.seconds:.1f} s{further}"
        if self.console.is_terminal:
            self._move(record.round, f"{self.name}: {line}")
        else:
            self.say(f"{self.name}: round {record.round}/{rounds}: {line}")

    def _move_step(self, text: str, event: ClientsDone) -> None:
        """Move the bar of a step that goes client by client."""
        if self.step != text:
            self._bar(text, event.clients)
            self.step = text
        self._move(event.done)

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
        self.step = ""
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
