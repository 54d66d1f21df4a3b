"""What the parties of a federation settle: federation.yaml (the server's), site.yaml (a site's), agreement.json (all).

The server's file and the agreement are written by `fedmira federation init`; a site edits its site.yaml.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from fedmira.config.faults import describe_fault
from fedmira.config.strict import Count, Strict
from fedmira.config.yaml_text import read_config
from fedmira.disk.files import read_json
from fedmira.errors import ConfigError, StoreError

PROTOCOL = 1  # of orders and answers between server and sites
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # of a site: it names folders and certificates
HOST = r"^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$"
RESERVED = ("server", "members", "start")  # names of the engine, and of files beside the cards of sites


class ServerAddress(Strict):
    """Where sites reach the server: one port, which the sites connect to; none of theirs is opened."""

    host: Annotated[str, Field(pattern=HOST, max_length=253)]
    port: Annotated[int, Field(ge=1, le=65_535)] = 8002


class FederationSettings(Strict):
    """federation.yaml."""

    name: Annotated[str, Field(pattern=NAME)]
    server: ServerAddress
    sites: Annotated[list[Annotated[str, Field(pattern=NAME)]], Field(min_length=1)]
    deadline: Annotated[float, Field(gt=0)] = 3600.0  # seconds after which a round closes without those that are late
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5  # of the sites asked: with fewer answers a round is repeated
    tls: Literal["mutual", "off-and-i-know-it"] = "mutual"

    @field_validator("sites")
    @classmethod
    def _differ(cls, sites: list[str]) -> list[str]:
        lower = [site.lower() for site in sites]
        if twice := sorted({site for site in sites if lower.count(site.lower()) > 1}):
            raise ValueError(f"sites {', '.join(twice)} differ by case at most: each needs a name of its own")
        return sites

    @model_validator(mode="after")
    def _apart_from_the_server(self) -> FederationSettings:
        reserved = {*RESERVED, self.server.host.lower()}
        if taken := [site for site in self.sites if site.lower() in reserved]:
            raise ValueError(f"sites: '{taken[0]}' is the name of the server or of a file of it; a site needs another")
        return self


class SiteData(Strict):
    """Where a site's data is and how it is read; keys and meaning as in a study's `data`."""

    path: str  # no default on purpose
    format: str = "auto"
    columns: dict[str, str] = Field(default={})
    encoding: str | None = None
    delimiter: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    split_column: str | None = None

    @field_validator("path", mode="before")
    @classmethod
    def _filled_in(cls, value: Any) -> Any:
        if value is None or value == "":
            raise ValueError("is not filled in yet: write where this site's data is")
        return value


class SiteSettings(Strict):
    """site.yaml."""

    name: Annotated[str, Field(pattern=NAME)]
    data: SiteData
    base_model: str | None = None  # where the base is on this machine; None = as the study names it
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Count | None = None  # None = torch's own number, one for a small base
    share_metrics: bool = True  # false: no loss and no score leaves this site
    share_profile: bool = True  # false: nothing about its prompts and columns leaves it; a kNN graph cannot do without


@dataclass(frozen=True)
class Agreement:
    """agreement.json: what server and sites must have in common; compared when a site joins.

    shapes: of the adapted modules, (name, inputs, outputs). ranks: site -> rank, or one of each module. columns: names
    of data columns whose value at a site the methods ask for. profiles: of what kNN graphs are made: names of
    columns whose values are counted, None for mean embeddings of the prompts. base_model is a name for people: the
    fingerprint counts.
    """

    federation: str
    base_model: str
    base_fingerprint: str
    architecture: str
    shapes: Sequence[tuple[str, int, int]]
    width: int
    transposed: bool
    dtype: str
    template: str
    ranks: Mapping[str, Sequence[int] | int]
    columns: Sequence[str]
    fedmira: str
    profiles: Sequence[str | None] = ()
    protocol: int = PROTOCOL

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_agreement(path: Path) -> Agreement:
    """Read agreement.json. Raises StoreError if it is missing, damaged or of another version of the protocol."""
    if not path.is_file():
        raise StoreError(f"'{path}' is missing; copy it again from the server's folder")
    stored = read_json(path)
    try:
        agreement = Agreement(**{**stored, "shapes": [(name, int(a), int(b)) for name, a, b in stored["shapes"]]})
    except (TypeError, KeyError, ValueError) as error:
        raise StoreError(
            f"'{path}' is damaged ({type(error).__name__}); copy it again from the server's folder"
        ) from None
    if agreement.protocol != PROTOCOL:
        raise StoreError(
            f"'{path}' is of protocol {agreement.protocol}, this version of FedMira speaks {PROTOCOL}: install the "
            f"version that the federation was made with ({agreement.fedmira})"
        )
    return agreement


def installed_versions() -> dict[str, str]:
    """Return the versions that a site compares with the server's."""
    return {name: importlib.metadata.version(name) for name in ("fedmira", "torch", "transformers", "nvflare")}


def read_federation(path: Path) -> FederationSettings:
    """Read federation.yaml. Raises ConfigError that lists every fault."""
    return _read(path, FederationSettings)


def read_site(path: Path) -> SiteSettings:
    """Read site.yaml. Raises ConfigError that lists every fault."""
    return _read(path, SiteSettings)


Settings = TypeVar("Settings", bound=Strict)


def check(raw: Mapping[str, Any], kind: type[Settings], source: str) -> Settings:
    """Turn a raw mapping into settings. Raises one ConfigError that lists every fault."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([describe_fault(fault, kind, raw) for fault in error.errors()], source) from None


def _read(path: Path, kind: type[Settings]) -> Settings:
    return check(read_config(path), kind, str(path))
