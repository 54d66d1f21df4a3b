"""What a run hands over at its end: one PEFT folder per client, each with a card of what it is and how it scores."""

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.card import licence_of
from fedmira.engine.rounds import Observer
from fedmira.export import export_adapter, short_targets
from fedmira.prepare import Prepared
from fedmira.runs import RunFolder

Pair = tuple[float | None, float | None]


def write_adapters(
    folder: RunFolder, prepared: Prepared, serve: Callable[[Tensor], Adapters], observer: Observer
) -> None:
    """Write one PEFT folder per client of a run that has been tested; its facts and scores are read from its folder."""
    federation, facts = prepared.federation, folder.facts
    targets = short_targets([name for name, _, _ in federation.base.shapes], prepared.linears)
    scores = _scores(folder)
    drawn = Counter(name for record in folder.records() for name in record["clients"])
    for position, client in enumerate(federation.clients):
        served = serve(torch.tensor([position]))
        ranks = federation.ranks[position : position + 1]
        scale = torch.tensor([federation.config.lora.lora_alpha]) / ranks
        export_adapter(
            folder.adapters / client.id,
            replace(served, ranks=ranks, scale=scale),
            base_model=federation.config.model.base_model,
            revision=federation.config.model.revision,
            target_modules=targets,
            fan_in_fan_out=federation.base.transposed,
            card={
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
            },
        )
        observer("export", {"done": position + 1, "clients": len(federation)})


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
