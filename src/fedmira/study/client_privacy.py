"""What noise on uploads promises each client as a whole, where it promises anything; docs/privacy.md has the words.

The promise is about uploads, and about all that a server makes of them. It needs no trust in the server: each client
shortens its update and adds the noise by itself, so that nothing hangs on who else takes part, or on weights.
"""

import importlib.metadata
import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmira.config.sections import Config
from fedmira.methods.base import Method, use_what_was_sent
from fedmira.privacy.accountant import ACCOUNTANT, gaussian_epsilon
from fedmira.privacy.budget import key_of
from fedmira.privacy.uploads import ADJACENCY, LONGER, SAMPLING, Uploads

Wrappers = Sequence[tuple[str, Mapping[str, Any]]]
EVERYTHING = "every upload, and all adapters that are made of uploads"
UPLOADS_ALONE = "every upload; not the adapters that clients keep, or train, by themselves"


@dataclass(frozen=True)
class Promise:
    """What is promised each client. clip: longest update; sigma: deviation of the noise on each number of an upload."""

    clip: float
    sigma: float
    delta: float
    covers: str

    @property
    def noise_multiplier(self) -> float:
        """In units of the longest difference of two possible updates."""
        return self.sigma / (2 * self.clip * LONGER)

    def epsilon(self, uploads: int) -> float:
        """Return an upper bound of epsilon of a client that sends so many uploads."""
        return gaussian_epsilon(self.noise_multiplier, uploads, self.delta)


def promise_of(config: Config, method: Method, wrappers: Wrappers) -> Promise | str | None:
    """Return what is promised, or why nothing is; None where no noise is added."""
    noises = [settings for name, settings in wrappers if name == "noised"]
    if not noises:
        return None
    if why := next(_unfit(config, method, wrappers), None):
        return why
    names = [name for name, _ in wrappers]
    limits = [settings["norm"] for name, settings in wrappers[: names.index("noised")] if name == "clipped"]
    client = method.client
    alone = client.use is not use_what_was_sent or client.gate is not None
    alone |= method.regime.tune is not None or method.keeps_columns
    covers = UPLOADS_ALONE if alone else EVERYTHING
    return Promise(min(limits), noises[0]["sigma"], noises[0]["delta"], covers)


def _unfit(config: Config, method: Method, wrappers: Wrappers) -> Iterator[str]:
    """Say why noise on uploads promises nothing."""
    names = [name for name, _ in wrappers]
    noise = wrappers[names.index("noised")][1]
    regime, graph = method.regime, method.facts.graph
    if regime.trainees != "sampled" or method.sends_nothing:
        yield "no client sends an upload"
    if names.count("noised") > 1:
        yield "noise is added twice; add it once"
    if "clipped" not in names[: names.index("noised")]:
        yield "an update of any length can be told from its noise; put clip before noise"
    if not noise["sigma"]:
        yield "sigma is 0"
    if not noise["secret"]:
        yield "the noise comes from the run's seed, and whoever knows that can take it off; leave out secret: false"
    if method.facts.uploads != "row":
        yield "clients of this method send more than a row with noise (scalars, further rows, or a row of their own)"
    if regime.tolerance is not None:
        yield "a client accepts or refuses a reply by its validation loss, and the server sees which"
    if graph is not None and graph.kind == "knn":
        yield "the graph is made of the clients' data without noise"
    if config.evaluation.keep == "best":
        yield "evaluation.keep: best chooses adapters by losses without noise"
    if config.federation.early_stopping is not None:
        yield "federation.early_stopping ends a run by losses without noise"
    if importlib.util.find_spec("dp_accounting") is None:
        yield "its accountant is not installed; pip install 'fedmira[dp]'"


def told(config: Config, method: Method, wrappers: Wrappers, schedule: Sequence[np.ndarray]) -> str | None:
    """Say what noise promises after all rounds of a schedule; None where no noise is added."""
    promise = promise_of(config, method, wrappers)
    if promise is None:
        return None
    if isinstance(promise, str):
        return f"noise on uploads promises clients no privacy: {promise}"
    uploads = most_uploads(schedule)
    return (
        f"epsilon of a client is at most {rounded_up(promise.epsilon(uploads))} at delta = {promise.delta:g} after "
        f"{len(schedule)} rounds, of which a client takes part in {uploads} at most; covered: {promise.covers}"
    )


def upload_notes(
    config: Config,
    label: str,
    methods: Mapping[int, Method],
    wrappers: Wrappers,
    schedules: Mapping[int, Sequence[np.ndarray]],
) -> list[str]:
    """Return what is to be said of all seeds' runs of a method, each sentence once."""
    notes = []
    for seed, method in methods.items():
        if said := told(config, method, wrappers, schedules[seed]):
            notes.append(f"{label}: {said}")
        promise, clients = promise_of(config, method, wrappers), int(max(map(np.max, schedules[seed]))) + 1
        if isinstance(promise, Promise) and promise.delta * clients >= 1:
            notes.append(
                f"{label}: delta = {promise.delta:g} of noise is not below 1 / {clients}, one over the clients: it "
                "would allow to publish all that one of them has"
            )
    return list(dict.fromkeys(notes))


def most_uploads(schedule: Sequence[np.ndarray]) -> int:
    """Return in how many rounds the client takes part that takes part most often."""
    return max(Counter(int(k) for ids in schedule for k in ids).values(), default=0)


def rounded_up(epsilon: float) -> str:
    """Write an epsilon with three digits, none of which makes it smaller."""
    if not epsilon:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    return f"{math.ceil(epsilon / unit) * unit:.3g}"


def key_of_noise(wrappers: Wrappers, folder: Path) -> bytes | None:
    """Return the key of a run's noise; None where none is secret."""
    return key_of(folder) if any(name == "noised" and given["secret"] for name, given in wrappers) else None


def uploads_of(config: Config, method: Method, wrappers: Wrappers, folder: Path) -> Uploads | None:
    """Return the account of one run, which is in its folder; None where nothing is promised."""
    promise = promise_of(config, method, wrappers)
    if not isinstance(promise, Promise):
        return None
    return Uploads(folder, promise.noise_multiplier, promise.delta)


def upload_account(config: Config, method: Method, wrappers: Wrappers, folder: Path) -> Mapping[str, Any] | None:
    """Return what run.json says of the clients' privacy in a run that has ended; None where no noise is added."""
    promise = promise_of(config, method, wrappers)
    if promise is None:
        return None
    if isinstance(promise, str):
        return {"none": promise}
    account = uploads_of(config, method, wrappers, folder)
    assert account is not None
    return {
        "epsilon": account.epsilon(),
        "delta": promise.delta,
        "clip": promise.clip,
        "sigma": promise.sigma,
        "noise_multiplier": promise.noise_multiplier,
        "uploads": account.most,
        "adjacency": ADJACENCY,
        "sampling": SAMPLING,
        "accountant": f"{ACCOUNTANT}, dp-accounting {importlib.metadata.version('dp-accounting')}",
        "covers": promise.covers,
    }


def of_adapters(account: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return an account that upload_account gives if its promise covers adapters, else None."""
    return account if account is not None and account.get("covers") == EVERYTHING else None
