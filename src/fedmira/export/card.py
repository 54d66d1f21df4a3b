"""The model card of an adapter: README.md with Hugging Face front matter, from a run's facts, never from its examples.

A card travels with the adapter, so it contains no absolute path: only the last name of such a path is shown.
There is no `model-index`: it needs the name of a public data set, which a client's own data does not have.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypedDict

from fedmira import bundled
from fedmira.config.yaml_text import dump_yaml
from fedmira.names import shown_name
from fedmira.reports.paths import without_folders

# The hub's identifiers of licences used for data; any other licence is `other`, with its name.
_KNOWN = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ncsa odbl odc-by ofl-1.1
openrail osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
LICENCES = frozenset(_KNOWN.split())
USE = "## How to load it"
EXAMPLE = "Name the largest planet."  # neutral, and never from anybody's data
NO_CACHE = (
    "Generate with `use_cache=False`: PEFT 0.21.2 with transformers 5.24 writes other answers after virtual tokens "
    "if it keeps a cache. Earlier releases of transformers write the same either way."
)
_UNITS = {"loss": "loss (nats per token)"}


class Card(TypedDict, total=False):
    """The facts of a card; a missing key is not shown."""

    client: str  # its id
    name: str  # in the data; shown where it is not the id
    group: str | None
    personal: bool  # False: every client of the run, or of the group, has this adapter
    grouped: bool  # one adapter for each group
    gated: bool  # the run mixes two adapters anew for every question; the folder has one mix
    cut: bool  # a shared adapter is cut to this client's rank
    method: str
    settings: Mapping[str, Any]
    rounds: int
    round: int  # after which the adapter was the best by validation loss
    drawn: int  # rounds in which this client trained
    seed: int
    base_sha256: str
    bits: Mapping[str, str | bool]  # keys of a base whose weights were quantised when it was loaded
    targets: Sequence[str]
    layers: int
    rank: int
    alpha: float
    added: int  # of the rank, what the method added to the base of everybody
    virtual_tokens: int  # of a prompt, instead of rank, alpha, targets and layers
    hidden: int  # width of the MLP that computed them
    examples: int
    trained_tokens: int
    privacy: Mapping[str, Any]  # as in run.json
    client_privacy: Mapping[str, Any]  # the same
    licence: str | None  # of the data; None = not stated
    scores: Mapping[str, tuple[float | None, float | None]]  # test metric -> (untouched base, this adapter)
    template: str  # that it was trained with
    prompt: str  # one in full, for a neutral request
    chat_template: bool  # the folder has the tokenizer and a chat template that writes such prompts
    special_text: bool  # names of special tokens in the texts of the data were read as text
    local: bool  # the base is a folder of the machine that trained
    version: str
    date: str  # on which the run started


def model_card(base_model: str, card: Card, *, revision: str | None = None) -> str:
    """Write the card of an adapter; base_model and revision as in the config."""
    shown = shown_base(base_model)
    prompt = "virtual_tokens" in card
    kind = "P-tuned prompt" if prompt else "LoRA adapter"
    front = {
        "base_model": shown,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["p-tuning" if prompt else "lora", "federated-learning", "fedmira"],
        **_licence(card.get("licence")),
    }
    title = f"# {kind} made with FedMira"
    if "client" in card:
        title = f"# {kind} of client {_called(card) or card['client']}, made with FedMira"
    body = [title, "", *(f"- {name}: {value}" for name, value in _facts(shown, card).items()), ""]
    for section in (_test(card), _made(card), _inside(card), _warning(), _ask(card), _use(base_model, revision, card)):
        body += section
    return "\n".join(["---", dump_yaml(front).rstrip("\n"), "---", "", *body])


def merged_card(adapter_card: str, *, base_model: str, dtype: str, difference: float) -> str:
    """Turn an adapter's card into that of the merged model.

    difference: largest difference of its logits from those of base plus adapter, as a fraction of the largest logit.
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
        f"tokens the logits of this model differ from those of the unmerged model by at most {difference:.1e} of "
        "the largest. The licence of the base applies to these weights too.",
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
    """Return a base's name as in the config; only the last name of an absolute path."""
    return PurePath(name).name if name.startswith(("/", "~")) else name


def licence_of(columns: Mapping[str, str]) -> str | None:
    """Return the licence of a client's data: a column `license` or `licence`, the same in all examples.

    None if there is none, or it is stated as unknown.
    """
    named = [value for name, value in columns.items() if name.lower() in ("license", "licence")]
    return next((value for value in named if value.strip().lower() not in ("", "unknown", "none", "n/a")), None)


