"""Sites as the engine's Clients: every order is a frame to a site, every answer is checked before anything reads it.

What a site remembers is with the site. It counts a round once the server says so: each order has the last round in
which that site's upload was admitted and made durable (`counted`), so that server and site can be killed at any moment.
"""

import hashlib
import json
import logging
import math
import mmap
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmira.adapters import mixing
from fedmira.deploy.answers import count, figure, number, optional, read_answer, read_header, why_not_upload, word
from fedmira.deploy.audit import Audit
from fedmira.deploy.channel import Data
from fedmira.deploy.link import Failure, Link
from fedmira.deploy.wire import MAX_HEADER, Frame, decode, pack_message, unpack_message
from fedmira.disk.checkpoints import Tensors
from fedmira.disk.files import make_folder, write_pieces
from fedmira.disk.table import in_file, stacked
from fedmira.engine.clients import Asked, Reply, Scores, Send, Tuned, everybody, nobody
from fedmira.engine.federation import Federation
from fedmira.engine.gate import SCHEMA
from fedmira.engine.idle import Idle
from fedmira.errors import Stopped, WireError
from fedmira.methods.base import Clock, Message, Method

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 30.0  # seconds before a round is repeated; doubled each time
IN_FILE_BYTES = 1 << 20  # of a frame, from which on it is in a file while it is sent
COUNTED = "sites"  # the file of a checkpoint that holds which round of each site was counted last


@dataclass(frozen=True)
class Closing:
    """When a round closes. deadline: seconds; quorum: share of those asked; repeats: with too few answers, in a row."""

    deadline: float
    quorum: float
    repeats: int = 100


@dataclass(frozen=True, eq=False)
class Counted:
    """The sites `ids` whose round counts once it is durable."""

    remote: "Remote"
    after: Tensor  # [K]

    bytes_of_all: int = 0
    bytes_of_round: int = 0

    def files(self, *, full: bool) -> Mapping[str, Tensors]:
        return {COUNTED: {"counted": self.after}}

    def apply(self) -> None:
        self.remote.counted = self.after
        self.remote.clear_inbox()
        mixing.forget()  # sites are waited for until the next merge


