"""Chat with adapters and with the base that they were trained on: the same question to all of them.

The base and all LoRA adapters answer in one pass, prompts in another pass for each number of virtual tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmira import bundled
from fedmira.adapters import Adapters
from fedmira.adapters.parts import Gate
from fedmira.data.encode import encode_questions
from fedmira.data.formats import Record, Turn
from fedmira.data.special import as_text
from fedmira.data.templates import Template, make_template
from fedmira.disk.client_names import read_client_names
from fedmira.disk.folders import GATE, RunFolder
from fedmira.errors import ConfigError, ModelError
from fedmira.evaluation.embed import last_states
from fedmira.evaluation.gated import cosines
from fedmira.export.adapter_config import check_adapter
from fedmira.export.asking import CHAT_TEMPLATE, takes_single_requests
from fedmira.export.card import base_sha256_in
from fedmira.export.gate_file import read_gate
from fedmira.export.panels import Panel, read_panels
from fedmira.methods import recipe_of
from fedmira.methods.base import Cohort
from fedmira.model.answers.generate import answers
from fedmira.model.base.load import Base, load_base, load_tokenizer
from fedmira.model.base.targets import Wanted
from fedmira.model.base.vocabulary import check_ids
from fedmira.study.adapting import quantisation_of, wanted_of
from fedmira.study.face import Run

log = logging.getLogger(__name__)

BASE = "base"
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Gated:
    """A client under a gate. place: the speaker; adapters [1, P]: both parts; references [m, d]: states of prompts."""

    place: int
    gate: Gate
    adapters: Adapters
    references: Tensor

    def mixed(self, base: Base, question: Sequence[int]) -> Adapters:
        """Return the adapter that answers a question, by its similarity to the client's prompts."""
        state = last_states(base, [question], self.gate.look(self.adapters), [0])
        return self.gate.mix(self.adapters, cosines(state, self.references.numpy()))


@dataclass(eq=False)
class Chat:
    """Several speakers on one base, each with the history of its own conversation.

    names: "base" first, then one per adapter; each speaker has a place in one panel.
    """

    names: tuple[str, ...]
    base: Base
    panels: tuple[Panel, ...]
    template: Template
    max_new_tokens: int
    remembers: bool = True  # the template shows conversations
    turns: list[list[Turn]] = field(default_factory=list)  # of each speaker; stays empty for single requests
    gated: Gated | None = None  # the speaker whose adapters a gate mixes for every question
    reader: Any = None  # the tokenizer of questions, where it is not the base's: special tokens in them are text

    def ask(self, text: str) -> dict[str, str]:
        """Return the greedy answer of each speaker. Raises ConfigError if the text is empty."""
        if not text.strip():
            raise ConfigError(["the question is empty"], "chat")
        self.turns = self.turns or [[] for _ in self.names]
        questions = [
            Record("", "", ("-",), {}, "the question", (*history, Turn("user", text)))
            if self.template.complete
            else Record(text, "", ("-",), {}, "the question")
            for history in self.turns
        ]
        replies = [""] * len(self.names)
        for panel in self.panels:
            panel_replies = self._answers(panel, [questions[speaker] for speaker in panel.places])
            for speaker, reply in zip(panel.places, panel_replies, strict=True):
                replies[speaker] = reply
        if self.template.complete and self.remembers:
            for history, reply in zip(self.turns, replies, strict=True):
                history += [Turn("user", text), Turn("assistant", reply)]
        return dict(zip(self.names, replies, strict=True))

    def _answers(self, panel: Panel, questions: Sequence[Record]) -> list[str]:
        """Answer one question per speaker of a panel in one pass. A question is cut to the positions left for it."""
        positions = self.base.max_positions
        taken = self.max_new_tokens + panel.adapters.layout.virtual_tokens
        encoded = encode_questions(
            [self.template.render(question) for question in questions],
            self.reader or self.base.tokenizer,
            self.template,
            max_question=None if positions is None else positions - taken,
        )
        check_ids(
            encoded,
            self.base.tokenizer,
            vocabulary=self.base.vocabulary,
            name=self.base.name,
            where=f"questions (template {self.template.name})",
        )
        adapters = panel.adapters
        if self.gated is not None and panel.places == (self.gated.place,):
            adapters = self.gated.mixed(self.base, encoded[0])
        texts = answers(self.base, adapters, [[ids] for ids in encoded], max_new_tokens=self.max_new_tokens)
        return [speaker_texts[0].strip() for speaker_texts in texts]