def _facts(base: str, card: Card) -> dict[str, str]:
    """Return the lines of the list, in order."""
    facts: dict[str, str] = {}
    if "client" in card:
        name = _called(card)
        facts["client"] = f"{name} ({card['client']})" if name else str(card["client"])
    if "group" in card:  # from the data: no Markdown
        facts["group"] = f"`{_quoted(shown_name(card['group'] or 'none'))}`"
    if "personal" in card:
        cut = ", cut to this client's rank" if card.get("cut") else ""
        whose = "its group" if card.get("grouped") else "the run"
        facts["adapter"] = "this client's own" if card["personal"] else f"shared by all clients of {whose}{cut}"
    if "method" in card:
        settings = json.dumps(without_folders(card.get("settings") or {}), ensure_ascii=False, default=str)
        shown = "" if settings == "{}" else f" with `{_quoted(settings)}`"
        facts["method"] = f"{card['method']}{shown}"
    if "rounds" in card:
        facts["rounds"] = f"{card['rounds']}, of which this client trained in {card.get('drawn', 0)}"
    if "round" in card:
        facts["kept"] = f"the adapter after round {card['round']}, the best by validation loss"
    if "seed" in card:
        facts["seed"] = str(card["seed"])
    facts["base"] = f"`{_quoted(base)}`"
    if "base_sha256" in card:
        of = "config.json, tokenizer and weights" + (", loaded in these bits" if "bits" in card else "")
        facts["base sha256"] = f"{card['base_sha256']} ({of})"
    if "bits" in card:
        facts["base weights"] = f"trained on with `{_keywords(card['bits'])}` (bitsandbytes)"
    if "rank" in card:
        layers = f" on {card['layers']} layers ({', '.join(sorted(card['targets']))})" if "layers" in card else ""
        added = f"; up to {card['added']} of the rank is what the method added to the base" if "added" in card else ""
        facts["LoRA"] = f"rank {card['rank']}, alpha {card['alpha']:g}{layers}{added}"
    if "virtual_tokens" in card:
        by = f", made by an MLP of width {card['hidden']}" if "hidden" in card else ""
        facts["virtual tokens"] = f"{card['virtual_tokens']}{by}"
    if "examples" in card:
        tokens = f", {card['trained_tokens']} tokens with a loss" if "trained_tokens" in card else ""
        facts["trained on"] = f"{card['examples']} examples{tokens}"
    if "privacy" in card:
        said = card["privacy"]
        own = said.get("epsilons", {}).get(card.get("client"), said["epsilon"])
        facts["privacy of a training example"] = (
            f"epsilon {own:.3g} at delta {said['delta']:g}; {said['adjacency']}; {said['sampling']} sampling, "
            f"{said['accountant']}; of this run alone, and not of scores"
        )
    if "client_privacy" in card:
        said = card["client_privacy"]
        facts["privacy of each client's data"] = (
            f"epsilon {math.ceil(1000 * said['epsilon']) / 1000:g} at delta {said['delta']:g}; {said['adjacency']}; "
            f"{said['accountant']}; of this run alone, and not of scores"
        )
    stated = card.get("licence")
    facts["licence of the data"] = "not stated" if stated is None else f"`{_quoted(shown_name(stated))}`"
    return facts


def base_sha256_in(folder: Path) -> str | None:
    """Return the fingerprint of the base that an adapter's card names; None without such a card."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"^- base sha256: ([0-9a-f]{64}) \(", text, re.MULTILINE)
    return found and found[1]


def _called(card: Card) -> str:
    """Return the client's name, from the data and so without Markdown; an empty string if it is the id."""
    name = card.get("name", card["client"])
    return "" if name == card["client"] else f"`{_quoted(shown_name(name))}`"


def _test(card: Card) -> list[str]:
    scores = card.get("scores") or {}
    if not scores:
        return []
    rows = [f"| {_UNITS.get(name, name)} | {_number(base)} | {_number(new)} |" for name, (base, new) in scores.items()]
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
        f"By FedMira {card['version']}, in a run started on {card['date']}. `fedmira run config.yaml`, with config.yaml"
        " of that run's folder, reproduces it."
    )
    return ["## How it was made", "", how, ""]


