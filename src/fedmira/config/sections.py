"""The one strict config, section by section: what may be written and what it means.

faults.py checks it, yaml_text.py reads and writes it.

Only `study` reads the whole of it; the layers below get plain values. Contract: contracts page, "Config".
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fedmira.config.lora import LoraConfig
from fedmira.config.partitioners import PARTITIONERS, Partitioner, partitioner_name
from fedmira.config.strict import Count, Fraction, Length, Seed, Strict, Whole, check_encoding, short, slip
from fedmira.errors import nearest

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}  # as data.delimiter may be written

Metric = Literal["loss", "rouge_l", "rouge_l_paper", "exact_match", "word_accuracy"]


class ModelConfig(Strict):
    """The frozen base model."""

    base_model: str  # local folder or hub name; no default on purpose
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = (
        "auto"  # auto: bfloat16 where the machine computes it fast
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    revision: str | None = None  # hub only: branch, tag or commit
    load_in_4bit: bool = False  # keep the weights of its linear layers in 4 bits (extra quant)
    load_in_8bit: bool = False  # or in 8
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # values that 4 bits stand for; nf4: as QLoRA
    bnb_4bit_use_double_quant: bool = False  # of 4 bits: store the scales in 8 bits too

    @model_validator(mode="after")
    def _one_kind_of_bits(self) -> "ModelConfig":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one")
        if not self.load_in_4bit and self.bnb_4bit_use_double_quant:
            raise ValueError("bnb_4bit_use_double_quant is about 4 bits, and load_in_4bit is false")
        if self.dtype == "float64" and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("dtype float64: weights in 4 or 8 bits are computed with in float32 or bfloat16")
        return self


class SplitConfig(Strict):
    """Fractions of every client's examples held out, drawn once from data.seed."""

    validation: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _leaves_something_to_train(self) -> "SplitConfig":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test = {self.validation + self.test:g}: must stay below 1 so that training has data"
            )
        return self


class ClientsConfig(Strict):
    """What a client is: a value of a column, one of several that share a value's examples, or a partitioner's part."""

    by: str = "task"  # a column of the data: "task", "category", "file" (one file per client), ...
    per_group: Count = 1  # clients among which one value's examples are divided at random
    partitioner: Partitioner | None = None  # names and parameters of flwr-datasets; instead of `by`
    first: Count | None = None  # only the first n values (or parts) in file order; null = all
    groups: str | None = None  # column that names a client's group in reports; null = the value of `by`

    @field_validator("partitioner", mode="wrap")
    @classmethod
    def _by_name(cls, value: Any, handler: Any) -> Any:
        """Check a partitioner against the class that it names, so that faults are about that one, not about all."""
        if value is None or isinstance(value, Strict):
            return handler(value)
        name = partitioner_name(value)
        if name not in PARTITIONERS:
            fault = f"name {short(value['name'])} is unknown" if name else f"found no name{slip(value)}"
            raise ValueError(f"{fault}{nearest(name, list(PARTITIONERS))}; known: {', '.join(PARTITIONERS)}")
        return PARTITIONERS[name].model_validate({**value, "name": name})

    @model_validator(mode="after")
    def _one_rule(self) -> "ClientsConfig":
        if self.partitioner and (self.by != "task" or self.per_group != 1):  # a default may be written out
            other = "per_group" if self.by == "task" else f"by: {self.by}"
            raise ValueError(f"a partitioner replaces by and per_group; remove '{other}', or the partitioner")
        return self