def open_chat(
    run: Path | None = None,
    *,
    client: str | None = None,
    folders: Sequence[Path] = (),
    model: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
) -> Chat:
    """Load a base with the adapter of a run's client, or PEFT folders made for it, or both.

    client: its name or its id. model and template: instead of the run's; without a run, the default is the base that
    the first folder names, and the chat template in that folder, else the tokenizer's if it has one. max_new_tokens:
    None = 128, or half of the base's positions.
    Raises ConfigError, StoreError or ModelError: no adapter, no such client, folders for other bases or layers.
    """
    faults = []
    if run is None and client is not None:
        faults.append("--client names a client of a run; give the run too")
    if run is None and not folders:
        faults.append("no adapter to chat with: give RUN --client ID, or --adapter PATH")
    if run is not None and client is None and not folders:
        known = read_client_names(run).listed(path.name for path in (run / "adapters").glob("*")) or "none yet"
        faults.append(f"--client is missing; clients of this run: {known}")
    if max_new_tokens is not None and max_new_tokens < 1:
        faults.append(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    if faults:
        raise ConfigError(faults, "chat")
    opened = None if run is None else Run(run)
    facts = None if opened is None else opened.facts
    own = [] if opened is None or client is None else [opened.adapters(client)]
    chosen = [(read_client_names(folder.parent.parent).name(folder.name), folder) for folder in own]
    chosen += [(_name(folder), folder) for folder in folders]
    configs = [check_adapter(folder) for _, folder in chosen]
    usual_base = configs[0].base_model if facts is None else facts.base_model
    if not (model or usual_base):
        raise ConfigError([f"'{configs[0].folder}' names no base model; give --model"], "chat")
    base_name = bundled.resolve(model or str(usual_base))
    settings = None if opened is None else opened.config
    revision = settings.model.revision if settings is not None and model is None else None
    try:
        tokenizer = load_tokenizer(base_name, revision=revision)
    except ModelError as error:
        if model is not None or facts is not None:
            raise
        raise ModelError(f"{error}; '{configs[0].folder}' names this base: give its folder with --model") from None
    beside = configs[0].folder / CHAT_TEMPLATE  # how the first adapter was trained
    usual = "chat" if getattr(tokenizer, "chat_template", None) else "none"
    usual = str(beside) if facts is None and beside.is_file() else usual
    template_name = template or (None if facts is None else facts.template) or usual
    rendered_by = make_template(template_name, usual=usual, tokenizer=tokenizer)
    reader = None
    if settings is not None and settings.data.special_tokens == "text":
        rendered_by, reader = as_text(rendered_by, tokenizer)
    single = template_name == str(beside) and takes_single_requests(beside.read_text(encoding="utf-8"))
    usual_targets = Wanted() if settings is None else wanted_of(settings.lora)  # prompts do not name any
    targets = next((config.targets for config in configs if not config.is_prompt), usual_targets)
    dtype = "auto" if facts is None else facts.dtype
    of_run = None if settings is None or model is not None else quantisation_of(settings.model)
    base = load_base(
        base_name, revision=revision, dtype=dtype, targets=targets, tokenizer=tokenizer, quantisation=of_run
    )
    if model is None and facts is not None and facts.base_fingerprint != base.fingerprint:
        raise ModelError(
            f"model.base_model '{facts.base_model}' is not the base this run was trained on (sha256 "
            f"{base.fingerprint[:12]}, trained on {facts.base_fingerprint[:12]}); restore that base"
        )
    for folder in folders:
        if (trained_on := base_sha256_in(folder)) not in {None, base.fingerprint}:
            log.warning(
                "the card of '%s' names another base, sha256 %s, and this one is %s: its answers may be worse; of one "
                "trained in 4 or 8 bits chat with RUN --client",
                folder,
                trained_on,
                base.fingerprint,
            )
    names = [BASE, *(name for name, _ in chosen)]
    distinct = tuple(name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names))
    new_tokens = _new_tokens(max_new_tokens, base.max_positions, ahead=max(config.virtual_tokens for config in configs))
    gated = None if opened is None or client is None else _gated(opened, own[0], base)
    panels = read_panels(base, [None, *configs])
    if gated is not None:  # alone in a panel, because its adapter is another one for every question
        panels = (*_without(panels, gated.place), Panel((gated.place,), gated.adapters))
    return Chat(distinct, base, panels, rendered_by, new_tokens, not single, gated=gated, reader=reader)


def _gated(run: Run, folder: Path, base: Base) -> Gated | None:
    """Return the client of a run, the first speaker after the base, if its method has a gate."""
    if not (folder / GATE).exists():
        return None
    nobody = Cohort(("client",), (1,), ({},), (), run.facts.seed)
    gate = recipe_of(run.config.methods[0]).build(nobody).client.gate
    return None if gate is None else Gated(1, gate, *read_gate(folder, base))


def _without(panels: Sequence[Panel], place: int) -> Iterator[Panel]:
    """Yield the panels without one of their places."""
    for panel in panels:
        kept = [index for index, one in enumerate(panel.places) if one != place]
        if kept:
            yield Panel(tuple(panel.places[index] for index in kept), panel.adapters.take(torch.tensor(kept)))


def _new_tokens(requested: int | None, positions: int | None, *, ahead: int) -> int:
    """Return the length of an answer; None: 128, or half of the base's positions after virtual tokens.

    Raises ConfigError if that leaves no room for a question.
    """
    if positions is None:
        return requested or DEFAULT_NEW_TOKENS
    new = requested or max(1, min(DEFAULT_NEW_TOKENS, (positions - ahead) // 2))
    if new + ahead >= positions:
        virtual = f", of which virtual tokens take {ahead}" if ahead else ""
        raise ConfigError([f"--max-new-tokens {new}: the base has {positions} positions in all{virtual}"], "chat")
    return new


def _name(folder: Path) -> str:
    """Name a PEFT folder; a folder of a run with its method too, so that adapters of two methods have two names."""
    run = RunFolder(folder.absolute().parent.parent)
    if folder.absolute().parent.name != "adapters" or not (run.path / "run.json").is_file():
        return folder.name
    return f"{read_client_names(run.path).name(folder.name)} of {run.facts.label}"
