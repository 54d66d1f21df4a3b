"""Talk to adapters beside the base they were trained on: the same question to all of them.

The base and all LoRA adapters answer in one pass; prompts of virtual tokens in another, for each number of them one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedmira import bundled
from fedmira.adapters import Adapters, lora_layout, soft_layout
from fedmira.data.encode import encode_questions
from fedmira.data.formats import Record, Turn
from fedmira.data.templates import Template, make_template
from fedmira.disk.folders import RunFolder
from fedmira.errors import ConfigError, ModelError, StoreError
from fedmira.export.peft_folder import PROMPT, read_adapter
from fedmira.model.answers.generate import answers
from fedmira.model.base.load import Base, load_base, load_tokenizer
from fedmira.model.base.trial import check_embeddings
from fedmira.study.face import Run

BASE = "base"
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Panel:
    """Speakers that answer in one pass: row i of `adapters` is that of number places[i] among all."""

    places: tuple[int, ...]
    adapters: Adapters


@dataclass(eq=False)
class Chat:
    """Several speakers on one base; each remembers the conversation as it went with itself.

    names: "base" first, then one per adapter; every one of them sits on one of the panels.
    """

    names: tuple[str, ...]
    base: Base
    panels: tuple[Panel, ...]
    template: Template
    max_new_tokens: int
    turns: list[list[Turn]] = field(default_factory=list)  # of each speaker; stays empty for single requests

    def ask(self, text: str) -> dict[str, str]:
        """Return what each speaker answers (greedy). Raises ConfigError if there is no question in the text."""
        if not text.strip():
            raise ConfigError(["the question is empty"], "chat")
        self.turns = self.turns or [[] for _ in self.names]
        asked = [
            Record("", "", ("-",), {}, "the question", (*own, Turn("user", text)))
            if self.template.complete
            else Record(text, "", ("-",), {}, "the question")
            for own in self.turns
        ]
        replies = [""] * len(self.names)
        for panel in self.panels:
            found = self._answers(panel, [asked[place] for place in panel.places])
            for place, reply in zip(panel.places, found, strict=True):
                replies[place] = reply
        if self.template.complete:
            for own, reply in zip(self.turns, replies, strict=True):
                own += [Turn("user", text), Turn("assistant", reply)]
        return dict(zip(self.names, replies, strict=True))

    def _answers(self, panel: Panel, asked: Sequence[Record]) -> list[str]:
        """Let a panel answer, a question each, in one pass. A question is cut to the positions that are left for it."""
        positions = self.base.max_positions
        taken = self.max_new_tokens + panel.adapters.layout.virtual_tokens
        ids = encode_questions(
            [self.template.render(one) for one in asked],
            self.base.tokenizer,
            self.template,
            max_question=None if positions is None else positions - taken,
        )
        written = answers(self.base, panel.adapters, [[own] for own in ids], max_new_tokens=self.max_new_tokens)
        return [own[0].strip() for own in written]


def open_chat(
    run: Path | None = None,
    *,
    client: str | None = None,
    folders: Sequence[Path] = (),
    model: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
) -> Chat:
    """Load a base with a client's adapter of a run, or any PEFT folders made for it, or both.

    model and template: in the place of the run's own; without a run, the base that the first folder names, and the
    tokenizer's chat template if it has one. max_new_tokens: None = 128, or half the base's positions.
    Raises ConfigError, StoreError or ModelError: nothing to talk to, no such client, folders of other bases or layers.
    """
    faults = []
    if run is None and client is not None:
        faults.append("--client names a client of a run; give the run too")
    if run is None and not folders:
        faults.append("nothing to talk to: give RUN --client ID, or --adapter PATH")
    if run is not None and client is None and not folders:
        known = ", ".join(sorted(path.name for path in (run / "adapters").glob("*"))[:8]) or "none yet"
        faults.append(f"--client is missing; there are: {known}")
    if max_new_tokens is not None and max_new_tokens < 1:
        faults.append(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    if faults:
        raise ConfigError(faults, "chat")
    opened = None if run is None else Run(run)
    facts = None if opened is None else opened.facts
    chosen = ([] if opened is None or client is None else [(client, opened.adapters(client))]) + [
        (_name(folder), folder) for folder in folders
    ]
    configs = [_read_config(folder) for _, folder in chosen]
    usual_base = str(configs[0].get("base_model_name_or_path")) if facts is None else facts.base_model
    wanted = bundled.resolve(model or usual_base)
    settings = None if opened is None else opened.config
    revision = settings.model.revision if settings is not None and model is None else None
    tokenizer = load_tokenizer(wanted, revision=revision)
    usual = "chat" if getattr(tokenizer, "chat_template", None) else "none"
    named = template or (None if facts is None else facts.template) or usual
    shown = make_template(named, usual=usual, tokenizer=tokenizer)
    usual_targets = "auto" if settings is None else settings.lora.target_modules  # which prompts say nothing of
    targets = next((config["target_modules"] for config in configs if not _tokens(config)), usual_targets)
    dtype = "auto" if facts is None else facts.dtype
    base = load_base(wanted, revision=revision, dtype=dtype, targets=targets, tokenizer=tokenizer)
    if model is None and facts is not None and facts.base_fingerprint != base.fingerprint:
        raise ModelError(
            f"model.base_model '{facts.base_model}' is not the base this run was trained on (sha256 "
            f"{base.fingerprint[:12]}, trained on {facts.base_fingerprint[:12]}); put that one back"
        )
    names = [BASE, *(name for name, _ in chosen)]
    distinct = tuple(name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names))
    new = _new_tokens(max_new_tokens, base.max_positions, ahead=max(map(_tokens, configs)))
    return Chat(distinct, base, _seat(base, [folder for _, folder in chosen], configs), shown, new)


def _new_tokens(wanted: int | None, positions: int | None, *, ahead: int) -> int:
    """Return the length of an answer; None: 128, or half of what virtual tokens leave of the base's positions.

    Raises ConfigError if that leaves a question no room.
    """
    if positions is None:
        return wanted or DEFAULT_NEW_TOKENS
    new = wanted or max(1, min(DEFAULT_NEW_TOKENS, (positions - ahead) // 2))
    if new + ahead >= positions:
        beside = f", of which virtual tokens take {ahead}" if ahead else ""
        raise ConfigError([f"--max-new-tokens {new}: the base has {positions} positions in all{beside}"], "chat")
    return new


def _seat(base: Base, folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """Seat the base (place 0) and all LoRA adapters on one panel, prompts on one for each number of virtual tokens."""
    tokens = [_tokens(config) for config in configs]
    plain = [place for place, count in enumerate(tokens) if not count]
    ranks = [int(configs[place]["r"]) for place in plain]
    layout = lora_layout(base.shapes, max(ranks, default=1))
    rows = [torch.zeros(1, layout.size), *(read_adapter(folders[place], layout) for place in plain)]
    scales = [0.0, *(float(configs[place]["lora_alpha"]) / rank for place, rank in zip(plain, ranks, strict=True))]
    own = torch.tensor([max(ranks, default=1), *ranks])
    panels = [Panel((0, *(place + 1 for place in plain)), Adapters(layout, torch.cat(rows), own, torch.tensor(scales)))]
    if any(tokens):
        check_embeddings(base.decoder, base.model.get_input_embeddings(), name=base.name)
    for count in sorted(set(tokens) - {0}):
        layout = soft_layout(base.width, count)
        seated = [place for place, other in enumerate(tokens) if other == count]
        rows = [read_adapter(folders[place], layout) for place in seated]
        unranked = torch.zeros(len(seated), dtype=torch.int64)
        adapters = Adapters(layout, torch.cat(rows), unranked, torch.ones(len(seated)))
        panels.append(Panel(tuple(place + 1 for place in seated), adapters))
    return tuple(panels)


def _name(folder: Path) -> str:
    """Name a PEFT folder, one of a run with its method too, so that two methods' adapters are told apart."""
    run = RunFolder(folder.absolute().parent.parent)
    if folder.absolute().parent.name != "adapters" or not (run.path / "run.json").is_file():
        return folder.name
    return f"{folder.name} of {run.facts.label}"


def _read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises StoreError if it is missing, damaged, or of no kind that is known here."""
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["peft_type"] == PROMPT:
            fits = int(found["num_virtual_tokens"]) > 0 and found.get("num_transformer_submodules") in (None, 1)
        else:
            fits = found["peft_type"] == "LORA" and int(found["r"]) > 0 and float(found["lora_alpha"]) > 0
            fits = fits and bool(found.get("target_modules"))
    except FileNotFoundError:
        raise StoreError(f"'{folder}' is no adapter: it has no adapter_config.json") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"'{path}' is damaged, or neither a LoRA adapter's nor a P-tuned prompt's") from None
    odd = [
        key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if found.get(key)
    ]
    if not fits or odd:
        raise StoreError(f"'{path}': only plain LoRA and P-tuning are known here{', not ' + odd[0] if odd else ''}")
    return dict(found)


def _tokens(config: Mapping[str, Any]) -> int:
    """Return how many virtual tokens an adapter has; LoRA has none."""
    return int(config["num_virtual_tokens"]) if config["peft_type"] == PROMPT else 0
