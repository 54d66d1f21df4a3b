"""A study in Ray's actors (federation.engine: ray): how many there are, what they load, and when they end."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmira.config.sections import Config
from fedmira.engine.executor import Executor
from fedmira.engine.spread.cluster import check_installed, count_cores, opened
from fedmira.errors import ConfigError
from fedmira.model.base.load import Base

if TYPE_CHECKING:
    from fedmira.study.assemble import Prepared


def check_spread(config: Config) -> None:
    """Raise ConfigError if a study cannot be computed by actors."""
    if config.federation.engine == "local":
        return
    check_installed()
    if config.privacy is not None and config.federation.address is not None:
        raise ConfigError(
            [
                "federation.address with privacy: a pass that is carried out again on another node may come out with "
                "other last digits and the same noise, which nobody has paid for; leave address out, and Ray is "
                "started on this machine"
            ]
        )


def count_workers(config: Config, base: Base, threads: int) -> int | None:
    """Return how many actors a study has; None = this process computes."""
    section = config.federation
    if section.engine == "local":
        return None
    if section.address is not None and section.workers is None:
        with opened(section.address) as resources:
            gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    else:
        gpus, cores = torch.cuda.device_count(), count_cores()
    if section.workers is not None:
        return section.workers
    return gpus if gpus and config.model.device != "cpu" else max(1, cores // threads)


@contextmanager
def spread(prepared: "Prepared") -> Iterator[Executor]:
    """Yield an executor whose actors have the study's base and data; they end with the block.

    Raises ConfigError if no cluster answers or no actor starts, ModelError if an actor has another base.
    """
    from fedmira.engine.spread.crew import Crew, Post
    from fedmira.engine.spread.passes import Spread
    from fedmira.study.assemble import base_of

    config, base, workers = prepared.config, prepared.workplace.base, prepared.workers
    assert workers is not None, "a study that is not spread"
    with opened(config.federation.address, cpus=workers * prepared.threads) as resources:
        gpus = int(resources.get("GPU", 0)) if config.model.device != "cpu" else 0
        if gpus and gpus < workers and config.federation.address is None:
            raise ConfigError([f"federation.workers: {workers} actors have a GPU each, and this machine has {gpus}"])
        post = Post(workers, prepared.threads, gpus=min(1, gpus))
        load = partial(
            base_of, _elsewhere(config, device="cuda" if gpus else "cpu"), str(base.dtype).removeprefix("torch.")
        )
        crew = Crew(post, load, prepared.workplace.clients, fingerprint=base.fingerprint)
        try:
            crew.await_first()
            yield Spread(crew)
        finally:
            crew.close()


def _elsewhere(config: Config, *, device: str) -> Config:
    """Return what an actor loads its base from: a folder by its whole path, onto the GPU that it sees, or the CPU."""
    model = config.model
    place = str(Path(model.base_model).absolute()) if Path(model.base_model).is_dir() else model.base_model
    return config.model_copy(update={"model": model.model_copy(update={"base_model": place, "device": device})})
