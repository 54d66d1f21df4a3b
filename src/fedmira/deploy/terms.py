"""What a study demands of every site, settled before anyone joins: the agreement, and the config that all get."""

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from fedmira.adapters import scales
from fedmira.adapters.ranks import client_ranks
from fedmira.config.sections import ClientsConfig, Config, MethodEntry
from fedmira.data.partition import client_key
from fedmira.data.templates import NAMES
from fedmira.deploy.settings import Agreement
from fedmira.engine.schedule import draw_schedule
from fedmira.errors import ConfigError, MethodError
from fedmira.graphs.settings import GraphConfig
from fedmira.methods import Recipe, recipe_of
from fedmira.methods.base import Cohort
from fedmira.study.adapting import ranks_by_module
from fedmira.study.assemble import base_of
from fedmira.study.privacy import check_method, check_privacy, check_profile
from fedmira.study.training import check_optimizer

AT_EACH_SITE = "AT-EACH-SITE"  # data.path of the study that all sites get


@dataclass(frozen=True)
class Terms:
    """config: the study as server and sites get it. notes: what the organiser should know."""

    config: Config
    agreement: Agreement
    notes: Sequence[str]


def settle(config: Config, *, federation: str, sites: Sequence[str]) -> Terms:
    """Load the base once, and write down what server and sites must have in common.

    Raises ConfigError that lists what a federation cannot have, ModelError if the base cannot be used.
    """
    check_privacy(config)
    recipes = [recipe_of(entry) for entry in config.methods]
    if faults := list(list_unfit(config, recipes, sites)):
        raise ConfigError(faults, "federation")
    base = base_of(config, config.model.dtype)
    columns = columns_of(recipes)
    agreement = Agreement(
        federation=federation,
        base_model=config.model.base_model,
        base_fingerprint=base.fingerprint,
        architecture=type(base.model).__name__,
        shapes=base.shapes,
        width=base.width,
        transposed=base.transposed,
        dtype=str(base.dtype).removeprefix("torch."),
        template=config.data.template,
        ranks=ranks_of(config, sites, [name for name, _, _ in base.shapes]),
        columns=columns,
        fedmira=importlib.metadata.version("fedmira"),
        profiles=profiles_of(recipes),
    )
    return Terms(shared_config(config, agreement), agreement, list(list_notes(config, recipes)))


def shared_config(config: Config, agreement: Agreement) -> Config:
    """Return the study as all parties get it: without the organiser's data, with the agreed type of numbers."""
    folder = Path(config.model.base_model)
    base_model = str(folder.resolve()) if folder.is_dir() else config.model.base_model
    model = config.model.model_copy(update={"base_model": base_model, "dtype": agreement.dtype})
    data = config.data.model_copy(update={"path": AT_EACH_SITE, "clients": ClientsConfig()})
    return _change_graphs(config, _with_whole_path).model_copy(update={"model": model, "data": data})


def list_unfit(config: Config, recipes: Sequence[Recipe], sites: Sequence[str]) -> Iterator[str]:
    """Say what a study has that a federation cannot have."""
    if isinstance(config.lora.ranks, Mapping):
        yield (
            "lora.ranks: found a column of the data, which nobody sees but its site; ranks must be settled now: give a "
            "list with one for each site, in the order of --sites"
        )
        return
    if config.lora.start is not None:
        yield "lora.start: a federation begins with factors that are drawn; leave it out"
    if config.federation.engine != "local":
        yield "federation.engine: each site computes for itself, and Ray is for one study's passes; leave it out"
    if config.data.template not in ("auto", *NAMES):
        yield (
            f"data.template: found '{config.data.template}', a file of this machine; allowed in a federation are auto, "
            f"{', '.join(NAMES)}"
        )
    if isinstance(config.lora.ranks, list) and len(config.lora.ranks) != len(sites):
        yield (
            f"lora.ranks: found {len(config.lora.ranks)} ranks for {len(sites)} sites; give one for each, in their "
            f"order ({', '.join(sites)})"
        )
    ranks = torch.ones(len(sites), dtype=torch.int64)
    for place, recipe in enumerate(recipes):
        where = f"methods.{place} ({recipe.entry.folder})"
        columns = columns_of([recipe])
        cohort = trial_cohort(config, sites, columns, ranks)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                method = recipe.build(cohort)
        except MethodError as error:
            if not columns:  # else it depends on the sites' data, which are known when they have joined
                yield f"{where}: {error}"
            continue
        try:
            check_optimizer(method, config.training_of(recipe.entry), where)
            check_method(config, method, where)
            if profiles_of([recipe]):
                check_profile(config)
        except MethodError as error:
            yield str(error)
        if method.regime.trainees == "pool":
            yield (
                f"{where}: it trains on the data of all clients together, which never are in one place here; take it "
                "out, and compare with a simulation if you may"
            )


