"""The one strict config: YAML plus dotted overrides in, plain frozen records out, every fault at once.

Nothing below the engine sees these classes except a method's own `Config` base. Contract: contracts page, "Config".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedmira.errors import ConfigError, nearest

Metric = Literal["loss", "rouge_l", "exact_match", "word_accuracy"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Base of every section: unknown keys are refused, values cannot change after the door."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1; `rounds: true` is a slip, not one round."""
        found = value if isinstance(value, list | tuple) else [value]
        annotation = cls.model_fields[str(info.field_name)].annotation
        if annotation is not bool and any(isinstance(word, bool) for word in found):
            raise ValueError("true and false are not allowed here")
        return value


class ModelConfig(Strict):
    """The frozen base model."""

    base_model: str  # local folder or hub name; no default on purpose
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = (
        "auto"  # auto: bfloat16 where the machine computes it fast
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"


class LoraConfig(Strict):
    """The adapters; names and meaning as in PEFT's LoraConfig."""

    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all-linear", "auto"] = "auto"  # auto: PEFT's list for the architecture


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
    """Who is a client: every task, or every value of a column, or each value dealt at random to `per_group` clients."""

    by: str = "task"  # "task", or the name of a column in the data
    per_group: Annotated[int, Field(ge=1)] = 1  # clients that share one value's examples, dealt at random
    first: Annotated[int, Field(ge=1)] | None = None  # only the first n values in file order; None = all
    groups: str | None = None  # column that names a client's group in reports; None = the value of `by`


class DataConfig(Strict):
    """What the clients train on."""

    path: str  # file or folder; no default on purpose
    format: Literal["auto", "natural_instructions", "dolly", "alpaca", "prompt_completion"] = "auto"
    columns: dict[str, str] = {}  # FedMira's name -> the data's column, where they differ
    template: Literal["alpaca", "none"] = "alpaca"
    max_length: Annotated[int, Field(ge=4)] = 512  # tokens of prompt + answer + end
    truncation: Literal["prompt"] = "prompt"  # the answer is kept, the prompt is cut at its start
    split: SplitConfig = SplitConfig()
    split_column: str | None = None  # column with train | validation | test; overrides `split`
    clients: ClientsConfig = ClientsConfig()
    subsample: Annotated[float, Field(gt=0, le=1)] = 1.0  # fraction of each client's examples kept
    seed: Seed = 0  # splits, subsample and dealing; the same for all methods and training seeds


class FederationConfig(Strict):
    """Rounds and who takes part."""

    rounds: Annotated[int, Field(ge=1)]
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0  # fraction of clients per round, at least one
    cohort: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # clients trained in one pass


class TrainingConfig(Strict):
    """A client's local phase; names as in transformers' TrainingArguments."""

    local_steps: Annotated[int, Field(ge=1)] | None = None
    local_epochs: Annotated[int, Field(ge=1)] | None = None  # may stand for local_steps
    batch_size: Annotated[int, Field(ge=1)] = 8
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

    every: Annotated[int, Field(ge=1)] = 1  # rounds between validations of all clients (the curve)
    metrics: list[Metric] = ["loss"]
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    max_examples: Annotated[int, Field(ge=1)] | None = None  # generated answers per client; None = its whole test split

    @field_validator("metrics")
    @classmethod
    def _loss_first(cls, metrics: list[Metric]) -> list[Metric]:
        return metrics if "loss" in metrics else ["loss", *metrics]


class MethodEntry(BaseModel):
    """One entry of `methods:`; everything but name and label belongs to the method's own Config."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
    )  # a method's id, or a dotted path
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

    @model_validator(mode="after")
    def _distinct(self) -> "Config":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat: each seed runs once")
        folders = [entry.folder for entry in self.methods]
        twice = sorted({name for name in folders if folders.count(name) > 1})
        if twice:
            raise ValueError(f"methods {twice} appear more than once: give each a 'label:', which names its folder")
        return self


class _Loader(yaml.SafeLoader):
    """YAML without its traps: `3e-4` is a number, `007` and `no` are text, a repeated key is a fault."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the base class's are the traps

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError([f"line {node.start_mark.line + 1}: key '{key}' is given twice; keep one"])
        return super().construct_mapping(node, deep)


_FLOAT = r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(_pattern),
        list(_first.replace("\0", "")) + ([""] if _tag == "null" else []),
    )


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML text safely. Raises ConfigError with file and line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"{where}not valid YAML: {getattr(error, 'problem', error)}"], source) from None
    except ConfigError as error:
        raise ConfigError(error.faults, source) from None
    except (ValueError, RecursionError) as error:  # a tag such as !!int on text, 5000 digits, a thousand brackets
        raise ConfigError([f"a value cannot be read: {error}"], source) from None


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply `a.b=c` overrides (lists by index: `methods.2.lambda=0.3`).

    Raises ConfigError if the file is missing, is no mapping, or an override names no place.
    """
    if not path.is_file():
        raise ConfigError(
            [f"no such config file (current folder: {Path.cwd()}); the README shows one to begin with"],
            str(path),
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"byte {error.start} is not UTF-8; save the file as UTF-8"], str(path)) from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(
            [f"found {found}: a config is a mapping with the keys {', '.join(Config.model_fields)}"], str(path)
        )
    faults = [fault for override in overrides if (fault := _override(raw, override))]
    if faults:
        raise ConfigError(faults, "overrides")
    return raw


def _override(raw: dict[str, Any], override: str) -> str | None:
    """Apply one `a.b=c` to the raw mapping; return the fault, or None."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        return f"'{override}': an override is written a.b=c"
    place: Any = raw
    words = key.split(".")
    for position, word in enumerate(words):
        if isinstance(place, list):
            if not (word.isascii() and word.isdecimal()) or int(word) >= len(place):
                return f"'{override}': '{word}' is no index of a list of {len(place)}"
            index: Any = int(word)
        elif isinstance(place, dict):
            index = word
        else:
            return f"'{override}': '{word}' lies inside a plain value"
        if position == len(words) - 1:
            try:
                place[index] = parse_yaml(value, "overrides")
            except ConfigError as error:
                return f"'{override}': {error.faults[0]}"
            return None
        if isinstance(place, dict) and place.get(index) is None:
            place[index] = {}
        place = place[index]
    return None


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
        owner = _section(model, loc[:-1])
        allowed = sorted(_keys(owner))
        return f"{where}: unknown key{nearest(str(loc[-1]), allowed)}; allowed here: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"{where}: missing; it has no default"
    if fault["type"] == "value_error" and not loc:
        return message
    found = fault["input"]
    shown = (
        f"found {found!r}" if isinstance(found, str | int | float | bool | None) else f"found a {type(found).__name__}"
    )
    return f"{where}: {shown}: {message[0].lower()}{message[1:]}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _section(model: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    """Follow a location through nested sections to the model that owns the last key."""
    for word in loc:
        field = next((f for name, f in model.model_fields.items() if word in (name, f.alias)), None)
        if field is None:
            continue
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return model


class _Dumper(yaml.SafeDumper):
    """Quotes what is no text to us (`1e5`), and what is no text to other readers of YAML (`no`, `007`)."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Only double quotes keep the rarer line breaks of Unicode, which a reader folds into spaces elsewhere."""
    style = '"' if any(letter in text for letter in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_config(config: Config) -> str:
    """Write a Config as YAML that runs again as it is."""
    content = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
