"""The one strict config: what may be written, what it means, every fault at once. config_file.py reads and writes it.

Nothing below the engine sees these classes except a method's own `Config` base. Contract: contracts page, "Config".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedmira.errors import ConfigError, nearest

Metric = Literal["loss", "rouge_l", "exact_match", "word_accuracy"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]  # beyond it array lengths overflow; no federation has so many of anything
Count = Annotated[Whole, Field(ge=1)]
Length = Annotated[int, Field(ge=1, le=1_000_000)]  # of a run or a phase: its schedule is held in memory
PATHS = frozenset({"path", "base_model", "output_dir", "template"})  # keys of any section whose text may be a path
NAME_BYTES, PATH_LETTERS = 255, 4000  # what Linux and macOS bear, with room for the names inside a study


class Strict(BaseModel):
    """Base of every section: unknown keys are refused, values cannot change after the door."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_is_read_as_something_else(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1, "3" as 3 and "no" as false; in a config each of them is a slip."""
        key = str(info.field_name)
        annotation = cls.model_fields[key].annotation
        if annotation is bool and not isinstance(value, bool):
            raise ValueError("should be true or false")
        for word in value if isinstance(value, list | tuple) else [value]:
            _check_kind(word, annotation)
        if key in PATHS and isinstance(value, str):
            _check_path(value)
        return value


def _check_kind(word: Any, annotation: Any) -> None:
    """Raise ValueError for a value of a kind that its key does not have, though pydantic would convert it."""
    if not isinstance(word, bool | int | float | str | list | tuple | Mapping | BaseModel | None):
        raise ValueError("is no text, number, list or mapping")
    if isinstance(word, bool) and annotation is not bool:
        raise ValueError("true and false are not allowed here")
    if not isinstance(word, str):
        return
    kinds, choices = _kinds(annotation)
    if str not in kinds and word not in choices and kinds & {int, float}:
        raise ValueError(f"should be a number{''.join(f', or {choice}' for choice in choices)}; a text is none")
    if str in kinds and not word:
        raise ValueError("is empty; write null, or leave the key out")
    if re.search("[\ud800-\udfff]", word):
        raise ValueError("contains half a character (a lone surrogate)")


def _kinds(annotation: Any) -> tuple[set[Any], list[Any]]:
    """Return the types that stand anywhere in an annotation, and the choices of its Literals."""
    if get_origin(annotation) is Literal:
        return set(), list(get_args(annotation))
    inner = [_kinds(part) for part in get_args(annotation)]
    return {annotation}.union(*(kinds for kinds, _ in inner)), [choice for _, own in inner for choice in own]


def _check_path(path: str) -> None:
    """Raise ValueError for a path that no file can have: asking for it would be an error of the system's own."""
    longest = max(len(name.encode(errors="surrogatepass")) for name in path.split("/"))
    if "\0" in path or longest > NAME_BYTES or len(path) > PATH_LETTERS:
        raise ValueError(f"is no path: at most {PATH_LETTERS} letters, {NAME_BYTES} bytes between two /, and no NUL")


