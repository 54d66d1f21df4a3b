"""One run at a site: the client's half of a method, and what it remembers, durable by round."""

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedmira.adapters import lora_layout
from fedmira.adapters.added import fold
from fedmira.config.lora import LoraConfig
from fedmira.config.sections import MethodEntry
from fedmira.deploy.settings import Agreement
from fedmira.deploy.site import Site
from fedmira.deploy.wire import Frame, pack_message
from fedmira.disk.checkpoints import Tensors, load_checkpoint, save_checkpoint
from fedmira.disk.files import make_folder
from fedmira.engine.clients import Kept
from fedmira.engine.federation import Federation
from fedmira.engine.simulated import Simulated
from fedmira.engine.workplace import Workplace
from fedmira.errors import MethodError, WireError
from fedmira.evaluation.gated import at_mean
from fedmira.export.card import Card
from fedmira.export.peft_folder import depth_of, export_adapter
from fedmira.methods import recipe_of
from fedmira.methods.base import Clock, Message, Method, remember_nothing
from fedmira.study.adapting import alpha_of, start_of
from fedmira.study.assemble import evaluation_of, fingerprint, targets_of
from fedmira.study.client_privacy import of_adapters, upload_account
from fedmira.study.clients import clients_of
from fedmira.study.passes import plan_passes
from fedmira.study.privacy import account

log = logging.getLogger(__name__)
ME = torch.zeros(1, dtype=torch.int64)


@dataclass(frozen=True)
class Fixed:
    """One message that the server sent, as what it would send."""

    message: Message
    clock: Clock

    def __call__(self, ids: Tensor) -> Message:
        return self.message


def federation_of(agreement: Agreement, section: LoraConfig, *, names: tuple[str, ...]) -> Federation:
    """Return a federation of some sites, with LoRA's rows. section: of the study."""
    ranks = torch.tensor([agreement.ranks[name] for name in names])
    largest = torch.tensor(list(agreement.ranks.values())).amax(dim=0).tolist()
    return Federation(
        names=names,
        layout=lora_layout(list(agreement.shapes), largest),
        ranks=ranks,
        alpha=alpha_of(section, [name for name, _, _ in agreement.shapes]),
        start_of=start_of(section),
        base=agreement.base_fingerprint,
    )