def _inside(card: Card) -> list[str]:
    if card.get("gated"):
        mix = (
            "The method mixes a shared adapter and one of this client's own anew for every question, by how near the "
            "question is to the client's data. PEFT has no such gate: this folder has the mix at the mean of the "
            "client's validation questions. Scores above are with the gate, and so are answers of `fedmira chat`."
        )
        return ["## What is in this folder", "", mix, ""]
    if "hidden" not in card:
        return []
    where = (
        "Only the embeddings of the virtual tokens, as computed by their encoder. The encoder's MLP stays in the run's "
        "checkpoints: training continues there, with `fedmira resume`, and not from this folder."
    )
    return ["## What is in this folder", "", where, ""]


def _warning() -> list[str]:
    return [
        "## What it does not protect",
        "",
        "An adapter can reveal texts that it was trained on to anyone who has it: share it only with those who may see "
        "the data themselves.",
        "",
    ]


def _ask(card: Card) -> list[str]:
    """Say what a prompt looks like; an adapter asked in another form answers worse, without a word."""
    if "template" not in card:
        return []
    about = f"It was trained on prompts of the template `{_quoted(card['template'])}`"
    lines = ["## How to ask it", "", f"{about}.", ""]
    if card.get("prompt"):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", card["prompt"])), default=0))
        lines[2:] = [f"{about}. This is one in full, as the model reads it:", "", f"{fence}text", card["prompt"], fence]
        lines.append("")
    if card.get("special_text"):
        lines += [
            "Names of special tokens in the texts were read as text (`data.special_tokens: text`). A tokenizer alone "
            "reads them as control tokens: remove them from what is asked, or ask with `fedmira chat` and the run.",
            "",
        ]
    if not card.get("chat_template"):
        no = "No chat template writes such prompts with this tokenizer, so none is in this folder: `fedmira chat` asks "
        return [*lines, f"{no}in the trained form.", ""]
    extra = ' Give one message and, if the request has one, `input="..."`.' * (card["template"] in ("alpaca", "none"))
    return [
        *lines,
        f"The tokenizer in this folder writes such prompts.{extra}",
        "",
        "```python",
        "from transformers import AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        f'messages = [{{"role": "user", "content": "{EXAMPLE}"}}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
        "```",
        "",
        "vLLM uses the base's template unless it is started with `--chat-template "
        "path/to/this/folder/chat_template.jinja`.",
        "",
    ]


def _use(base_model: str, revision: str | None, card: Card) -> list[str]:
    load, comment = repr(base_model), ""
    if base_model.startswith(bundled.PREFIX):
        load = f"fedmira.bundled.resolve({base_model!r})"
    elif shown_base(base_model) != base_model:
        load = repr(f"path/to/{shown_base(base_model)}")
        comment = "  # the base above" if "bits" in card else "  # the folder with the sha256 above"
    at = "" if revision is None else f", revision={revision!r}"
    bits = f", quantization_config=BitsAndBytesConfig({_keywords(card['bits'])})" if "bits" in card else ""
    ahead = f"  # {card['virtual_tokens']} logits precede those of the text" if "virtual_tokens" in card else ""
    return [
        USE,
        "",
        "```python",
        *(["import fedmira.bundled"] if base_model.startswith(bundled.PREFIX) else []),
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if bits else ''}",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({load}{at}{bits}){comment}",
        f'model = PeftModel.from_pretrained(base, "path/to/this/folder"){ahead}',
        "```",
        "",
        *_not_found(base_model, card),
        *([NO_CACHE, ""] if "virtual_tokens" in card else []),
    ]


def _not_found(base_model: str, card: Card) -> list[str]:
    """Say that PEFT's classes which load the base too do not find one that is not on the hub."""
    bundled_base = base_model.startswith(bundled.PREFIX)
    if not (bundled_base or card.get("local") or shown_base(base_model) != base_model):
        return []
    name = _quoted(shown_base(base_model))
    return [
        f"`AutoPeftModelForCausalLM` does not find this base: an exported adapter_config.json has only its name, "
        f"`{name}`, which is not on the hub. Load the base first, as above.",
        "",
    ]


def _licence(stated: str | None) -> dict[str, str]:
    """Return the front matter's keys about a licence: a name that the hub knows, or `other` with the stated name."""
    if stated is None:
        return {}
    known = re.sub(r"[\s_]+", "-", stated.strip().lower())
    return {"license": known} if known in LICENCES else {"license": "other", "license_name": shown_name(stated)}


def _keywords(settings: Mapping[str, str | bool]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def _number(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _quoted(text: str) -> str:
    """Return a text that can be put between backticks."""
    return text.replace("`", "?")