class DataConfig(Strict):
    """What the clients train on."""

    path: str  # file, folder, folder saved by `datasets`, or name on the Hugging Face hub; no default on purpose
    subset: str | None = None  # hub only: the data set's configuration, such as "main"
    revision: str | None = None  # hub only: branch, tag or commit
    format: Literal[
        "auto", "natural_instructions", "dolly", "alpaca", "prompt_completion", "messages", "sharegpt", "text"
    ] = "auto"  # auto: by the keys of the first row, and announced
    columns: dict[str, str] = Field(default={})  # FedMira's name -> the data's column, where they differ
    encoding: str | None = None  # of text files: cp1252, latin-1, utf-16, ...; null = UTF-8, or as a CSV's mark says
    delimiter: str | None = (
        None  # of CSV: a character, or comma | semicolon | tab | pipe; null = by extension and header
    )
    on_bad_row: Literal["error", "skip"] = "error"  # skip: leave bad rows out and report how many
    template: str = (
        "auto"  # alpaca | none | chat (the tokenizer's) | plain | chatml | zephyr | a Jinja file; auto: usual
    )
    special_tokens: Literal["control", "text"] = "control"  # of the base, written in the data; text: they are only text
    max_length: Annotated[int, Field(ge=4, lt=2**31)] = 512  # tokens of prompt + answer + end
    positions_ahead: Annotated[int, Field(ge=0)] = 0  # of the base, kept free; at least a method's virtual tokens
    truncation: Literal["prompt"] = "prompt"  # the answer is kept, the prompt is cut at its start
    split: SplitConfig = SplitConfig()
    split_column: str | None = None  # column with train | validation | test; overrides `split`
    clients: ClientsConfig = ClientsConfig()
    subsample: Annotated[float, Field(gt=0, le=1)] = 1.0  # fraction of each client's examples kept
    seed: Seed = 0  # of splits, subsample and partitioners; the same for all methods and training seeds

    @property
    def reading(self) -> dict[str, Any]:
        """How the data at `path` is read: the arguments of read_records beside the path."""
        names = ("format", "columns", "on_bad_row", "subset", "revision", "encoding", "delimiter")
        return {name: getattr(self, name) for name in names}

    @field_validator("encoding")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        if value is not None:
            check_encoding(value)
        return value

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        if value is None:
            return None
        sign = "\t" if value == "\\t" else DELIMITERS.get(value.strip().lower(), value)
        if len(sign) != 1 or sign.isalnum() or sign in '"\r\n\0':
            raise ValueError(f"should be one character that separates columns, or {', '.join(DELIMITERS)}")
        return sign


class EarlyStoppingConfig(Strict):
    """When a run ends before its last round; meaning as of transformers' EarlyStoppingCallback."""

    patience: Count  # validations in a row without an improvement after which the run ends
    threshold: Annotated[float, Field(ge=0)] = 0.0  # nats by which the mean validation loss must be below the lowest


PLACES = ("engine", "workers", "address")  # keys of `federation` that say where passes are computed: no result changes


class FederationConfig(Strict):
    """Rounds and who takes part."""

    rounds: Length  # at most, with early_stopping
    early_stopping: EarlyStoppingConfig | None = None  # null: every run has all its rounds
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0  # fraction of clients per round, at least one
    cohort: Count | Literal["auto"] = "auto"  # clients trained in one pass
    engine: Literal["local", "ray"] = "local"  # ray: passes are computed by Ray's actors (extra ray); docs/scale.md
    workers: Count | None = None  # of ray: actors, a base each; null = one for each GPU, else cores / threads
    address: Annotated[str, Field(min_length=1)] | None = None  # of ray: a cluster, such as auto; null = started here

    @model_validator(mode="after")
    def _of_ray(self) -> "FederationConfig":
        given = [name for name in ("workers", "address") if getattr(self, name) is not None]
        if self.engine == "local" and given:
            raise ValueError(f"{' and '.join(given)}: of engine: ray, and the engine is local; set engine: ray")
        return self


class SchedulerKwargs(Strict):
    """Where `cosine_with_min_lr` ends; one of the two, names as in transformers."""

    min_lr: Annotated[float, Field(ge=0)] | None = None  # a learning rate
    min_lr_rate: Annotated[float, Field(ge=0, le=1)] | None = None  # a share of learning_rate