@dataclass(eq=False)
class Remote:
    """The clients of one run, each at a site of the same name. inbox: a folder for frames of the round under way."""

    link: Link
    federation: Federation
    method: Method
    closing: Closing
    inbox: Path
    audit: Audit
    examples: Sequence[int]  # of each site, as it said when it joined: the weight of its upload
    metrics: Sequence[str] = ("loss",)
    round: int = 0  # of the last training
    counted: Tensor = field(init=False)  # [K] last round of each site that counts
    has: dict[int, str] = field(default_factory=dict)  # site -> digest of the message that it has

    def __post_init__(self) -> None:
        self.counted = torch.zeros(len(self.federation), dtype=torch.int64)
        make_folder(self.inbox)

    def ask(self, sampled: Tensor) -> Asked:
        return nobody(sampled) if self.method.regime.trainees == "nobody" else everybody(sampled)

    # ---------------------------------------------------------------- a round

    def train(self, ids: Tensor, send: Send) -> Reply:
        """Ask until the deadline; with fewer answers than the quorum, ask those that are missing again."""
        clock, every = send.clock, ids.tolist()
        self.round = clock.round
        like = _form_of(Idle(self.federation, self.method).train(ids[:1], send).message) if every else None
        silent: dict[int, str] = {}
        found = {k: stored for k in every if (stored := self._stored(k, send)) is not None}
        for attempt in range(self.closing.repeats):
            silent = {}
            for k, answer in self._order("train", [k for k in every if k not in found], partial(_one, send), clock):
                if isinstance(answer, Failure):
                    silent[k] = answer.kind
                    continue
                try:
                    found[k] = self._admit(k, answer, like)
                except WireError as error:
                    silent[k] = error.reason
                del answer
            if len(found) >= self.closing.quorum * len(ids):
                break
            log.warning(
                "round %d: %d of %d sites answered, the quorum is %g: it is repeated (%d)",
                clock.round, len(found), len(ids), self.closing.quorum, attempt + 1,
            )  # fmt: skip
            time.sleep(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))  # a site may fail at once, each time
        else:
            raise Stopped(
                f"round {clock.round}: fewer than {self.closing.quorum:.0%} of the sites answered "
                f"{self.closing.repeats} times in a row; finished rounds are saved"
            )
        return self._reply([k for k in every if k in found], found, silent, like)

    def _admit(self, k: int, answer: Frame, like: Message | None) -> Frame:
        """Return a site's upload, durable. Raises WireError if it is none."""
        assert like is not None
        name = self.federation.names[k]
        if (reason := why_not_upload(answer, name, like=like, examples=self.examples[k])) is not None:
            raise WireError(reason, f"what site '{name}' answered is not its upload")
        return self._store(k, answer)

    def _reply(
        self, answered: Sequence[int], found: Mapping[int, Frame], silent: Mapping[int, str], like: Message | None
    ) -> Reply:
        frames = [found[k] for k in answered]
        messages = [unpack_message(frame.header["parts"], frame.rows) for frame in frames]
        some = like if not messages else messages[0]
        assert some is not None or not answered
        empty = Message(torch.empty(0, 0)) if some is None else some.take(slice(0, 0))
        message = empty if not messages else Message(
            stacked([one.rows for one in messages], self.inbox),
            {name: torch.cat([one.scalars[name] for one in messages]) for name in messages[0].scalars},
            {name: stacked([one.more[name] for one in messages], self.inbox) for name in messages[0].more},
        )  # fmt: skip
        said = [frame.header["metrics"] for frame in frames]
        return Reply(
            ids=torch.tensor(answered, dtype=torch.int64),
            message=message,
            headers=tuple(read_header(frame.header) for frame in frames),
            losses=torch.tensor([number(one, "train_loss", math.nan) for one in said], dtype=torch.float64),
            steps=torch.tensor([count(frame.header, "steps") for frame in frames], dtype=torch.int64),
            validation=[optional(one, "validation_loss") for one in said],
            tokens=sum(count(frame.header, "tokens") for frame in frames),
            scored=sum(count(frame.header, "scored") for frame in frames),
            silent=dict(silent),
        )

    def keep(self, ids: Tensor) -> Counted:
        after = self.counted.clone()
        after[ids] = self.round
        return Counted(self, after)

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        if COUNTED in files:
            stored = files[COUNTED]["counted"]  # of fewer sites, where some have joined since
            self.counted[: len(stored)] = stored

    # ---------------------------------------------------------------- measuring, and the end

    def losses(self, ids: Tensor, send: Send) -> list[float | None]:
        answers = self._ask_each("losses", ids.tolist(), send)
        return self._column(ids.tolist(), answers, "validation_loss")

    def test(self, ids: Sequence[int], send: Send, progress: Callable[[int], None]) -> Scores:
        answers = self._ask_each("test", ids, send, progress)
        return Scores([None] * len(ids), self._tests(ids, answers))

    def start(self, ids: Sequence[int]) -> dict[int, Scores]:
        """Return the scores of the untouched base of the sites `ids`, of those that answer."""
        answers = {k: one for k, one in self._order("start", ids, _no_message, Clock(0)) if isinstance(one, Frame)}
        return {k: Scores(self._column([k], answers, "validation_loss"), self._tests([k], answers)) for k in answers}

    def _tests(self, ids: Sequence[int], answers: Mapping[int, Frame]) -> dict[str, list[float | None]]:
        return {metric: self._column(ids, answers, f"test_{metric}") for metric in self.metrics}

    @staticmethod
    def _column(ids: Sequence[int], answers: Mapping[int, Frame], name: str) -> list[float | None]:
        """Return one figure of each site; None where it was not shared, or there is no answer."""
        return [None if k not in answers else optional(answers[k].header["metrics"], name) for k in ids]

    def tune(self, send: Send, progress: Callable[[int], None]) -> Tuned:
        answers = self._ask_each("tune", range(len(self.federation)), send, progress)
        refused = {k: word(frame.header["refused"]) for k, frame in answers.items() if frame.header.get("refused")}
        names = self.method.facts.figures
        figures = {k: {name: figure(frame.header, name) for name in names} for k, frame in answers.items()}
        return Tuned(sum(count(frame.header, "tokens") for frame in answers.values()), refused, figures)

    def set_aside(self, ids: Tensor, send: Send) -> None:
        self._ask_each("set_aside", ids.tolist(), send)

    def stops(self, sampled: Tensor) -> str | None:
        return None  # the server has counted that budgets last to the end; each site keeps its own account

    def take_up(self) -> None:
        for _ in self._order("take_up", range(len(self.federation)), _no_message, Clock(self.round + 1)):
            pass

    def _ask_each(
        self, what: str, ids: Sequence[int], send: Send, progress: Callable[[int], None] = lambda done: None
    ) -> dict[int, Frame]:
        """Send each site what it would be sent now, with an order; return the answers of those that gave one."""
        found: dict[int, Frame] = {}
        for k, answer in self._order(what, ids, partial(_one, send), send.clock):
            if isinstance(answer, Frame):
                found[k] = answer
            progress(len(found))
        return found

    # ---------------------------------------------------------------- orders

    def _order(
        self, what: str, ids: Sequence[int], message_of: Callable[[int], Message | None], clock: Clock
    ) -> Iterator[tuple[int, Frame | Failure]]:
        """Give each site an order and yield (site, its checked answer or why there is none)."""
        pending = list(ids)
        for _ in range(3):  # a site that lost what it had asks for it again
            if not pending:
                return
            orders = _Orders(self, what, {self.federation.names[k]: k for k in pending}, message_of, clock)
            pending = []
            for name, data in self.link.call(orders, self.closing.deadline):
                k = orders.places[name]
                answer = data if isinstance(data, Failure) else read_answer(data, orders.nonces[name])
                del data  # what of it is needed the answer has
                if isinstance(answer, Failure):
                    log.warning("site '%s' gave no answer to '%s': %s", name, what, answer.kind)
                elif answer.header["answer"] == "need":
                    self.has.pop(k, None)
                    pending.append(k)
                    continue
                elif digest := orders.digests.get(name):
                    self.has[k] = digest
                yield k, answer
                del answer

    def frame(self, what: str, k: int, message: Message | None, clock: Clock, nonce: str) -> tuple[Frame, str]:
        """Return an order, and the digest of its message: sent or, where the site has it, named."""
        header: dict[str, Any] = {
            "schema": SCHEMA,
            "order": what,
            "run_id": self.federation.run,
            "round": clock.round,
            "client": self.federation.names[k],
            "nonce": nonce,
            "base_hash": self.federation.base,
            "layout_hash": self.federation.layout_hash,
            "method": self.method.name,
            "learning_rate": float(clock.learning_rate),
            "counted": int(self.counted[k]),
        }
        if message is None:
            return Frame(header), ""
        parts, rows = pack_message(message)
        digest = digest_of(parts, rows)
        if self.has.get(k) == digest:
            return Frame({**header, "same": digest}), digest
        return Frame({**header, "same": digest, "parts": parts}, rows), digest

    # ---------------------------------------------------------------- the inbox

    def _file(self, k: int) -> Path:
        return self.inbox / f"{self.federation.names[k]}.frame"

    def _store(self, k: int, answer: Frame) -> Frame:
        """Make an answer durable, with what it answers: after a crash it is not asked for again. Return it from there.

        Its numbers are then pages of a file, which the system can take back. Raises WireError if the header would not
        be read again: written here, it can be longer than it came.
        """
        asked = [self.federation.run, self.round, self.has[k]]
        kept = replace(answer, header={**answer.header, "asked": asked}).pieces()
        if len(kept[1]) > MAX_HEADER:
            raise WireError("size", f"a header of {len(kept[1])} bytes: at most {MAX_HEADER}")
        write_pieces(self._file(k), kept, sum(map(len, kept)))
        return _mapped(self._file(k))

    def _stored(self, k: int, send: Send) -> Frame | None:
        path = self._file(k)
        if not path.is_file():
            return None
        try:
            frame = _mapped(path)
        except WireError:
            return None
        asked = [self.federation.run, self.round, digest_of(*pack_message(_one(send, k)))]
        return frame if frame.header.get("asked") == asked else None

    def clear_inbox(self) -> None:
        """Forget the answers of a round that counts."""
        for path in self.inbox.glob("*.frame"):
            path.unlink()


