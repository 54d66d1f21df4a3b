"""A site: its settings, its data and the base, loaded once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedmira.config.sections import Config
from fedmira.data.batches import ClientData
from fedmira.deploy.folders import SiteFolder
from fedmira.deploy.settings import Agreement, SiteSettings, read_agreement, read_site
from fedmira.deploy.terms import for_one_site
from fedmira.engine.events import silent
from fedmira.errors import ConfigError, ModelError
from fedmira.evaluation.embed import embed_prompts
from fedmira.methods import recipe_of
from fedmira.model.base.load import Base
from fedmira.model.quantised import stored_as
from fedmira.study.assemble import Materials, keep_positions
from fedmira.study.intake import take_in
from fedmira.study.loading import load_config
from fedmira.study.privacy import check_privacy, held_back
from fedmira.study.threads import count_threads


@dataclass(frozen=True, eq=False)
class Site:
    """What a site works with: loaded once, whatever the engine's processes do."""

    settings: SiteSettings
    agreement: Agreement
    config: Config
    base: Base
    client: ClientData
    threads: int
    embedding: Sequence[float] = ()  # of its prompts, if a graph is made of those and the site shares it


def settings_of(folder: SiteFolder) -> tuple[SiteSettings, Agreement, Config]:
    """Read a site's files: its settings, the agreement, and the study with the site's own data.

    Raises ConfigError or StoreError that says what to edit or to ask for.
    """
    settings, agreement = read_site(folder.settings), read_agreement(folder.agreement)
    if settings.name not in agreement.ranks:
        known = ", ".join(agreement.ranks)
        raise ConfigError([f"name: found {settings.name}: the federation's sites are {known}"], str(folder.settings))
    own = settings.data
    overrides = [f"data.path={json.dumps(own.path)}", f"data.format={own.format}", f"data.on_bad_row={own.on_bad_row}"]
    overrides += [f"data.columns={json.dumps(own.columns)}"] if own.columns else []
    for key in ("encoding", "delimiter", "split_column"):
        if (value := getattr(own, key)) is not None:
            overrides.append(f"data.{key}={json.dumps(value)}")
    overrides += [f"model.device={settings.device}", f"model.dtype={agreement.dtype}"]
    if settings.base_model is not None:
        overrides.append(f"model.base_model={json.dumps(settings.base_model)}")
    config = for_one_site(load_config(folder.study_config, overrides))
    return settings, agreement, keep_positions(config, [recipe_of(entry) for entry in config.methods])


def open_site(folder: SiteFolder) -> Site:
    """Read a site's data and load the base. Raises ModelError if the base is not the federation's."""
    settings, agreement, config = settings_of(folder)
    check_privacy(config)
    tokenizer, intake = take_in(config, silent, whole=settings.name)
    base = Materials(tokenizer, intake).load(config, config.model.dtype)
    if base.fingerprint != agreement.base_fingerprint:
        raise ModelError(
            f"base_model '{config.model.base_model}', {stored_as(base.model)}, is not the federation's base "
            f"'{agreement.base_model}' (sha256 {base.fingerprint[:12]}, agreed {agreement.base_fingerprint[:12]}): set "
            "base_model in site.yaml to a copy of that one; the same weights stored in other bits are another base"
        )
    shapes = [(name, int(inputs), int(outputs)) for name, inputs, outputs in base.shapes]
    if shapes != list(agreement.shapes):
        raise ModelError(
            f"the adapted modules here are {len(shapes)}, agreed are {len(agreement.shapes)}, or their sizes differ: "
            "another version of transformers names them differently; install the server's versions"
        )
    (client,) = held_back(config, intake.clients)
    threads = settings.threads or count_threads(base, None)
    embedding = (
        embed_prompts(base, [client])[0].tolist() if None in agreement.profiles and settings.share_profile else ()
    )
    return Site(settings, agreement, config, base, client, threads, embedding)