class TrainingConfig(Strict):
    """A client's local phase; names as in transformers' TrainingArguments."""

    local_steps: Length | None = None  # optimizer steps
    local_epochs: Length | None = None  # instead of local_steps
    batch_size: Count = 8  # examples of a client in one pass through the base
    gradient_accumulation_steps: Count = 1  # passes for one optimizer step
    gradient_checkpointing: Literal["auto", True, False] = "auto"  # recompute blocks in backward; auto: if memory asks
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"] = (
        "constant"
    )
    lr_scheduler_over: Literal["run", "rounds", "steps"] = "run"  # all local steps | one rate a round | each phase anew
    lr_scheduler_kwargs: SchedulerKwargs | None = None  # of cosine_with_min_lr
    warmup_steps: Whole = 0  # of what the schedule is over: local steps, or rounds; 0 = none
    warmup_ratio: Fraction = 0.0  # instead of warmup_steps, a share of them all
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0  # per client, over its whole row; null = no clipping
    keep_optimizer: bool = False  # false: moments start fresh every round
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)  # adamw
    eps: Annotated[float, Field(gt=0)] = 1e-8  # adamw
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # sgd

    @field_validator("warmup_steps", mode="before")
    @classmethod
    def _whole_steps(cls, value: Any) -> Any:
        """transformers 5 reads a number below 1 as a share."""
        if isinstance(value, float) and 0 < value < 1:
            raise ValueError(f"a share of all steps is written warmup_ratio: {value:g}")
        return value

    @model_validator(mode="after")
    def _keys_fit(self) -> "TrainingConfig":
        if faults := list(self.contradictions()):
            raise ValueError("; ".join(faults))
        return self

    def contradictions(self) -> Iterator[str]:
        """Say which keys do not go together."""
        kind, limits = self.lr_scheduler_type, self.lr_scheduler_kwargs or SchedulerKwargs()
        given = [name for name in SchedulerKwargs.model_fields if getattr(limits, name) is not None]
        if (self.local_steps is None) == (self.local_epochs is None):
            yield "give exactly one of local_steps and local_epochs"
        if self.warmup_steps and self.warmup_ratio:
            yield "give one of warmup_steps and warmup_ratio"
        if kind == "constant" and (self.warmup_steps or self.warmup_ratio):
            yield "lr_scheduler_type: constant has no warm-up; set it to constant_with_warmup, linear or cosine"
        if kind == "cosine_with_min_lr" and len(given) != 1:
            yield f"{kind} needs lr_scheduler_kwargs with one of min_lr and min_lr_rate"
        if kind != "cosine_with_min_lr" and given:
            yield f"lr_scheduler_kwargs.{given[0]} needs lr_scheduler_type: cosine_with_min_lr, found {kind}"
        if limits.min_lr is not None and limits.min_lr > self.learning_rate:
            yield f"lr_scheduler_kwargs.min_lr = {limits.min_lr:g} is above learning_rate = {self.learning_rate:g}"


# A key -> the one that it replaces, and the value that this one then has. So for a method's `training` laid over the
# study's, and for overrides laid over the config that `init` writes.
INSTEAD: Mapping[tuple[str, ...], tuple[tuple[str, ...], Any]] = {
    ("training", "local_steps"): (("training", "local_epochs"), None),
    ("training", "local_epochs"): (("training", "local_steps"), None),
    ("training", "warmup_steps"): (("training", "warmup_ratio"), 0.0),
    ("training", "warmup_ratio"): (("training", "warmup_steps"), 0),
    ("data", "clients", "partitioner"): (("data", "clients", "by"), "task"),
}


class MethodTraining(TrainingConfig):
    """The keys of `training` that one method has otherwise; those that are not written are the study's."""

    def contradictions(self) -> Iterator[str]:
        """Say nothing: whether keys go together shows when the study's are known."""
        return iter(())

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are written, as a config has them."""
        return self.model_dump(mode="json")

    @model_serializer(mode="wrap")
    def _only_what_is_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A default written out would replace the study's value when the config is read again."""
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if key in self.model_fields_set}

    def over(self, study: TrainingConfig) -> TrainingConfig:
        """Return the study's training with these keys instead of its own.

        A key that excludes another removes it, as does a type of schedule with the warm-up or limits it does not have.
        Raises ValidationError if the keys do not go together.
        """
        changed = {key: getattr(self, key) for key in self.model_fields_set}
        replaced = (INSTEAD.get(("training", key)) for key, value in changed.items() if value)
        removed = {path[-1] for path, _ in filter(None, replaced)}
        kind = changed.get("lr_scheduler_type")
        if kind == "constant":
            removed |= {"warmup_steps", "warmup_ratio"}
        if kind not in (None, "cosine_with_min_lr"):
            removed.add("lr_scheduler_kwargs")
        kept = {key: getattr(study, key) for key in TrainingConfig.model_fields if key not in removed}
        return TrainingConfig.model_validate({**kept, **changed})


