"""The model card of an adapter: README.md with Hugging Face front matter, made of a run's facts, never of its examples.

A card travels with the adapter, so no absolute path stands in it: of such a path only the last name is shown.
There is no `model-index`: it asks for a public data set's name, which a client's own data does not have.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypedDict

from fedmira import bundled
from fedmira.data.partition import shown_name

# Identifiers that the hub knows, as far as data carry them; any other licence is `other` with its name beside it.
_KNOWN = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ncsa odbl odc-by ofl-1.1
openrail osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
LICENCES = frozenset(_KNOWN.split())
USE = "## How to load it"
_UNITS = {"loss": "loss (nats per token)"}
_FOLDERS = re.compile(r"(?:(?<=^)|(?<=[\s\"'=,(\[{]))~?/(?:[^/\s\"',\]})]+/)*(?=[^/\s\"',\]})]*)")


class Card(TypedDict, total=False):
    """What a card can say; what is left out is not said."""

    client: str
    group: str | None
    personal: bool  # False: every client of the run, or of the group, has this adapter
    grouped: bool  # there is one for each group
    cut: bool  # of one that all share, this client has as much as its rank has room for
    method: str
    settings: Mapping[str, Any]
    rounds: int
    drawn: int  # rounds in which this client trained
    seed: int
    base_sha256: str
    targets: Sequence[str]
    layers: int
    rank: int
    alpha: float
    virtual_tokens: int  # of a prompt, in the place of rank, alpha, targets and layers
    hidden: int  # width of the MLP that made them
    examples: int
    trained_tokens: int
    licence: str | None  # of the data; None = the data do not say
    scores: Mapping[str, tuple[float | None, float | None]]  # test metric -> (untouched base, this adapter)
    version: str
    date: str  # on which the run began


def model_card(base_model: str, card: Card, *, revision: str | None = None) -> str:
    """Write the card of an adapter; base_model and revision as in the config."""
    shown = shown_base(base_model)
    prompt = "virtual_tokens" in card
    kind = "P-tuned prompt" if prompt else "LoRA adapter"
    front = [
        f"base_model: {json.dumps(shown, ensure_ascii=False)}",
        "base_model_relation: adapter",
        "library_name: peft",
        "pipeline_tag: text-generation",
        f"tags: [{'p-tuning' if prompt else 'lora'}, federated-learning, fedmira]",
        *_licence_lines(card.get("licence")),
    ]
    title = f"# {kind} made with FedMira"
    if "client" in card:
        title = f"# {kind} of client {card['client']}, made with FedMira"
    body = [title, "", *(f"- {name}: {value}" for name, value in _facts(shown, card).items()), ""]
    for section in (_test(card), _made(card), _inside(card), _warning(), _use(base_model, revision, card)):
        body += section
    return "\n".join(["---", *front, "---", "", *body])


def merged_card(adapter_card: str, *, base_model: str, dtype: str, difference: float) -> str:
    """Turn an adapter's card into that of the model it was merged into.

    difference: largest difference of logits from base and adapter apart, as a fraction of the largest logit.
    """
    about = adapter_card.split(f"\n{USE}\n")[0].rstrip()
    about = about.replace("base_model_relation: adapter", "base_model_relation: finetune", 1)
    about = about.replace("library_name: peft", "library_name: transformers", 1)
    about = about.replace("# LoRA adapter", "# Base with the LoRA adapter", 1)
    lines = [
        about,
        "",
        "## Merged",
        "",
        f"The adapter is added to the weights of the base `{_quoted(shown_base(base_model))}`, in {dtype}. On random "
        f"tokens the logits of this model differ from those of base and adapter apart by at most {difference:.1e} of "
        "the largest. The licence of the base holds for these weights too.",
        "",
        USE,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="{dtype}")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def shown_base(name: str) -> str:
    """Return a base's name as the config has it; of an absolute path the last name only."""
    return PurePath(name).name if name.startswith(("/", "~")) else name


