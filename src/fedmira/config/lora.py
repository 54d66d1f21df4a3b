"""The section `lora` of a config: adapters as PEFT's LoraConfig has them, and what of it is refused, and why."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fedmira.config.strict import Strict, Whole, short
from fedmira.errors import nearest

MAX_RANK = 65_536  # more than the width of any base
RANK_TYPES = ("T1", "T2", "T3", "T4")  # of FlexLoRA; ranks.py says what they are and how they are drawn
RANK_DRAWS = ("uniform", "heavy-tail-light", "heavy-tail-strong", "normal")


REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA has a magnitude for every output of a layer, for which a row of two factors has no place",
    "modules_to_save": "whole layers would have to be trained and sent; adapters alone are",
    "trainable_token_indices": "rows of the embedding would have to be trained and sent; adapters alone are",
    "bias": "biases stay frozen with the base; leave the key out (none is PEFT's default too)",
    "lora_bias": "a factor with a bias is no low-rank update, and cannot be mixed with others as one",
    "loftq_config": "LoftQ changes the base's weights, which all clients share as they are",
    "eva_config": "EVA draws factors from the data of one party; here they begin alike for all, before data are seen",
    "corda_config": "CorDA changes the base's weights by the data of one party",
    "lora_ga_config": "LoRA-GA changes the base's weights by gradients of one party",
    "layer_replication": "repeated layers are a different base; replicate them in its folder",
    "target_parameters": "experts that are one tensor take no adapter per client; name linear layers",
    "megatron_config": "Megatron's parallel layers are not supported",
    "megatron_core": "Megatron's parallel layers are not supported",
    "use_qalora": "QALoRA pools its input by groups of a quantised layer, which our layers do not compute",
    "qalora_group_size": "QALoRA pools its input by groups of a quantised layer, which our layers do not compute",
    "alora_invocation_tokens": "an activated adapter begins in the middle of a text, which passes do not compute",
    "arrow_config": "Arrow routes tokens among adapters, which passes do not compute",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA compresses activations, which makes gradients inexact",
    "monteclora_config": "MonteCLoRA samples its factors; a row holds one value of each",
    "use_bdlora": "block-diagonal factors are not supported",
    "runtime_config": "it changes how PEFT computes, and PEFT computes nothing here",
    "ensure_weight_tying": "embeddings take no adapter",
    "base_model_name_or_path": "the base is model.base_model; leave the key out",
    "revision": "it is model.revision",
    "auto_mapping": "PEFT notes it for models of one's own; leave the key out",
    "peft_version": "PEFT notes it; leave the key out",
    "fan_in_fan_out": "it is read off the layers; leave the key out",
    "task_type": "bases are causal language models; leave the key out",
    "peft_type": "adapters are LoRA, but for methods with a prompt; leave the key out",
    "inference_mode": "whether an adapter is trained follows from the command; leave the key out",
}
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga", "mica")  # values of init_lora_weights in PEFT


class LoraConfig(Strict):
    """The adapters; names and meaning as in PEFT's LoraConfig, but for `ranks`."""

    refused: ClassVar[Mapping[str, str]] = REFUSED

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    ranks: list[int | str] | dict[str, str] | str | None = None  # a rank per client: a list, {column: NAME}, a draw
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | str = "auto"  # endings of names | auto: PEFT's list | all-linear | a regular expression
    exclude_modules: list[str] | str | None = None  # of these, without an adapter: endings, or a regular expression
    layers_to_transform: list[Whole] | Whole | None = None  # numbers of the blocks that are adapted; null = all
    layers_pattern: list[str] | str | None = None  # name of the list of blocks, where it is not found by itself
    use_rslora: bool = False  # scale alpha / sqrt(r) instead of alpha / r
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(default={})  # name or pattern -> rank
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(default={})  # name or pattern -> lora_alpha
    start: str | dict[str, str | int] | None = None  # a folder | {column: NAME} | {study: PATH, method: LABEL}
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True  # true: A uniform, B = 0; gaussian; B A = 0

    @field_validator("target_modules", "exclude_modules", "layers_pattern", mode="before")
    @classmethod
    def _names_or_a_pattern(cls, value: Any) -> Any:
        """Checked by hand: for a union pydantic would report what is wrong with each kind."""
        if isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
            return list(value)
        if value is None or (isinstance(value, str) and value):
            return value
        raise ValueError("should be a list of names, or one regular expression for whole names")

    @field_validator("start", mode="before")
    @classmethod
    def _a_folder_a_column_or_a_study(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and value):
            return value
        if isinstance(value, Mapping):
            keys = set(value)
            texts = all(isinstance(value[key], str) and value[key] for key in keys - {"seed"})
            seeds = type(value.get("seed", 0)) is int
            if texts and seeds and (keys == {"column"} or {"study", "method"} <= keys <= {"study", "method", "seed"}):
                return value
        raise ValueError("should be the folder of an adapter, {column: NAME}, or {study: STUDY, method: LABEL}")

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _a_start_that_leaves_the_base(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(CHANGE_THE_BASE):
            raise ValueError("it changes the base's weights, or needs data; take true, gaussian or orthogonal")
        return value

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _numbers_of_blocks(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else [value]
        if value is None or (numbers and all(type(one) is int and one >= 0 for one in numbers)):
            return value
        raise ValueError("should be a list of block numbers, from 0")

    @field_validator("ranks", mode="before")
    @classmethod
    def _a_list_a_column_or_a_draw(cls, value: Any) -> Any:
        """Checked by hand: for a union of three kinds pydantic would report what is wrong with each."""
        if value is None or (isinstance(value, str) and value in RANK_DRAWS):
            return value
        if isinstance(value, list | tuple) and value:
            refused = [
                rank for rank in value if not (type(rank) is int and 1 <= rank <= MAX_RANK) and rank not in RANK_TYPES
            ]
            if refused:
                words = f"whole numbers from 1 to {MAX_RANK:,}, and {', '.join(RANK_TYPES)}"
                raise ValueError(f"found {short(refused[0])} in the list of ranks; allowed are {words}")
            return value
        if isinstance(value, Mapping) and list(value) == ["column"] and isinstance(value["column"], str):
            return value
        hint = nearest(value, RANK_DRAWS) if isinstance(value, str) else ""
        draws = ", ".join(RANK_DRAWS)
        raise ValueError(f"should be a list with a rank per client, {{column: NAME}}, or a draw: {draws}{hint}")

    @model_validator(mode="after")
    def _one_rule(self) -> "LoraConfig":
        if self.ranks is not None and self.r != LoraConfig.model_fields["r"].default:  # a default may be written out
            raise ValueError(f"ranks replaces r; remove 'r: {self.r}', or ranks")
        if self.ranks is not None and self.rank_pattern:
            raise ValueError("rank_pattern is for clients of one rank; remove it, or ranks")
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and (self.ranks is not None or odd):
            why = "clients that differ in rank (ranks) would cut it" if self.ranks else f"found rank {odd[0]}"
            raise ValueError(f"init_lora_weights: orthogonal needs even ranks, the same for all clients: {why}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts; give that too, or remove it")
        return self
