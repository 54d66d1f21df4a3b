"""What a run hands over at its end: one PEFT folder per client, each with a card of what it is and how it scores."""

import csv
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.card import Card, licence_of, model_card
from fedmira.engine.rounds import Observer
from fedmira.export import export_adapter, short_targets
from fedmira.prepare import Prepared
from fedmira.runs import RunFolder
from fedmira.store import write_atomic

LINK_BYTES = 1 << 30  # adapters that are more than this together share one file where they are equal

Pair = tuple[float | None, float | None]


def write_adapters(
    folder: RunFolder, prepared: Prepared, serve: Callable[[Tensor], Adapters], observer: Observer
) -> None:
    """Write one PEFT folder per client of a run that has been tested; its facts and scores are read from its folder.

    Clients with the same adapter, as all of a shared method and those never drawn of a personal one, get hard links to
    one read-only file where there are so many that copies would fill the disk.
    """
    federation, facts = prepared.federation, folder.facts
    targets = short_targets([name for name, _, _ in federation.base.shapes], prepared.linears)
    scores = _scores(folder)
    drawn = Counter(name for record in folder.records() for name in record["clients"])
    links = len(federation) * federation.layout.parameters * 4 > LINK_BYTES
    common: dict[int, tuple[Path, Tensor]] = {}  # rank -> a folder whose row many others may have, and the row
    for position, client in enumerate(federation.clients):
        served = serve(torch.tensor([position]))
        ranks = federation.ranks[position : position + 1]
        place, rank = folder.adapters / client.id, int(ranks[0])
        scale = torch.tensor([federation.config.lora.lora_alpha]) / ranks
        card: Card = {
            "client": client.id,
            "group": client.group,
            "personal": facts["personal"],
            "method": facts["method"],
            "settings": facts["settings"],
            "rounds": facts["rounds"],
            "drawn": drawn[client.id],
            "seed": facts["seed"],
            "base_sha256": facts["base_fingerprint"],
            "targets": sorted({name.rsplit(".", 1)[-1] for name, _, _ in federation.base.shapes}),
            "layers": len(federation.base.shapes),
            "examples": len(client.train),
            "trained_tokens": client.trained_tokens,
            "licence": licence_of(client.columns),
            "scores": scores.get(client.id, {}),
            "version": facts["versions"]["fedmira"],
            "date": facts["started"][:10],
        }
        model = federation.config.model
        like = common.get(rank)
        equal = like is not None and torch.equal(like[1], served.rows)
        if like is None or not equal or not _link(like[0], place):
            export_adapter(
                place,
                replace(served, ranks=ranks, scale=scale),
                base_model=model.base_model,
                revision=model.revision,
                target_modules=targets,
                fan_in_fan_out=federation.base.transposed,
                card=card,
            )
            if links and (like is None or equal) and not (facts["personal"] and drawn[client.id]):
                common[rank] = place, served.rows
        else:
            own: Card = {**card, "rank": rank, "alpha": federation.config.lora.lora_alpha}
            write_atomic(place / "README.md", model_card(model.base_model, own, revision=model.revision).encode())
        observer("export", {"done": position + 1, "clients": len(federation)})


def _link(like: Path, place: Path) -> bool:
    """Give a new folder another's adapter: a hard link to its weights, a copy of its config. False: no link is taken.

    The weights become read-only: written through one name, they would change under all.
    """
    weights = "adapter_model.safetensors"
    place.mkdir(parents=True, exist_ok=True)
    try:
        os.link(like / weights, place / weights)
    except OSError:  # a file system without links, or one that takes no more of them
        return False
    (like / weights).chmod(0o444)
    shutil.copyfile(like / "adapter_config.json", place / "adapter_config.json")
    return True


def _scores(folder: RunFolder) -> dict[str, dict[str, Pair]]:
    """Read results.csv: client -> test metric -> (untouched base, after the last round); None = n/a."""
    with (folder.path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    found: dict[str, dict[str, Pair]] = {}
    for row in rows:
        value = float(row["value"]) if row["value"] else None
        base, _ = found.setdefault(row["client"], {}).get(row["metric"], (None, None))
        found[row["client"]][row["metric"]] = (value, None) if row["round"] == "0" else (base, value)
    return found
