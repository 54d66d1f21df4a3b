"""What a config means for a base: layers that get adapters, ranks and scales of their pairs, their start, its bits."""

from collections.abc import Sequence

from fedmira.adapters import Alpha, Scaling, Start
from fedmira.config.lora import LoraConfig
from fedmira.config.sections import ModelConfig
from fedmira.model.base.targets import Wanted, by_pattern
from fedmira.model.quantised import Quantisation


def wanted_of(section: LoraConfig) -> Wanted:
    """Return which layers get an adapter."""
    return Wanted(section.target_modules, section.layers_to_transform, section.layers_pattern, section.exclude_modules)


def ranks_by_module(section: LoraConfig, modules: Sequence[str]) -> list[int]:
    """Return the rank of each module under rank_pattern. Raises ModelError if a pattern matches none."""
    found = by_pattern(dict(section.rank_pattern), section.r, modules, key="rank_pattern")
    return [int(rank) for rank in found]


def alpha_of(section: LoraConfig, modules: Sequence[str]) -> Alpha:
    """Return what makes scales of ranks: alpha / r for all, or by module, or alpha / sqrt(r).

    Raises ModelError if a pattern of alpha_pattern matches no module.
    """
    if not section.alpha_pattern:
        return Scaling(section.lora_alpha, root=True) if section.use_rslora else section.lora_alpha
    values = by_pattern(dict(section.alpha_pattern), section.lora_alpha, modules, key="alpha_pattern")
    return Scaling(values[0] if len(set(values)) == 1 else tuple(values), root=section.use_rslora)


def start_of(section: LoraConfig) -> Start:
    """Return how factors are drawn."""
    return "kaiming" if section.init_lora_weights is True else section.init_lora_weights


def quantisation_of(section: ModelConfig) -> Quantisation | None:
    """Return how a config wants the weights of its base stored; None: as they are in its folder."""
    if section.load_in_8bit:
        return Quantisation(8)
    if section.load_in_4bit:
        return Quantisation(4, section.bnb_4bit_quant_type, section.bnb_4bit_use_double_quant)
    return None
