"""Talk to adapters beside the base they were trained on: the same question to all of them, in one pass."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedmira import bundled
from fedmira.adapters import Adapters, lora_layout
from fedmira.data.batches import encode_questions
from fedmira.data.formats import Record, Turn
from fedmira.data.templates import Template, make_template
from fedmira.errors import ConfigError, ModelError, StoreError
from fedmira.export import read_adapter
from fedmira.model.generate import answers
from fedmira.model.load import Base, load_base, load_tokenizer
from fedmira.runs import RunFolder
from fedmira.study import Run

BASE = "base"
DEFAULT_NEW_TOKENS = 128


@dataclass(eq=False)
class Chat:
    """Several speakers on one base; each remembers the conversation as it went with itself.

    names: "base" first, then one per adapter; row i of `adapters` belongs to names[i], and the base's is zero.
    """

    names: tuple[str, ...]
    base: Base
    adapters: Adapters
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
        positions = self.base.max_positions
        ids = encode_questions(
            [self.template.render(one) for one in asked],
            self.base.tokenizer,
            self.template,
            max_question=None if positions is None else positions - self.max_new_tokens,
        )
        written = answers(self.base, self.adapters, [[own] for own in ids], max_new_tokens=self.max_new_tokens)
        replies = [own[0].strip() for own in written]
        if self.template.complete:
            for own, reply in zip(self.turns, replies, strict=True):
                own += [Turn("user", text), Turn("assistant", reply)]
        return dict(zip(self.names, replies, strict=True))


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
    facts: dict[str, Any] = {} if opened is None else RunFolder(opened.path).facts
    chosen = ([] if opened is None or client is None else [(client, opened.adapters(client))]) + [
        (_name(folder), folder) for folder in folders
    ]
    configs = [_read_config(folder) for _, folder in chosen]
    wanted = bundled.resolve(model or facts.get("base_model") or str(configs[0].get("base_model_name_or_path")))
    settings = None if opened is None else opened.config
    revision = settings.model.revision if settings is not None and model is None else None
    tokenizer = load_tokenizer(wanted, revision=revision)
    usual = "chat" if getattr(tokenizer, "chat_template", None) else "none"
    named = template or (facts.get("template") if opened is not None else None) or usual
    shown = make_template(named, usual=usual, tokenizer=tokenizer)
    targets = configs[0]["target_modules"]
    base = load_base(wanted, revision=revision, dtype=facts.get("dtype", "auto"), targets=targets, tokenizer=tokenizer)
    if model is None and facts and facts["base_fingerprint"] != base.fingerprint:
        raise ModelError(
            f"model.base_model '{facts['base_model']}' is not the base this run was trained on (sha256 "
            f"{base.fingerprint[:12]}, trained on {facts['base_fingerprint'][:12]}); put that one back"
        )
    positions = base.max_positions or 2 * DEFAULT_NEW_TOKENS
    if max_new_tokens is not None and base.max_positions is not None and max_new_tokens >= positions:
        raise ConfigError([f"--max-new-tokens {max_new_tokens}: the base has {positions} positions in all"], "chat")
    ranks = [int(config["r"]) for config in configs]
    layout = lora_layout(base.shapes, max(ranks))
    rows = [torch.zeros(1, layout.size), *(read_adapter(folder, layout) for _, folder in chosen)]
    scales = [0.0, *(float(config["lora_alpha"]) / rank for config, rank in zip(configs, ranks, strict=True))]
    adapters = Adapters(layout, torch.cat(rows), torch.tensor([max(ranks), *ranks]), torch.tensor(scales))
    names = [BASE, *(name for name, _ in chosen)]
    distinct = tuple(name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names))
    return Chat(distinct, base, adapters, shown, max_new_tokens or min(DEFAULT_NEW_TOKENS, positions // 2))


def _name(folder: Path) -> str:
    """Name a PEFT folder, one of a run with its method too, so that two methods' adapters are told apart."""
    run = RunFolder(folder.absolute().parent.parent)
    if folder.absolute().parent.name != "adapters" or not (run.path / "run.json").is_file():
        return folder.name
    return f"{folder.name} of {run.facts['label']}"


def _read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises StoreError if it is missing, damaged, or not a plain LoRA adapter's."""
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fits = found["peft_type"] == "LORA" and int(found["r"]) > 0 and float(found["lora_alpha"]) > 0
    except FileNotFoundError:
        raise StoreError(f"'{folder}' is no adapter: it has no adapter_config.json") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"'{path}' is damaged, or no LoRA adapter's") from None
    odd = [
        key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if found.get(key)
    ]
    if not fits or odd:
        raise StoreError(f"'{path}': only plain LoRA is known here{', not ' + odd[0] if odd else ''}")
    return dict(found)