@dataclass(eq=False)
class _Orders(Mapping[str, Data]):
    """The frames of an order by site, each made when it is looked up, and noted in the audit the first time.

    So that one of them is in memory at a time, beside what they are made of. places: site -> position; digests: of the
    messages of those that were looked up.
    """

    remote: Remote
    what: str
    places: Mapping[str, int]
    message_of: Callable[[int], Message | None]
    clock: Clock
    nonces: Mapping[str, str] = field(init=False)
    digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nonces = {name: secrets.token_hex(8) for name in self.places}

    def __getitem__(self, name: str) -> Data:
        k, remote = self.places[name], self.remote
        frame, digest = remote.frame(self.what, k, self.message_of(k), self.clock, self.nonces[name])
        pieces = frame.pieces()
        large = sum(map(len, pieces)) >= IN_FILE_BYTES
        data = in_file(pieces, remote.inbox) if large else b"".join(pieces)
        if name not in self.digests:
            remote.audit.note(to=name, what=self.what, run=remote.federation.run, number=self.clock.round, data=data)
            self.digests[name] = digest
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _one(send: Send, k: int) -> Message:
    """Return what one site is sent."""
    return send(torch.tensor([k]))


def _no_message(k: int) -> None:
    """The message of an order that has none."""


def _form_of(message: Message) -> Message:
    """Return a message of the same form that holds no memory."""
    return message.map(lambda rows: rows.new_zeros(()).expand(rows.shape))


def _mapped(path: Path) -> Frame:
    """Read a frame whose numbers stay in their file. Raises WireError if it is none."""
    if not path.stat().st_size:
        raise WireError("schema", "an empty file")
    with path.open("rb") as file:
        return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def digest_of(parts: Mapping[str, Any], rows: Tensor) -> str:
    """Return the sha256 of a packed message."""
    found = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    found.update(rows.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
