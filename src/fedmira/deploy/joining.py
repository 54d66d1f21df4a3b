"""Joining: what a site says of itself, and why a server would not take it. Found out here, and not in round 7."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedmira.adapters import lora_layout
from fedmira.deploy.settings import PROTOCOL, Agreement, installed_versions
from fedmira.errors import WireError

if TYPE_CHECKING:
    from fedmira.deploy.site import Site

MAX_TEXT = 1000  # characters of a column's value
SAME_VERSIONS = ("fedmira",)  # must be equal; those of other libraries are only told


@dataclass(frozen=True)
class SiteCard:
    """What a site says when it joins. columns: values of the data columns that the methods ask for.

    counts: of values of the columns that a kNN graph is made of; embedding: of the prompts, where one is made of those.
    metrics: does it share losses and scores. examples: of its splits.
    """

    name: str
    protocol: int
    versions: Mapping[str, str]
    base_fingerprint: str
    layout: str
    ranks: Sequence[int] | int
    dtype: str
    examples: Mapping[str, int]
    trained_tokens: int
    columns: Mapping[str, str]
    counts: Mapping[str, Mapping[str, int]]
    embedding: Sequence[float]
    metrics: bool


def layout_of(agreement: Agreement) -> str:
    """Return the fingerprint of the federation's rows."""
    ranks = list(agreement.ranks.values())
    many = [[value] * len(agreement.shapes) if isinstance(value, int) else list(value) for value in ranks]
    largest = [max(values) for values in zip(*many, strict=True)]
    return lora_layout(list(agreement.shapes), largest).fingerprint


def card_of(site: "Site") -> dict[str, Any]:
    """Return a site's card as JSON."""
    client, agreement = site.client, site.agreement
    counted = [name for name in agreement.profiles if name is not None and site.settings.share_profile]
    card = SiteCard(
        name=site.settings.name,
        protocol=PROTOCOL,
        versions=installed_versions(),
        base_fingerprint=site.base.fingerprint,
        layout=layout_of(agreement),
        ranks=agreement.ranks[site.settings.name],
        dtype=str(site.base.dtype).removeprefix("torch."),
        examples={"train": len(client.train), "validation": len(client.validation), "test": len(client.test)},
        # the sum with and without an example would tell its length
        trained_tokens=client.trained_tokens if site.config.privacy is None else 0,
        columns={name: value for name, value in client.columns.items() if name in agreement.columns},
        counts={name: dict(site.client.counts.get(name, {})) for name in counted},
        embedding=site.embedding,
        metrics=site.settings.share_metrics,
    )
    return asdict(card)


def read_card(stored: Any) -> SiteCard:
    """Return a card. Raises WireError if it is not one."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str, "protocol": int, "versions": dict, "base_fingerprint": str, "layout": str, "ranks": (int, list),
        "dtype": str, "examples": dict, "trained_tokens": int, "columns": dict, "counts": dict,
        "embedding": (list, tuple), "metrics": bool,
    }  # fmt: skip
    whole = isinstance(stored, dict) and all(isinstance(stored.get(name), kind) for name, kind in kinds.items())
    if not whole or not _are_of_their_types(stored):
        raise WireError("schema", "a site's card lacks a key, or one is of another type")
    return SiteCard(**{name: stored[name] for name in kinds})


def _are_of_their_types(card: Mapping[str, Any]) -> bool:
    """Say whether what a card holds is what the server computes with; JSON has text as every key."""
    texts = [*card["versions"].values(), *card["columns"].values()]
    counts = [*card["examples"].values(), card["trained_tokens"]]
    return (
        all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts)
        and all(type(count) is int and count >= 0 for count in counts)
        and all(isinstance(one, dict) for one in card["counts"].values())
        and "train" in card["examples"]
    )


def why_not(card: SiteCard, name: str, agreement: Agreement) -> str | None:
    """Say in one sentence why a site cannot take part, None if it can. name: what its certificate says."""
    own = installed_versions()
    if card.name != name:
        return f"site.yaml says '{card.name}', the certificate '{name}': put the right kit into the site's folder"
    if card.protocol != PROTOCOL:
        return f"it speaks protocol {card.protocol}, the server {PROTOCOL}: install the same version of FedMira"
    for library in SAME_VERSIONS:
        if card.versions.get(library) != own[library]:
            return f"it has {library} {card.versions.get(library)}, the server {own[library]}: install the same version"
    if card.base_fingerprint != agreement.base_fingerprint:
        return (
            f"its base has sha256 {card.base_fingerprint[:12]}, agreed was {agreement.base_fingerprint[:12]} "
            f"('{agreement.base_model}'): give it a copy of that base"
        )
    if card.ranks != agreement.ranks[name]:
        return f"its rank is {card.ranks}, agreed was {agreement.ranks[name]}: send it the newest agreement.json"
    if card.layout != layout_of(agreement):
        return "its adapted modules, or their sizes, are not those agreed: send it the newest agreement.json"
    if card.dtype != agreement.dtype:
        return f"its base is loaded in {card.dtype}, agreed was {agreement.dtype}: send it the newest agreement.json"
    if missing := [column for column in agreement.columns if column not in card.columns]:
        return f"its data has no column '{missing[0]}' with one value, which a method's graph asks for: add the column"
    if (lacking := _lacking_profile(card, agreement)) is not None:
        return lacking
    if card.examples.get("train", 0) < 1:
        return "it has no training example"
    return None


def _lacking_profile(card: SiteCard, agreement: Agreement) -> str | None:
    """Say what a kNN graph needs and a card does not have, None if it has all."""
    for column in agreement.profiles:
        if column is None:
            numbers = all(isinstance(value, float) and math.isfinite(value) for value in card.embedding)
            if len(card.embedding) != agreement.width or not numbers:
                return (
                    "a graph of the study is made of the mean embedding of each site's prompts, and this site does not "
                    "send it: set share_profile: true in site.yaml, or let the organiser take another graph"
                )
        elif not card.counts.get(column):
            return (
                f"a graph of the study is made of counts of the values of column '{column}', and this site sends none: "
                "add the column, or set share_profile: true in site.yaml, or let the organiser take another graph"
            )
        elif not all(type(count) is int and count >= 0 for count in card.counts[column].values()):
            return f"its counts of the values of column '{column}' are not numbers"
    return None