@dataclass(eq=False)
class SiteRun:
    """One method with one seed at a site: the client's half, and what it remembers, durable by round.

    at: the round whose memory is in RAM. staged: what the round after it would have the site remember. told: whether
    the adapter of `at` is written.
    """

    site: Site
    method: Method
    federation: Federation
    label: str
    seed: int
    state: Path
    adapters: Path
    clients: Simulated = field(init=False)
    at: int = 0
    staged_round: int = 0
    staged: Kept | None = None
    digest: str = ""  # of the order that led to `staged`
    answer: Frame | None = None
    received: tuple[str, Message] | None = None  # digest and message that came last
    notes: dict[str, float] = field(default_factory=dict)  # of the round of `staged`, for the site alone

    def __post_init__(self) -> None:
        make_folder(self.state)
        self._begin()

    @property
    def entry(self) -> MethodEntry:
        """The method's entry in the study."""
        return next(entry for entry in self.site.config.methods if entry.folder == self.label)

    def _begin(self) -> None:
        """Start from nothing."""
        config, site = self.site.config, self.site
        section = config.training_of(self.entry)
        workplace = Workplace(site.base, (site.client,), 1, evaluation_of(config), site.settings.share_metrics)
        (plan,) = plan_passes(workplace, [(self.federation.layout, section)], 1)
        workplace = replace(workplace, recompute=plan.recompute, at_once=plan.examples)
        clients = clients_of(
            config,
            self.method,
            recipe_of(self.entry).wrappers,
            section,
            workplace,
            self.federation,
            self.state,
            seed=self.seed,
            threads=site.threads,
            data=lambda: [fingerprint(site.client)],
        )
        assert isinstance(clients, Simulated)
        self.clients = clients
        self.at, self.staged_round, self.staged, self.digest, self.answer = 0, 0, None, "", None

    def settle(self, counted: int) -> None:
        """Bring the memory to the round that the server counts. Raises WireError if it is not on this disk."""
        if self.staged is not None and self.staged_round == counted:
            self.staged.apply()
            self.at = counted
            return
        if self.at == counted:
            return
        checkpoint = load_checkpoint(self.state, counted)
        self._begin()
        if checkpoint is not None:
            self.clients.restore(checkpoint.files)
        elif counted and self.keeps_something:
            raise WireError("round", f"the server counts round {counted}, which is not in '{self.state}'")
        self.at = counted

    @property
    def keeps_something(self) -> bool:
        """Does the site remember anything of a round that it cannot do without?"""
        method, layout, clock = self.method, self.federation.layout, Clock(1)
        return (
            self.clients.training.keep_optimizer
            or method.client.start is not remember_nothing
            or not bool(method.travels(layout, clock).all())
        )

    def recall(self, number: int, digest: str) -> Frame | None:
        """Return the answer to an order that came before, from RAM or disk."""
        if self.answer is not None and (self.staged_round, self.digest) == (number, digest):
            return self.answer
        checkpoint = load_checkpoint(self.state, number)
        if checkpoint is None or checkpoint.facts.get("digest") != digest:
            return None
        return Frame(checkpoint.facts["header"], checkpoint.files.get("answer", {}).get("rows"))

    def train(self, message: Message, clock: Clock, digest: str) -> Frame:
        """Carry out a round, make it durable, and return its answer. One that is beyond the budget is not."""
        self.notes = {}
        try:
            reply = self.clients.train(ME, Fixed(message, clock))
        except MethodError as error:
            if self.clients.stops(ME) is None:
                raise
            log.error("round %d: %s", clock.round, error)
            return Frame({"answer": "failed", "kind": "budget"})
        self.notes = dict(reply.notes)
        if (paid := account(self.site.config, self.method, [self.site.client], self.state)) is not None:
            self.notes["epsilon_of_examples"] = paid["epsilon"]
        trained = bool(len(reply.ids)) and not bool(reply.losses[0].isnan())  # not: with privacy
        metrics = {"train_loss": float(reply.losses[0]) if trained else None}
        if len(reply.ids) and reply.validation[0] is not None:
            metrics["validation_loss"] = reply.validation[0]
        if len(reply.ids):
            own = reply.headers[0]
            parts, rows = pack_message(reply.message)
            header = {
                "run_id": own.run_id,
                "round": own.round,
                "client": own.client,
                "base_hash": own.base_hash,
                "layout_hash": own.layout_hash,
                "method": own.method,
                "weight": own.weight,
                "schema": own.schema,
                "steps": int(reply.steps[0]),
                "tokens": reply.tokens,
                "scored": reply.scored,
                "metrics": metrics,
                "parts": parts,
                "answer": "done",
            }
            answer = Frame(header, rows)
        else:
            answer = Frame({"answer": "failed", "kind": next(iter(reply.silent.values()))})
        kept = self.clients.keep(reply.ids)
        files: dict[str, Tensors] = dict(kept.files(full=True))
        if answer.rows is not None:
            files["answer"] = {"rows": answer.rows}
        save_checkpoint(
            self.state, clock.round, files, full=True, facts={"digest": digest, "header": dict(answer.header)}
        )
        _prune(self.state, keep={self.at, clock.round})
        self.staged_round, self.staged, self.digest, self.answer = clock.round, kept, digest, answer
        return answer

    def set_aside(self, message: Message, clock: Clock) -> None:
        """Set the adapter aside, durably."""
        self.clients.set_aside(ME, Fixed(message, clock))
        kept = self.clients.keep(ME[:0])
        if self.at:
            save_checkpoint(self.state, self.at, dict(kept.files(full=True)), full=True, facts={})

    def _card(self) -> Card:
        """Return what the adapter's card says of the run, and of privacy so far."""
        config, client, wrappers = self.site.config, self.site.client, recipe_of(self.entry).wrappers
        card: Card = {"client": client.id, "method": self.method.name, "seed": self.seed, "rounds": self.at}
        if (of_examples := account(config, self.method, [client], self.state)) is not None:
            card["privacy"] = of_examples
        if (of_client := of_adapters(upload_account(config, self.method, wrappers, self.state))) is not None:
            card["client_privacy"] = of_client
        return card

    def write_adapter(self, message: Message, clock: Clock) -> None:
        """Write the adapter that the site uses now as a PEFT folder."""
        adapters, gate = self.clients.adapters(ME, Fixed(message, clock)), self.method.client.gate
        site = self.site
        if gate is not None:
            adapters = at_mean(site.base, gate, adapters, [site.client])
        prompts = self.federation.layout.virtual_tokens > 0
        export_adapter(
            self.adapters,
            fold(adapters),
            base_model=site.config.model.base_model,
            revision=site.config.model.revision,
            target_modules=targets_of(site.base),
            fan_in_fan_out=site.base.transposed,
            depth=depth_of(site.base.model.config) if prompts else None,
            card=self._card(),
        )


def _prune(folder: Path, *, keep: set[int]) -> None:
    for path in folder.glob("round-*"):
        if int(path.name.removeprefix("round-")) not in keep:
            shutil.rmtree(path)