class ModelConfig(Strict):
    """The frozen base model."""

    base_model: str  # local folder or hub name; no default on purpose
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = (
        "auto"  # auto: bfloat16 where the machine computes it fast
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    revision: str | None = None  # hub only: branch, tag or commit


MAX_RANK = 65_536  # above the width of any base it says nothing more
RANK_TYPES = ("T1", "T2", "T3", "T4")  # of FlexLoRA; ranks.py says what they are and how they are drawn
RANK_DRAWS = ("uniform", "heavy-tail-light", "heavy-tail-strong", "normal")


class LoraConfig(Strict):
    """The adapters; names and meaning as in PEFT's LoraConfig, but for `ranks`."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    ranks: list[int | str] | dict[str, str] | str | None = None  # a rank per client: a list, {column: NAME}, a draw
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all-linear", "auto"] = "auto"  # auto: PEFT's list for the architecture

    @field_validator("ranks", mode="before")
    @classmethod
    def _a_list_a_column_or_a_draw(cls, value: Any) -> Any:
        """Check by hand: of three kinds pydantic would tell what is wrong with each."""
        if value is None or (isinstance(value, str) and value in RANK_DRAWS):
            return value
        if isinstance(value, list | tuple) and value:
            odd = [one for one in value if not (type(one) is int and 1 <= one <= MAX_RANK) and one not in RANK_TYPES]
            if odd:
                words = f"whole numbers from 1 to {MAX_RANK:,}, and {', '.join(RANK_TYPES)}"
                raise ValueError(f"found {_short(odd[0])} in the list of ranks; allowed are {words}")
            return value
        if isinstance(value, Mapping) and list(value) == ["column"] and isinstance(value["column"], str):
            return value
        hint = nearest(value, RANK_DRAWS) if isinstance(value, str) else ""
        draws = ", ".join(RANK_DRAWS)
        raise ValueError(f"should be a list with a rank per client, {{column: NAME}}, or a draw: {draws}{hint}")

    @model_validator(mode="after")
    def _one_rule(self) -> "LoraConfig":
        if self.ranks is not None and self.r != LoraConfig.model_fields["r"].default:  # a default may be written out
            raise ValueError(f"ranks takes the place of r; remove 'r: {self.r}', or ranks")
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


class IidPartitioner(Strict):
    """Equal parts, drawn at random."""

    name: Literal["iid"]
    num_partitions: Count  # clients
    shuffle: bool = True  # false: parts in file order, which are alike only if the file is in random order
    seed: Seed | None = None  # null = data.seed


class SizePartitioner(Strict):
    """Parts of given sizes."""

    name: Literal["size"]
    partition_sizes: Annotated[list[Count], Field(min_length=1)]  # examples of each client
    shuffle: bool = True  # false: parts in file order
    seed: Seed | None = None  # null = data.seed


class GrowingPartitioner(Strict):
    """Parts whose sizes grow with their number i = 1, 2, ...: as i, i^2 or e^i."""

    name: Literal["linear", "square", "exponential"]
    num_partitions: Count  # clients
    shuffle: bool = True  # false: parts in file order
    seed: Seed | None = None  # null = data.seed


class DirichletPartitioner(Strict):
    """Label skew: each class is shared out by a Dirichlet draw."""

    name: Literal["dirichlet"]
    num_partitions: Count  # clients
    partition_by: str  # the column that holds the class
    alpha: Annotated[float, Field(gt=0)] | list[Annotated[float, Field(gt=0)]]  # small = skewed, large = alike
    min_partition_size: Whole = 10  # examples every client has at least; drawn again until then
    self_balancing: bool = False  # clients with more than their share get no more
    shuffle: bool = True  # order within each client
    seed: Seed | None = None  # null = data.seed


class PathologicalPartitioner(Strict):
    """Each client has a few classes only."""

    name: Literal["pathological"]
    num_partitions: Count  # clients
    partition_by: str  # the column that holds the class
    num_classes_per_partition: Count
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = "random"
    shuffle: bool = True  # order within each client
    seed: Seed | None = None  # null = data.seed


class ShardPartitioner(Strict):
    """Examples sorted by class and cut into shards, some for each client (McMahan et al. 2017)."""

    name: Literal["shard"]
    num_partitions: Count  # clients
    partition_by: str  # the column that holds the class
    num_shards_per_partition: Count | None = None  # this, or shard_size, or both
    shard_size: Count | None = None  # examples
    keep_incomplete_shard: bool = False  # the last shard, smaller than the others; false: its examples are left out
    shuffle: bool = True  # which shards a client gets, and their order
    seed: Seed | None = None  # null = data.seed


class NaturalIdPartitioner(Strict):
    """One client per value of a column; the same as `by`."""

    name: Literal["natural_id"]
    partition_by: str


Partitioner = (
    IidPartitioner
    | SizePartitioner
    | GrowingPartitioner
    | DirichletPartitioner
    | PathologicalPartitioner
    | ShardPartitioner
    | NaturalIdPartitioner
)
PARTITIONERS: Mapping[str, type[Strict]] = {
    name: kind for kind in get_args(Partitioner) for name in get_args(kind.model_fields["name"].annotation)
}


def _partitioner_name(value: Any) -> str:
    """Read `dirichlet`, `Dirichlet` and `DirichletPartitioner` alike; no name is an empty one."""
    name = str(value.get("name") or "") if isinstance(value, Mapping) else ""
    return re.sub(r"_?partitioner$", "", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _slip(value: Any) -> str:
    """Return what to say of a mapping without `name` that has a key like it; nothing if there is none."""
    keys = [str(key) for key in value] if isinstance(value, Mapping) and "name" not in value else []
    wrong = get_close_matches("name", keys, n=1, cutoff=0.7)
    return f": '{wrong[0]}' is an unknown key (did you mean 'name'?)" if wrong else ""


class ClientsConfig(Strict):
    """Who is a client: every value of a column, each value dealt at random to several, or what a partitioner says."""

    by: str = "task"  # a column of the data: "task", "category", "file" (one file per client), ...
    per_group: Count = 1  # clients that share one value's examples, dealt at random
    partitioner: Partitioner | None = None  # names and parameters of flwr-datasets; takes the place of `by`
    first: Count | None = None  # only the first n values (or parts) in file order; null = all
    groups: str | None = None  # column that names a client's group in reports; null = the value of `by`

    @field_validator("partitioner", mode="wrap")
    @classmethod
    def _by_name(cls, value: Any, handler: Any) -> Any:
        """Check a partitioner against the one that it names, so that faults speak of it and not of all six."""
        if value is None or isinstance(value, Strict):
            return handler(value)
        name = _partitioner_name(value)
        if name not in PARTITIONERS:
            found = f"name {_short(value['name'])} is unknown" if name else f"found no name{_slip(value)}"
            raise ValueError(f"{found}{nearest(name, list(PARTITIONERS))}; known: {', '.join(PARTITIONERS)}")
        return PARTITIONERS[name].model_validate({**value, "name": name})

    @model_validator(mode="after")
    def _one_rule(self) -> "ClientsConfig":
        if self.partitioner and (self.by != "task" or self.per_group != 1):  # a default may be written out
            other = "per_group" if self.by == "task" else f"by: {self.by}"
            raise ValueError(f"a partitioner takes the place of by and per_group; remove '{other}', or the partitioner")
        return self


class DataConfig(Strict):
    """What the clients train on."""

    path: str  # file, folder, folder saved by `datasets`, or name on the Hugging Face hub; no default on purpose
    subset: str | None = None  # hub only: the data set's configuration, such as "main"
    revision: str | None = None  # hub only: branch, tag or commit
    format: Literal[
        "auto", "natural_instructions", "dolly", "alpaca", "prompt_completion", "messages", "sharegpt", "text"
    ] = "auto"  # auto: by the keys of the first row, and announced
    columns: dict[str, str] = {}  # FedMira's name -> the data's column, where they differ
    on_bad_row: Literal["error", "skip"] = "error"  # skip: count bad rows, say how many, go on with the others
    template: str = "auto"  # alpaca | none | chat (the tokenizer's) | a Jinja file; auto: the format's usual one
    max_length: Annotated[int, Field(ge=4, lt=2**31)] = 512  # tokens of prompt + answer + end
    positions_ahead: Annotated[int, Field(ge=0)] = 0  # of the base, kept free; at least a method's virtual tokens
    truncation: Literal["prompt"] = "prompt"  # the answer is kept, the prompt is cut at its start
    split: SplitConfig = SplitConfig()
    split_column: str | None = None  # column with train | validation | test; overrides `split`
    clients: ClientsConfig = ClientsConfig()
    subsample: Annotated[float, Field(gt=0, le=1)] = 1.0  # fraction of each client's examples kept
    seed: Seed = 0  # splits, subsample, dealing and partitioners; the same for all methods and training seeds


class FederationConfig(Strict):
    """Rounds and who takes part."""

    rounds: Length
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0  # fraction of clients per round, at least one
    cohort: Count | Literal["auto"] = "auto"  # clients trained in one pass


class TrainingConfig(Strict):
    """A client's local phase; names as in transformers' TrainingArguments."""

    local_steps: Length | None = None
    local_epochs: Length | None = None  # may stand for local_steps
    batch_size: Count = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0  # per client, over its whole row; null = no clipping
    keep_optimizer: bool = False  # false: moments start fresh every round
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)  # adamw
    eps: Annotated[float, Field(gt=0)] = 1e-8  # adamw
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # sgd

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give exactly one of local_steps and local_epochs")
        return self


class EvaluationConfig(Strict):
    """What is measured; the final test on all clients always runs."""

    every: Count = 1  # rounds between validations of all clients (the curve)
    metrics: list[Metric] = ["loss"]
    max_new_tokens: Count = 64
    max_examples: Count | None = None  # generated answers per client; None = its whole test split

    @field_validator("metrics")
    @classmethod
    def _loss_first(cls, metrics: list[Metric]) -> list[Metric]:
        return metrics if "loss" in metrics else ["loss", *metrics]


class ReportConfig(Strict):
    """What the report may show."""

    examples: bool = False  # true: prompts and answers of test examples are kept in the run folder and shown


class MethodEntry(BaseModel):
    """One entry of `methods:`; everything but name and label belongs to the method's own Config."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_a_name(cls, value: Any) -> Any:
        if isinstance(value, str):  # `- mira` is `- {name: mira}`
            return {"name": value}
        if slip := _slip(value):
            raise ValueError(f"found no name{slip}")
        return value

    name: str = Field(  # a method's id, or a dotted path
        max_length=200, pattern=r"^[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
    )
    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")

    @property
    def id(self) -> str:
        return self.name.replace("-", "_")

    @property
    def folder(self) -> str:
        return self.label or self.id

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Config(Strict):
    """A study: data, base model, federation, and the methods to compare on them."""

    seeds: Annotated[list[Seed], Field(min_length=1)]
    output_dir: str
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    federation: FederationConfig
    training: TrainingConfig
    methods: Annotated[list[MethodEntry], Field(min_length=1)]
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    report_to: list[Literal["tensorboard", "trackio"]] = []  # follow every round there; extras, both inside the study

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


def check_config(
    raw: Mapping[str, Any],
    source: str = "config",
    method_faults: Callable[[int, MethodEntry], list[str]] | None = None,
) -> Config:
    """Turn a raw mapping into a Config. Raises one ConfigError that lists every fault.

    method_faults: checks one entry of `methods:` against that method's own settings; given by the layer above.
    """
    faults: list[str] = []
    config: Config | None = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults += [describe_fault(fault, Config, raw) for fault in error.errors()]
    if method_faults is not None:
        entries = raw.get("methods")
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            try:
                faults += method_faults(index, MethodEntry.model_validate(entry))
            except ValidationError:
                continue  # already among the faults above
    if faults or config is None:
        raise ConfigError(faults, source)
    return config


def describe_fault(fault: Any, model: type[BaseModel], raw: Any, prefix: str = "") -> str:
    """Turn one pydantic error into a line: where, what was found, what is allowed."""
    loc = [
        word
        for word in fault["loc"]
        if not (isinstance(word, str) and word.startswith(("list[", "literal[", "constrained-", "function-")))
    ]
    where = ".".join(str(word) for word in loc)
    where = f"{prefix}{where}" if where else prefix.rstrip(".")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        owner = _section(model, loc[:-1], raw)
        beside = MethodEntry.model_fields if prefix and len(loc) == 1 else ()  # a method's own settings stand by these
        allowed = sorted({*_keys(owner), *beside})
        return f"{where}: unknown key{nearest(str(loc[-1]), allowed)}; allowed here: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"{where}: missing; it has no default"
    if fault["type"] == "value_error" and not loc:
        return message
    found = fault["input"]
    plain = isinstance(found, str | int | float | bool | None)
    if fault["type"] == "value_error" and not plain:
        return f"{where}: {message}"
    shown = f"found {_short(found)}" if plain else f"found a {type(found).__name__}"
    return f"{where}: {shown}: {message[0].lower()}{message[1:]}"


def _short(value: Any) -> str:
    """Return a wrong value as one line of an error shows it; Python refuses to write out 4300 digits."""
    text = "a huge number" if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _section(model: type[BaseModel], loc: Sequence[Any], raw: Any) -> type[BaseModel]:
    """Follow a location through nested sections to the model that owns the last key."""
    for word in loc:
        raw = raw.get(word) if isinstance(raw, Mapping) else None
        field = next((f for name, f in model.model_fields.items() if word in (name, f.alias)), None)
        if field is None:
            continue
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        sections = [kind for kind in kinds if issubclass(kind, BaseModel)]
        if len(sections) > 1:
            sections = [kind for name, kind in PARTITIONERS.items() if name == _partitioner_name(raw)]
        model = sections[0] if sections else model
    return model
