"""A site's resident worker: it keeps the base and the data in memory, and carries out one order at a time.

It is the process of `fedmira federation site`; the engine's processes come and go beside it. What an order leads to is
durable before it is answered, and an order that comes twice is answered twice with the same numbers. Of an exception
only its type is answered.
"""

import json
import logging
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedmira.deploy import channel
from fedmira.deploy.attendance import mark_end
from fedmira.deploy.audit import Audit
from fedmira.deploy.channel import Data
from fedmira.deploy.folders import SiteFolder
from fedmira.deploy.joining import card_of
from fedmira.deploy.remote import digest_of
from fedmira.deploy.site import Site
from fedmira.deploy.site_run import ME, Fixed, SiteRun, federation_of
from fedmira.deploy.wire import Frame, decode, unpack_message
from fedmira.disk.files import append_lines, make_folder
from fedmira.engine.clients import Scores
from fedmira.engine.scoring import score_start
from fedmira.errors import WireError
from fedmira.methods import recipe_of
from fedmira.methods.base import Clock, Cohort, Message
from fedmira.study.privacy import forget_key

log = logging.getLogger(__name__)

Tell = Callable[[str], None]


class Worker:
    """Answers orders that come through a Unix socket, one after another. tell: shows a line to who started the site.

    Threads only pass orders on. Whoever calls `work` computes: a thread in the middle of torch's code would abort a
    process that ends.
    """

    def __init__(self, folder: SiteFolder, site: Site, tell: Tell = lambda line: None) -> None:
        self.folder, self.site, self.tell = folder, site, tell
        self.audit = Audit(folder.audit)
        self.runs: dict[str, SiteRun] = {}
        self.refused = ""  # why the server does not take this site
        self.ended = False  # the study is complete
        self._orders: queue.Queue[tuple[list[Data], queue.Queue[bytes]]] = queue.Queue()

    def listen(self, listener: socket.socket) -> None:
        """Take orders until the socket is closed."""
        while True:
            try:
                connection = channel.accept(listener)
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def _pass_on(self, connection: socket.socket) -> None:
        answer: queue.Queue[bytes] = queue.Queue()
        with connection:
            try:
                self._orders.put(([channel.receive(connection)[1]], answer))
                channel.send(connection, {}, answer.get())
            except (OSError, EOFError, ValueError):
                log.warning("the engine went away in the middle of an order")

    def work(self, seconds: float) -> bool:
        """Carry out the next order; False if there is none in so many seconds."""
        try:
            frames, answer = self._orders.get(timeout=seconds)
        except queue.Empty:
            return False
        answer.put(self.handle(frames.pop()))
        return True

    def handle(self, data: Data) -> bytes:
        """Carry out an order; return the answer, which is noted in the audit before it leaves."""
        header: Mapping[str, Any] = {}
        try:
            order = decode(data)
            header = order.header
            torch.set_num_threads(self.site.threads)
            answer = self._carry_out(order)
        except WireError as error:
            log.error("an order of the server is refused: %s", error)
            answer = Frame({"answer": "failed", "kind": error.reason})
        except Exception as error:
            log.exception("an order failed; only the type of the error is answered")
            answer = Frame({"answer": "failed", "kind": type(error).__name__})
        nonce = header.get("nonce", "")
        sent = self._without_metrics(replace(answer, header={**answer.header, "nonce": nonce})).encode()
        what, run, number = (str(header.get("order", "")), str(header.get("run_id", "")), header.get("round", 0))
        self.audit.note(to="server", what=what, run=run, number=number, data=sent)
        return sent

    def _without_metrics(self, answer: Frame) -> Frame:
        if self.site.settings.share_metrics or "metrics" not in answer.header:
            return answer
        return replace(answer, header={**answer.header, "metrics": {}})

    def _carry_out(self, order: Frame) -> Frame:
        header = order.header
        try:
            what, run_id, counted = str(header["order"]), str(header["run_id"]), int(header["counted"])
            clock = Clock(int(header["round"]), learning_rate=float(header["learning_rate"]))
            digest = str(header.get("same", ""))
        except (KeyError, TypeError, ValueError):
            raise WireError("schema", "an order without its keys") from None
        if what == "hello":
            return Frame({"answer": "done", "card": card_of(self.site)})
        if what == "refused":
            self.refused = str(header.get("reason", ""))
            log.error("the server does not take this site: %s", self.refused)
            return Frame({"answer": "done"})
        if what == "end":
            mark_end(self.folder)
            for state in self.folder.state.glob("*/seed-*"):
                forget_key(state)
            self.ended = True
            return Frame({"answer": "done"})
        self.refused = ""
        run = self._run(run_id)
        self._check(header, run)
        run.settle(counted)
        if what == "start":
            return self._start(run)
        if what == "take_up":
            run.clients.take_up()
            return Frame({"answer": "done"})
        message = self._message(order, run, digest)
        if message is None:
            return Frame({"answer": "need"})
        if what == "train":
            return self._train(run, message, clock, digest)
        orders: dict[str, Callable[[SiteRun, Message, Clock], Frame]] = {
            "losses": self._losses,
            "test": self._test,
            "tune": self._tune,
            "set_aside": self._set_aside,
        }
        if what not in orders:
            raise WireError("schema", f"there is no order '{what}'")
        return orders[what](run, message, clock)

    def _run(self, run_id: str) -> SiteRun:
        """Return a run of the study, begun or resumed at the first order of it."""
        if run_id in self.runs:
            return self.runs[run_id]
        label, _, number = run_id.rpartition("/seed-")
        config = self.site.config
        entry = next((entry for entry in config.methods if entry.folder == label), None)
        if entry is None or not number.isdecimal() or int(number) not in config.seeds:
            raise WireError("schema", "the server asks for a run that is not in study.yaml")
        seed, client = int(number), self.site.client
        method = recipe_of(entry).build(Cohort((client.id,), (len(client.train),), (client.columns,), (), seed))
        federation = federation_of(self.site.agreement, config.lora, names=(self.site.settings.name,))
        federation = replace(federation.under(method, self.site.agreement.width), run=run_id)
        place = Path(label) / f"seed-{seed}"
        run = SiteRun(
            self.site, method, federation, label, seed, self.folder.state / place, self.folder.adapters / place
        )
        self.runs = {run_id: run}  # one at a time is in memory
        return run

    def _check(self, header: Mapping[str, Any], run: SiteRun) -> None:
        """Raise WireError unless the order is about this federation's base and rows, and for this site."""
        federation = run.federation
        expected = (federation.base, federation.layout_hash, run.method.name, self.site.settings.name)
        found = tuple(header.get(name) for name in ("base_hash", "layout_hash", "method", "client"))
        if found != expected:
            raise WireError("schema", "the order names another base, layout, method or site than agreed")

    def _message(self, order: Frame, run: SiteRun, digest: str) -> Message | None:
        """Return the order's message: as it came, or the one that came before and is the same."""
        if order.rows is None:
            if run.received is None or run.received[0] != digest:
                return None
            return run.received[1]
        if digest_of(order.header["parts"], order.rows) != digest:
            raise WireError("schema", "the order's numbers are not those that its header tells of")
        message = unpack_message(order.header["parts"], order.rows)
        run.received = (digest, message)
        return message

    def _start(self, run: SiteRun) -> Frame:
        workplace = run.clients.workplace
        lora = federation_of(self.site.agreement, self.site.config.lora, names=(self.site.settings.name,))
        scores = score_start(workplace, lora, lambda done: None)
        metrics = _metrics(scores, scores.validation[0])
        self._note(run, 0, "start", metrics)
        return Frame({"answer": "done", "metrics": metrics})

    def _train(self, run: SiteRun, message: Message, clock: Clock, digest: str) -> Frame:
        told = f"{digest}/{clock.round}/{clock.learning_rate!r}/{run.at}"
        answer = run.recall(clock.round, told)
        if answer is None:
            answer = run.train(message, clock, told)
            self._note(run, clock.round, "train", {**answer.header.get("metrics", {}), **run.notes})
        return answer

    def _losses(self, run: SiteRun, message: Message, clock: Clock) -> Frame:
        (loss,) = run.clients.losses(ME, Fixed(message, clock))
        run.write_adapter(message, clock)
        metrics = {} if loss is None else {"validation_loss": loss}
        self._note(run, clock.round - 1, "losses", metrics)
        return Frame({"answer": "done", "metrics": metrics})

    def _test(self, run: SiteRun, message: Message, clock: Clock) -> Frame:
        scores = run.clients.test([0], Fixed(message, clock), lambda done: None)
        run.write_adapter(message, clock)
        metrics = _metrics(scores, None)
        self._note(run, clock.round - 1, "test", metrics)
        return Frame({"answer": "done", "metrics": metrics})

    def _tune(self, run: SiteRun, message: Message, clock: Clock) -> Frame:
        tuned = run.clients.tune(Fixed(message, clock), lambda done: None)
        facts = {"tokens": tuned.tokens, "refused": tuned.refused.get(0, ""), "figures": dict(tuned.figures.get(0, {}))}
        return Frame({"answer": "done", **facts})

    def _set_aside(self, run: SiteRun, message: Message, clock: Clock) -> Frame:
        run.set_aside(message, clock)
        return Frame({"answer": "done"})

    def _note(self, run: SiteRun, number: int, what: str, metrics: Mapping[str, Any]) -> None:
        """Write the site's own figures, which it has whether it shares them or not."""
        make_folder(run.adapters)
        line = {"round": number, "what": what, **metrics}
        append_lines(run.adapters / "metrics.jsonl", [json.dumps(line)])
        if what == "train":
            figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items() if value)
            self.tell(f"{run.label}, seed {run.seed}: round {number}: {figures or 'nothing to train on'}")


def _metrics(scores: Scores, validation: float | None) -> dict[str, float]:
    found = {f"test_{metric}": values[0] for metric, values in scores.test.items()}
    return {name: value for name, value in {**found, "validation_loss": validation}.items() if value is not None}
