"""PEFT folders as rows on one base: all LoRA adapters together, prompts by their number of virtual tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmira.adapters import Adapters, lora_layout, soft_layout
from fedmira.export.adapter_config import AdapterConfig
from fedmira.export.peft_folder import read_adapter
from fedmira.model.base.load import Base
from fedmira.model.base.trial import check_embeddings


@dataclass(frozen=True, eq=False)
class Panel:
    """Adapters that share a pass: row i of `adapters` is number places[i] of what was asked for."""

    places: tuple[int, ...]
    adapters: Adapters


def read_panels(base: Base, configs: Sequence[AdapterConfig | None]) -> tuple[Panel, ...]:
    """Read the adapters of checked folders; None: the base alone, a LoRA adapter that adds nothing.

    Raises StoreError if a folder does not fit the base, or is damaged.
    """
    lora = [place for place, config in enumerate(configs) if config is None or not config.is_prompt]
    panels = [_lora_panel(base, lora, configs)] if lora else []
    prompts = {place: config for place, config in enumerate(configs) if config is not None and config.is_prompt}
    if prompts:
        check_embeddings(base.decoder, base.model.get_input_embeddings(), vocabulary=base.vocabulary, name=base.name)
    for count in sorted({config.virtual_tokens for config in prompts.values()}):
        layout = soft_layout(base.width, count)
        places = tuple(place for place, config in prompts.items() if config.virtual_tokens == count)
        rows = torch.cat([read_adapter(prompts[place].folder, layout) for place in places])
        unranked = torch.zeros(len(places), dtype=torch.int64)
        panels.append(Panel(places, Adapters(layout, rows, unranked, torch.ones(len(places)))))
    return tuple(panels)


def _lora_panel(base: Base, places: Sequence[int], configs: Sequence[AdapterConfig | None]) -> Panel:
    """Lay LoRA adapters out at the largest rank of each module; the base has that rank and scale 0."""
    modules = [name for name, _, _ in base.shapes]
    chosen = [configs[place] for place in places]
    ranks = torch.tensor(
        [[0] * len(modules) if one is None else [one.rank_of(name) for name in modules] for one in chosen]
    )
    largest = ranks.amax(dim=0).clamp(min=1)
    layout = lora_layout(base.shapes, largest.tolist())
    rows = [torch.zeros(1, layout.size) if one is None else read_adapter(one.folder, layout) for one in chosen]
    scales = [[0.0] * len(modules) if one is None else [one.scale_of(name) for name in modules] for one in chosen]
    full = torch.where(torch.tensor([one is None for one in chosen])[:, None], largest, ranks)
    return Panel(tuple(places), Adapters(layout, torch.cat(rows), full, torch.tensor(scales)))
