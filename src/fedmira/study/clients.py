"""The clients of one run, simulated or at a site, with the accounts of their privacy in a folder of the run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedmira.config.sections import Config, TrainingConfig
from fedmira.engine.federation import Federation
from fedmira.engine.simulated import Simulated
from fedmira.engine.trainees import Pool, make_clients
from fedmira.engine.workplace import Workplace
from fedmira.methods.base import Method
from fedmira.study.client_privacy import Wrappers, key_of_noise, uploads_of
from fedmira.study.privacy import budget_of
from fedmira.study.training import training_of


def clients_of(
    config: Config,
    method: Method,
    wrappers: Wrappers,
    section: TrainingConfig,
    workplace: Workplace,
    federation: Federation,
    folder: Path,
    *,
    seed: int,
    threads: int,
    data: Callable[[], Sequence[str]],
    scratch: Path | None = None,
) -> Simulated | Pool:
    """Return the clients of a run of a method.

    wrappers, section: of the method's entry; folder: of the accounts; data, threads: as of budget_of; scratch: for
    what is too large for RAM.
    """
    return make_clients(
        workplace,
        federation,
        method,
        training_of(config, seed, section),
        scratch=scratch,
        budget=budget_of(config, method, section, workplace, folder, threads=threads, data=data),
        key=key_of_noise(wrappers, folder),
        uploads=uploads_of(config, method, wrappers, folder),
    )
