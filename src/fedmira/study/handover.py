"""Export at the end of a run: one PEFT folder per client, each with a card of what it is and how it scores."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.added import fold
from fedmira.adapters.ranks import is_mixed
from fedmira.disk.files import copy_file, make_folder, write_atomic
from fedmira.disk.folders import RunFolder
from fedmira.engine.clients import Scores
from fedmira.engine.events import Observer
from fedmira.engine.federation import Federation
from fedmira.engine.run import Ended
from fedmira.evaluation.gated import at_mean, references
from fedmira.export.asking import share_files, tokenizer_files
from fedmira.export.card import Card, licence_of, model_card
from fedmira.export.gate_file import write_gate
from fedmira.export.peft_folder import count_exported, depth_of, describe, export_adapter
from fedmira.methods.base import Method
from fedmira.study.adapting import quantisation_of
from fedmira.study.assemble import Prepared
from fedmira.study.client_privacy import of_adapters
from fedmira.study.events import AdaptersWritten

LINK_BYTES = 1 << 30  # adapters that are more than this together share one file where they are equal

Pair = tuple[float | None, float | None]


def write_adapters(
    folder: RunFolder,
    prepared: Prepared,
    federation: Federation,
    method: Method,
    serve: Callable[[Tensor], Adapters],
    observer: Observer,
    *,
    start: Scores,
    ended: Ended,
    into: Path | None = None,
    only: Sequence[int] | None = None,
) -> None:
    """Write one PEFT folder per client of a run that has been tested.

    into: the folder of these folders, instead of the run's; only: positions of clients, None = all.

    start: scores of the untouched base; ended: scores of these adapters, and the round of each. Clients with the same
    adapter, as all of a shared method and those never drawn of a personal one, get hard links to one read-only file
    where there are so many that copies would fill the disk. A method with a gate exports each client's mean mix, and
    writes what `chat` needs for the gate beside it. All folders have the tokenizer and the
    chat template, as hard links to one copy.
    """
    facts = folder.facts
    base, clients = prepared.workplace.base, prepared.workplace.clients
    prompts = federation.layout.virtual_tokens > 0
    own, trainees, tuned = method.personal, method.regime.trainees, method.regime.tune is not None
    shared_by_all = not own and method.count_rows(len(federation)) == 1  # else by a group
    records = folder.records()
    drawn = count_drawn(method, records, federation.names)
    links = only is None and len(federation) * count_exported(federation.layout) * 4 > LINK_BYTES
    pool = (sum(len(client.train) for client in clients), sum(client.trained_tokens for client in clients))
    model, asking = prepared.config.model, prepared.asking
    bits = quantisation_of(model)
    local = Path(model.base_model).is_dir()
    tokenizer: list[Path] = []  # the files of the first client's folder, which the others share
    common: dict[tuple[tuple[int, ...], str], Path] = {}  # ranks and sha256 of a row that others may have -> its folder
    positions = range(len(clients)) if only is None else only
    for count, position in enumerate(positions, 1):
        client = clients[position]
        parts = serve(torch.tensor([position]))
        used = parts if method.client.gate is None else at_mean(base, method.client.gate, parts, [client])
        served = fold(used)
        target = (folder.adapters if into is None else into) / client.id
        card: Card = {
            "client": client.id,
            "name": client.name,
            "group": client.group,
            "method": facts.method,
            "settings": facts.settings,
            "rounds": len(records),
            "seed": facts.seed,
            "base_sha256": facts.base_fingerprint,
            "licence": licence_of(client.columns),
            "scores": _pairs(start, ended.test, position),
            "version": facts.versions["fedmira"],
            "date": facts.started[:10],
            "template": asking.template,
            "prompt": asking.prompt,
            "chat_template": asking.source is not None,
            "special_text": prepared.config.data.special_tokens == "text",
            "local": local,
        }
        if bits is not None:
            card["bits"] = bits.keys
        if ended.chosen[position]:
            card["round"] = ended.chosen[position]
        if not prompts:
            card["targets"] = sorted({name.rsplit(".", 1)[-1] for name, _, _ in base.shapes})
            card["layers"] = len(base.shapes)
        if used.added:
            card["added"] = max(len(a) for a, _ in used.added.values())
        if trainees != "nobody":
            trained = pool if trainees == "pool" else (len(client.train), client.trained_tokens)
            card["examples"], card["trained_tokens"] = trained
        if facts.privacy is not None:
            card.pop("trained_tokens", None)  # the sum with and without an example would tell its length
            card["privacy"] = facts.privacy
        if (of_client := of_adapters(facts.client_privacy)) is not None:
            card["client_privacy"] = of_client
        card["personal"] = own
        if method.client.gate is not None:
            card["gated"] = True
        card["grouped"] = not own and not shared_by_all
        card["cut"] = not own and trainees == "sampled" and is_mixed(federation.ranks)
        if drawn[client.id] or not tuned:  # a card takes a personal adapter never drawn for the common start
            card["drawn"] = drawn[client.id]
        digest = hashlib.sha256(served.rows.numpy().tobytes()).hexdigest() if links else ""
        key = tuple(served.ranks.flatten().tolist()), digest
        like = common.get(key)
        if like is None or not _link(like, target):
            export_adapter(
                target,
                served,
                base_model=model.base_model,
                revision=model.revision,
                target_modules=prepared.targets,
                fan_in_fan_out=base.transposed,
                depth=depth_of(base.model.config) if prompts else None,
                card=card,
            )
            if links and not (own and (drawn[client.id] or tuned)):
                common[key] = target
        else:
            linked: Card = {**card, **describe(served)}
            write_atomic(target / "README.md", model_card(model.base_model, linked, revision=model.revision).encode())
        if method.client.gate is not None:
            write_gate(target, parts, references(base, method.client.gate, parts, client))
        if tokenizer:
            share_files(tokenizer, target)
        else:
            asking.write(target)
            tokenizer = tokenizer_files(target)
        observer(AdaptersWritten(count, len(positions)))


def count_drawn(method: Method, records: Sequence[Mapping[str, Any]], clients: Sequence[str]) -> Mapping[str, int]:
    """Return in how many rounds each client's data were trained on: a pool takes everybody's in every round."""
    if method.regime.trainees == "pool":
        return dict.fromkeys(clients, len(records))
    return Counter(
        name for record in records for name, steps in zip(record["clients"], record["steps"], strict=True) if steps
    )


def _link(like: Path, target: Path) -> bool:
    """Give a new folder another's adapter: a hard link to its weights, a copy of its config. False: no link is taken.

    The weights become read-only: written through one name, they would change under all.
    """
    weights = "adapter_model.safetensors"
    make_folder(target)
    try:
        os.link(like / weights, target / weights)
    except OSError:  # a file system without links, or one that takes no more of them
        return False
    (like / weights).chmod(0o400)
    copy_file(like / "adapter_config.json", target / "adapter_config.json")
    return True


def _pairs(start: Scores, test: Scores, position: int) -> dict[str, Pair]:
    """Return one client's test metrics: (untouched base, its adapter); None = it has no test example."""
    return {metric: (values[position], test.test[metric][position]) for metric, values in start.test.items()}