class PrivacyConfig(Strict):
    """Differential privacy of every training example; docs/privacy.md says what that promises, and what not."""

    epsilon: Annotated[float, Field(gt=0)]  # budget of each client in a run; no round begins that would exceed it
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5  # well below 1 / examples of a client
    noise_multiplier: Annotated[float, Field(ge=0.2)] = 1.0  # standard deviation of the noise, in units of clip
    clip: Annotated[float, Field(gt=0)] = 1.0  # longest gradient of one example, over all numbers that are trained
    validation: bool = False  # true: validation losses are reported and chosen by; validation examples get no privacy


class EvaluationConfig(Strict):
    """What is measured; the final test on all clients always runs."""

    every: Count = 1  # rounds between validations of all clients (the curve)
    keep: Literal["last", "best"] = "last"  # adapters that are tested and exported; best: of the lowest validation loss
    metrics: list[Metric] = Field(default=["loss"])
    max_new_tokens: Count = 64
    max_examples: Count | None = None  # generated answers per client; None = its whole test split

    @field_validator("metrics")
    @classmethod
    def _loss_first(cls, metrics: list[Metric]) -> list[Metric]:
        return metrics if "loss" in metrics else ["loss", *metrics]


class ReportConfig(Strict):
    """What the report may show."""

    examples: bool = False  # true: prompts and answers of test examples are stored in the run folder and shown


class MethodEntry(BaseModel):
    """One entry of `methods:`; every other key belongs to the method's own Config."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_a_name(cls, value: Any) -> Any:
        if isinstance(value, str):  # `- mira` is `- {name: mira}`
            return {"name": value}
        if wrong := slip(value):
            raise ValueError(f"found no name{wrong}")
        return value

    name: str = Field(  # a method's id, or a dotted path
        max_length=200, pattern=r"^[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
    )
    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    wrappers: list[dict[str, Any]] = Field(default=[], alias="with")  # names and settings, the first innermost
    training: MethodTraining | None = None  # keys that differ from the study's `training` for this method

    @property
    def id(self) -> str:
        return self.name.replace("-", "_")

    @property
    def folder(self) -> str:
        return self.label or self.id

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def as_written(self) -> dict[str, Any]:
        """The entry as a config has it, without what is left at its default."""
        parts = {
            "name": self.name,
            "label": self.label,
            **self.settings,
            "with": self.wrappers or None,
            "training": (self.training.given or None) if self.training is not None else None,
        }
        return {key: value for key, value in parts.items() if value is not None}


class Config(Strict):
    """A study: data, base model, federation, and the methods to compare on them."""

    seeds: Annotated[list[Seed], Field(min_length=1)]
    output_dir: str
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    federation: FederationConfig
    training: TrainingConfig
    privacy: PrivacyConfig | None = None  # null: none; needs the extra dp
    methods: Annotated[list[MethodEntry], Field(min_length=1)]
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    # follow rounds there; extras
    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(default=[])

    def training_of(self, entry: MethodEntry) -> TrainingConfig:
        """Return how the clients of one method train: `training`, changed by what its entry says."""
        return self.training if entry.training is None else entry.training.over(self.training)

    @model_validator(mode="after")
    def _trainings_fit(self) -> "Config":
        faults = []
        for place, entry in enumerate(self.methods):
            try:
                self.training_of(entry)
            except ValidationError as error:
                said = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
                faults.append(f"methods.{place}.training: with the study's training: {said}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @model_validator(mode="after")
    def _distinct(self) -> "Config":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat: each seed runs once")
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"report_to {self.report_to} repeats: name each tracker once")
        folders = [entry.folder for entry in self.methods]
        twice = sorted({name for name in folders if folders.count(name) > 1})
        if twice:
            raise ValueError(f"methods {twice} appear more than once: give each a 'label:', which names its folder")
        return self
