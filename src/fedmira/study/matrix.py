"""Every client's adapter on every client's test split: who could use whose adapter.

    M_kl = test loss of client l, in nats per labelled token, with the adapter of client k

A row of M is one adapter, a column one test split; the diagonal is what a study reports. Off it, M_kl < M_ll says that
client l would do better with the adapter of client k than with its own.
"""

import torch

from fedmira.adapters import Adapters
from fedmira.disk.files import write_atomic
from fedmira.disk.folders import MATRIX, RunFolder, StudyFolder
from fedmira.engine.events import Observer
from fedmira.engine.scoring import view_of
from fedmira.engine.workplace import Workplace
from fedmira.errors import ConfigError
from fedmira.evaluation.measure import measure_loss
from fedmira.export.adapter_config import check_adapter
from fedmira.export.panels import read_panels
from fedmira.study.assemble import Prepared
from fedmira.study.carry_out import is_complete
from fedmira.study.events import StepBegun
from fedmira.study.threads import using_threads

MOST_CLIENTS = 100


def check_matrix(clients: int) -> None:
    """Raise ConfigError if the federation is too large for a matrix."""
    if clients > MOST_CLIENTS:
        raise ConfigError(
            [
                f"a matrix of {clients} clients is {clients**2} tests; at most {MOST_CLIENTS} clients are crossed: "
                f"take fewer (data.clients.first={MOST_CLIENTS}), or leave --matrix out"
            ],
            "compare",
        )


def write_matrices(study: StudyFolder, prepared: Prepared, observer: Observer) -> None:
    """Write matrix.csv of every complete run with a personal adapter for each client, where it is not written yet.

    Methods whose clients share an adapter have none: all rows would be the same. Raises StoreError if an adapter is
    damaged.
    """
    with study.held(), using_threads(prepared.threads):
        for seed in prepared.config.seeds:
            for label, built in prepared.built.items():
                run = study.run(label, seed)
                if view_of(built.methods[seed]) == "personal" and is_complete(run, prepared.config):
                    if (run.path / MATRIX).is_file():
                        continue
                    observer(StepBegun(f"crossing the adapters of {label}, seed {seed}"))
                    _write_matrix(run, prepared.workplace)


def _write_matrix(run: RunFolder, workplace: Workplace) -> None:
    """Score each adapter of a run on all test splits, and write a line for each pair."""
    clients = workplace.clients
    ids = [client.id for client in clients]
    everyone = range(len(ids))
    lines = ["adapter,client,loss"]
    for panel in read_panels(workplace.base, [check_adapter(run.adapters / name) for name in ids]):
        for place, k in enumerate(panel.places):
            one = panel.adapters.take(torch.tensor([place]))

            def serve(asked: torch.Tensor, one: Adapters = one) -> Adapters:
                return one.take(torch.zeros_like(asked))

            found = measure_loss(workplace.base, serve, clients, everyone, split="test", cohort=workplace.cohort)
            lines += [
                f"{ids[k]},{name},{'' if loss is None else repr(loss)}" for name, loss in zip(ids, found, strict=True)
            ]
    write_atomic(run.path / MATRIX, ("\n".join(lines) + "\n").encode())
