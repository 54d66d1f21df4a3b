"""What a site can find out before it takes part: whether its settings and data are right, and what the model gets."""

from typing import Any

from fedmira.deploy.folders import SiteFolder
from fedmira.deploy.settings import installed_versions
from fedmira.deploy.site import settings_of
from fedmira.engine.events import silent
from fedmira.errors import DataError
from fedmira.study.dry_run import Shown, show_examples
from fedmira.study.intake import take_in


def check_site(folder: SiteFolder) -> dict[str, Any]:
    """Read settings and data, load no base and send nothing; return what the site would take part with.

    Raises ConfigError, DataError or ModelError that says what to mend.
    """
    settings, agreement, config = settings_of(folder)
    _, intake = take_in(config, silent, whole=settings.name)
    (client,) = intake.clients
    missing = [column for column in agreement.columns if column not in client.columns]
    if missing:
        raise DataError(
            f"data.path '{settings.data.path}': a method of the study asks for a column '{missing[0]}' with one value "
            "in all rows, and there is none; add it to the data"
        )
    return {
        "site": settings.name,
        "format": intake.format,
        "template": intake.template.name,
        "examples": f"{len(client.train)} training, {len(client.validation)} validation, {len(client.test)} test",
        "fedmira": f"{installed_versions()['fedmira']}; when the federation was made {agreement.fedmira}",
        "trained tokens": client.trained_tokens,
        "prompts cut": client.truncation.prompts_cut,
        "answers cut": client.truncation.answers_cut,
        "told to the server": {name: client.columns[name] for name in agreement.columns} or "no column",
        "metrics leave the site": "yes" if settings.share_metrics else "no",
    }


def example_of(folder: SiteFolder) -> list[Shown]:
    """Return one training example as the model gets it."""
    settings, _, config = settings_of(folder)
    return list(show_examples(config, whole=settings.name))
