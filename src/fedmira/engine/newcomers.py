"""Clients that join a run after some of its rounds: where they start, and their first figures.

A client is known from its first round on (`Federation.since`). What it starts from follows from the server's state
before that round, so that it need not be stored: a resumed run computes the same row again.
"""

from fedmira.disk.folders import RunFolder
from fedmira.engine.clients import Clients, Scores
from fedmira.engine.ledger import Ledger
from fedmira.engine.round import Sender, mask_change
from fedmira.engine.scoring import results_of, validate, view_of
from fedmira.methods.base import Change, Method


def take_in(ledger: Ledger, method: Method) -> None:
    """Give the clients whose first round is the next one the rows that the method lets them start from."""
    federation = ledger.federation
    ids = federation.joining(ledger.round + 1)
    if federation.since is None or not len(ids) or method.regime.first_rows is None:
        return
    known = (federation.since <= ledger.round).nonzero().flatten()
    rows = method.regime.first_rows(ledger.state, ids, known)
    ledger.apply(mask_change(method, ledger, Change(ids, rows)))


def measure_newcomers(
    clients: Clients, ledger: Ledger, method: Method, send: Sender, folder: RunFolder, start: Scores
) -> None:
    """Write how the untouched base does on clients that join now, and note their losses with what they start from."""
    ids = ledger.federation.joining(ledger.round + 1)
    if not len(ids):
        return
    new = {ledger.federation.names[k] for k in ids.tolist()} - folder.scored_at_start
    rows = results_of(ledger.federation.names, 0, view_of(method), start)
    folder.append(None, [row for row in rows if row.client in new])
    validate(clients, method, ledger, send, ids, due=False)