def trial_cohort(config: Config, sites: Sequence[str], columns: Sequence[str], ranks: Tensor) -> Cohort:
    """Return a federation of these sites before anything is known of their data."""
    count = len(sites)
    return Cohort(
        ids=tuple(sites),
        examples=(1,) * count,
        columns=(dict.fromkeys(columns, "unknown"),) * count,
        schedule=draw_schedule(
            count,
            rounds=config.federation.rounds,
            participation=config.federation.participation,
            seed=config.seeds[0],
        ),
        seed=config.seeds[0],
        profile=lambda column: np.eye(count) + 1,
        ranks=ranks,
        scale=scales(ranks, config.lora.lora_alpha),
    )


def list_notes(config: Config, recipes: Sequence[Recipe]) -> Iterator[str]:
    """Say what of a study has no meaning here, and what sites need beside FedMira."""
    clients = config.data.clients
    changed = [name for name in ClientsConfig.model_fields if getattr(clients, name) != getattr(ClientsConfig(), name)]
    if changed:
        keys = ", ".join(f"data.clients.{name}" for name in changed)
        yield f"{keys}: not used here; every site is one client, with all examples of its own data.path"
    for recipe in recipes:
        if "." in recipe.entry.name:
            yield f"method '{recipe.entry.name}' is not part of FedMira: it must be installed at every site too"


def ranks_of(config: Config, sites: Sequence[str], modules: Sequence[str]) -> dict[str, list[int] | int]:
    """Return the rank of each site's adapter, or one for each module where these differ.

    Raises ConfigError if a list in `lora.ranks` is not as long as there are sites.
    """
    ranks = client_ranks(
        config.lora.ranks,
        usual=config.lora.r,
        ids=sites,
        columns=[{}] * len(sites),
        keys=[client_key(site) for site in sites],
        seed=config.data.seed,
        modules=lambda: modules,
        by_module=(lambda: ranks_by_module(config.lora, modules)) if config.lora.rank_pattern else None,
    )
    return dict(zip(sites, ranks.tolist(), strict=True))


def columns_of(recipes: Sequence[Recipe]) -> list[str]:
    """Return the data columns whose value at a site the methods must know."""
    columns: dict[str, None] = {}
    for recipe in recipes:
        for section in _sections(recipe.settings):
            counted = isinstance(section, GraphConfig) and section.kind == "knn"
            if not counted and isinstance(column := getattr(section, "column", None), str):
                columns[column] = None
    return list(columns)


def profiles_of(recipes: Sequence[Recipe]) -> list[str | None]:
    """Return what kNN graphs are made of: names of data columns whose values are counted, None for embeddings."""
    graphs = [section for recipe in recipes for section in _sections(recipe.settings)]
    knn = [graph for graph in graphs if isinstance(graph, GraphConfig) and graph.kind == "knn"]
    return list(dict.fromkeys(graph.column for graph in knn))


def for_one_site(config: Config) -> Config:
    """Return a study whose methods can be built at a site, which knows no other: the client's half needs no graph."""
    return _change_graphs(config, lambda graph: {"kind": "uniform"} if graph.get("kind") in ("knn", "file") else graph)


def _change_graphs(config: Config, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Config:
    """Return a config with the settings of every graph changed."""

    def walk(value: Any, key: str = "") -> Any:
        if not isinstance(value, dict):
            return value
        inner = {name: walk(one, name) for name, one in value.items()}
        return change(inner) if key == "graph" else inner

    entries = [
        MethodEntry.model_validate({**entry.model_dump(by_alias=True, exclude_unset=True), **walk(entry.settings)})
        for entry in config.methods
    ]
    return config.model_copy(update={"methods": entries})


def _with_whole_path(graph: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a graph with the path of its file from the root: the server may be started elsewhere."""
    return graph if graph.get("kind") != "file" else {**graph, "path": str(Path(graph["path"]).resolve())}


def _sections(settings: BaseModel) -> Iterator[BaseModel]:
    """Yield a method's settings and every section inside them."""
    yield settings
    for name in type(settings).model_fields:
        if isinstance(inner := getattr(settings, name), BaseModel):
            yield from _sections(inner)