def without_folders(value: Any) -> Any:
    """Cut every absolute path in a text, or in the texts of a mapping or list, down to its last name.

    A text that is a path as a whole may have spaces in it; inside a text a path ends at one.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    return PurePath(value).name if value.startswith(("/", "~")) else _FOLDERS.sub("", value)


def licence_of(columns: Mapping[str, str]) -> str | None:
    """Return what a client's data call their licence: a column `license` or `licence`, the same in all examples.

    None where there is none, or the data say that nobody knows it.
    """
    named = [value for name, value in columns.items() if name.lower() in ("license", "licence")]
    return next((value for value in named if value.strip().lower() not in ("", "unknown", "none", "n/a")), None)


def _facts(base: str, card: Card) -> dict[str, str]:
    """Return the lines of the list, in order."""
    facts: dict[str, str] = {}
    if "client" in card:
        facts["client"] = str(card["client"])
    if "group" in card:  # others named it: no Markdown
        facts["group"] = f"`{_quoted(shown_name(card['group'] or 'none'))}`"
    if "personal" in card:
        cut = ", cut to this client's rank" if card.get("cut") else ""
        whose = "its group" if card.get("grouped") else "the run"
        facts["adapter"] = "this client's own" if card["personal"] else f"one that all clients of {whose} share{cut}"
    if "method" in card:
        settings = json.dumps(without_folders(card.get("settings") or {}), ensure_ascii=False, default=str)
        shown = "" if settings == "{}" else f" with `{_quoted(settings)}`"
        facts["method"] = f"{card['method']}{shown}"
    if "rounds" in card:
        facts["rounds"] = f"{card['rounds']}, of which this client trained in {card.get('drawn', 0)}"
    if "seed" in card:
        facts["seed"] = str(card["seed"])
    facts["base"] = f"`{_quoted(base)}`"
    if "base_sha256" in card:
        facts["base sha256"] = f"{card['base_sha256']} (config.json, tokenizer and weights)"
    if "rank" in card:
        layers = f" on {card['layers']} layers ({', '.join(sorted(card['targets']))})" if "layers" in card else ""
        facts["LoRA"] = f"rank {card['rank']}, alpha {card['alpha']:g}{layers}"
    if "virtual_tokens" in card:
        by = f", made by an MLP of width {card['hidden']}" if "hidden" in card else ""
        facts["virtual tokens"] = f"{card['virtual_tokens']}{by}"
    if "examples" in card:
        facts["trained on"] = f"{card['examples']} examples, {card['trained_tokens']} tokens with a loss"
    stated = card.get("licence")
    facts["licence of the data"] = "not stated" if stated is None else f"`{_quoted(shown_name(stated))}`"
    return facts


def _test(card: Card) -> list[str]:
    scores = card.get("scores") or {}
    if not scores:
        return []
    rows = [f"| {_UNITS.get(name, name)} | {_number(base)} | {_number(own)} |" for name, (base, own) in scores.items()]
    head = ["| metric | untouched base | this adapter |", "|---|---|---|"]
    notes = []
    if card.get("personal") and not card.get("drawn", 1):
        nothing = "" if "virtual_tokens" in card else " and changes nothing"
        notes = ["", f"This client was never drawn: its adapter is the common start{nothing}."]
    return ["## On this client's own test examples", "", *head, *rows, *notes, ""]


def _made(card: Card) -> list[str]:
    if "version" not in card:
        return []
    how = (
        f"By FedMira {card['version']}, in a run begun on {card['date']}. `fedmira run config.yaml`, with config.yaml"
        " of that run's folder, makes it again."
    )
    return ["## How it was made", "", how, ""]


def _inside(card: Card) -> list[str]:
    if "hidden" not in card:
        return []
    where = (
        "Only the embeddings of the virtual tokens, as their encoder made them. The encoder's MLP stays in the run's "
        "checkpoints: training goes on there, with `fedmira resume`, and not from this folder."
    )
    return ["## What is in this folder", "", where, ""]


def _warning() -> list[str]:
    return [
        "## What it does not protect",
        "",
        "An adapter can reveal texts that it was trained on to whoever has it: hand it on as you would hand on "
        "the data themselves.",
        "",
    ]


def _use(base_model: str, revision: str | None, card: Card) -> list[str]:
    load, comment = repr(base_model), ""
    if base_model.startswith(bundled.PREFIX):
        load = f"fedmira.bundled.resolve({base_model!r})"
    elif shown_base(base_model) != base_model:
        load, comment = repr(f"path/to/{shown_base(base_model)}"), "  # the folder with the sha256 above"
    at = "" if revision is None else f", revision={revision!r}"
    ahead = f"  # {card['virtual_tokens']} logits stand before a text's own" if "virtual_tokens" in card else ""
    return [
        USE,
        "",
        "```python",
        *(["import fedmira.bundled"] if base_model.startswith(bundled.PREFIX) else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({load}{at}){comment}",
        f'model = PeftModel.from_pretrained(base, "path/to/this/folder"){ahead}',
        "```",
        "",
    ]


def _licence_lines(stated: str | None) -> list[str]:
    """Return the front matter's lines about a licence: a name that the hub knows, or `other` with the data's words."""
    if stated is None:
        return []
    known = re.sub(r"[\s_]+", "-", stated.strip().lower())
    if known in LICENCES:
        return [f"license: {known}"]
    return ["license: other", f"license_name: {json.dumps(shown_name(stated), ensure_ascii=False)}"]


def _number(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _quoted(text: str) -> str:
    """Return a text fit to stand between backticks."""
    return text.replace("`", "?")
