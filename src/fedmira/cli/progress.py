"""What a user sees while FedMira works: live bars on a terminal, plain lines elsewhere, all on standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedmira.adapters.ranks import shown
from fedmira.cli.show import plural, visible
from fedmira.data.partition import shown_name
from fedmira.data.rows import FAULTS_SHOWN

if TYPE_CHECKING:
    from fedmira.engine.federation import Federation
    from fedmira.study.intake import Intake

UNKNOWN_SHARE = 0.01  # of the tokens; below it, rare characters


def _adapter(of: Federation, layers: int) -> str:
    """Say what every client trains."""
    what = f"rank {shown(of.ranks)} on {layers} layers"
    if not of.layout.low_rank:
        what = plural(of.layout.virtual_tokens, "virtual token")
    return f"{what}, {of.layout.parameters:,} parameters each"


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
        self.name = ""  # of the run under way
        self.step = ""  # what the bar counts, if not rounds

    def __enter__(self) -> Watch:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        show = getattr(self, f"on_{event}", None)
        if show is not None:
            show(facts)

    def say(self, text: str) -> None:
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=True)

    def on_data(self, facts: Mapping[str, Any]) -> None:
        self._drop()
        intake: Intake = facts["intake"]
        clients, cut = intake.clients, intake.truncation
        counts = [len(client.train) for client in clients]
        keys = f" ({', '.join(intake.keys.values())})" if intake.keys else ""
        self.say(
            f"data: format {intake.format}{keys}, template {intake.template}; {plural(len(clients), 'client')}, "
            f"{plural(sum(counts), 'training example')} ({min(counts)} to {max(counts)} each), "
            f"{sum(client.trained_tokens for client in clients)} trained tokens"
        )
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
        if intake.unknown > UNKNOWN_SHARE:
            self.say(
                f"warning: {intake.unknown:.0%} of the training tokens are unknown to the base's tokenizer; nothing "
                "can be learned from them: take a base whose tokenizer knows these texts"
            )
        if intake.glued:
            self.say(
                f"warning: {plural(intake.glued, 'prompt')} run into their answers without a space or line break; "
                "put one at the end of the prompt, or take a template (alpaca, chat, a file)"
            )
        if intake.pooled:
            self.say(
                f"warning: the data's own splits ({', '.join(intake.pooled)}) are mixed and drawn anew; to keep them: "
                "data.split_column=split"
            )
        if intake.left_out:
            self.say(f"warning: the partitioner leaves out {intake.left_out} of {intake.examples} examples")
        if cut.prompts_cut or cut.answers_cut or cut.dropped:
            self.say(
                f"truncation: of {cut.examples} examples {cut.prompts_cut} prompts cut at their start, "
                f"{cut.answers_cut} answers cut at their end, {cut.dropped} dropped"
            )
        if cut.questions_cut:
            self.say(f"truncation: {cut.questions_cut} prompts cut at their start where an answer is written to them")
        if alone := [client.name for client in clients if len(client.train) == 1]:
            self.say(
                f"warning: {plural(len(alone), 'client')} with one training example only, such as "
                f"'{shown_name(alone[0])}': scores on an empty split are n/a, and an adapter trained on one text may "
                "give it away"
            )

    def on_model(self, facts: Mapping[str, Any]) -> None:
        prepared, workplace = facts["prepared"], facts["prepared"].workplace
        base = workplace.base
        adapters = " or ".join(_adapter(kind, len(base.shapes)) for kind in facts["kinds"])
        self.say(
            f"base: {prepared.config.model.base_model}, {str(base.dtype).removeprefix('torch.')} on {base.device}; "
            f"adapters: {adapters}; {facts['sampled']} clients a round, {workplace.cohort} in one pass"
        )

        for split in ("validation", "test"):
            if not any(getattr(client, split) for client in workplace.clients):
                self.say(f"warning: no client has a {split} example (data.split, split_column): its scores are n/a")

    def on_start(self, facts: Mapping[str, Any]) -> None:
        self.say(f"{facts['what']} ...")

    def on_run(self, facts: Mapping[str, Any]) -> None:
        run = facts["facts"]
        self.name = f"{run['label']}, seed {run['seed']}"
        pull = run["pull_percent"]
        coupled = f": pull per round {pull[1]:.3g} % (from {pull[0]:.3g} to {pull[2]:.3g})" if pull else ""
        self.say(f"{self.name}{coupled}")
        self._bar(self.name, run["rounds"])

    def on_round(self, facts: Mapping[str, Any]) -> None:
        record = facts["record"]
        loss = "" if record.validation_loss is None else f", validation loss {record.validation_loss:.4f}"
        trained = sum(record.train_loss) / len(record.train_loss)
        learned = "nobody trains" if math.isnan(trained) else f"train loss {trained:.4f}"
        line = f"{learned}{loss}, {record.seconds:.1f} s"
        if self.console.is_terminal:
            self._move(record.round, f"{self.name}: {line}")
        else:
            self.say(f"{self.name}: round {record.round}/{facts['rounds']}: {line}")

    def on_encoding(self, facts: Mapping[str, Any]) -> None:
        self._step("tokenising clients", facts)

    def on_scoring(self, facts: Mapping[str, Any]) -> None:
        self._step(f"{self.name or 'base'}: writing test answers", facts)

    def on_tuning(self, facts: Mapping[str, Any]) -> None:
        self._step(f"{self.name}: fine-tuning client by client", facts)

    def on_export(self, facts: Mapping[str, Any]) -> None:
        self._step(f"{self.name}: writing adapters", facts)

    def on_complete(self, facts: Mapping[str, Any]) -> None:
        self._drop()
        if facts["refused"]:
            self.say(f"warning: {self.name}: {facts['refused']} uploads were refused; log.txt says which and why")

    def _step(self, text: str, facts: Mapping[str, Any]) -> None:
        """Move the bar of a step that goes client by client."""
        if self.step != text:
            self._bar(text, facts["clients"])
            self.step = text
        self._move(facts["done"])

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
