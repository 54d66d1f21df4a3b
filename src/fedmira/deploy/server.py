"""The server of a federation: it gathers the sites, and carries out the study with them as a simulation would.

It has no data and no base: names, rows, numbers, and what each site says of itself when it joins.
"""

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from fedmira.adapters import scales
from fedmira.adapters.ranks import is_mixed
from fedmira.config.sections import Config
from fedmira.deploy.audit import Audit
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.joining import SiteCard, read_card, why_not
from fedmira.deploy.link import Failure, Link
from fedmira.deploy.remote import Closing, Remote
from fedmira.deploy.settings import Agreement, FederationSettings, installed_versions, read_agreement, read_federation
from fedmira.deploy.site_run import federation_of
from fedmira.deploy.wire import Frame, decode
from fedmira.disk.files import make_folder, read_json, write_json
from fedmira.disk.folders import StudyFolder
from fedmira.disk.run_facts import RunFacts
from fedmira.engine.clients import Scores
from fedmira.engine.events import Observer
from fedmira.engine.federation import Federation
from fedmira.engine.schedule import draw_schedule
from fedmira.errors import MethodError, WireError
from fedmira.methods import recipe_of
from fedmira.methods.base import Cohort
from fedmira.reports.render import write_report
from fedmira.study.assemble import Built, build
from fedmira.study.carry_out import Job, carry_out, describe_run, is_complete
from fedmira.study.events import ReportBegun, StepBegun, StudyBegun
from fedmira.study.loading import load_config

log = logging.getLogger(__name__)

HELLO_SECONDS = 60.0
Tell = Callable[[str], None]


class Server:
    """One federation's study. tell: shows a line to whoever started the server."""

    def __init__(self, folder: ServerFolder, link: Link, tell: Tell, observer: Observer) -> None:
        self.folder, self.link, self.tell, self.observer = folder, link, tell, observer
        self.settings: FederationSettings = read_federation(folder.settings)
        self.agreement: Agreement = read_agreement(folder.agreement)
        self.config: Config = load_config(folder.study_config, [f"output_dir={json.dumps(str(folder.study))}"])
        self.audit = Audit(folder.audit)
        self.closing = Closing(self.settings.deadline, self.settings.quorum)
        self.names = tuple(self.settings.sites)

    # ---------------------------------------------------------------- joining

    def gather(self) -> dict[str, SiteCard]:
        """Wait until every site has joined once, now or in an earlier run of the server; return their cards."""
        make_folder(self.folder.cards)
        cards = {name: card for name in self.names if (card := self._stored_card(name)) is not None}
        asked: dict[str, float] = {}
        shown: set[str] | None = None
        while True:
            there = frozenset(self.link.sites) & frozenset(self.names)
            due = [name for name in sorted(there) if time.monotonic() - asked.get(name, -math.inf) >= HELLO_SECONDS]
            for name, card in self._greet(due):
                asked[name] = time.monotonic()
                if card is not None:
                    cards[name] = card
                    write_json(self.folder.cards / f"{name}.json", asdict(card))
                    self.tell(f"site {name} has joined: {card.examples['train']} training examples")
            missing = set(self.names) - set(cards)
            if not missing and there:
                return cards
            if missing != shown:
                self.tell(f"waiting for {', '.join(sorted(missing)) or 'a site to connect'}")
                shown = missing
            time.sleep(0.5)

    def _stored_card(self, name: str) -> SiteCard | None:
        path = self.folder.cards / f"{name}.json"
        if not path.is_file():
            return None
        card = read_card(read_json(path))
        return card if why_not(card, name, self.agreement) is None else None

    def _greet(self, names: Sequence[str]) -> list[tuple[str, SiteCard | None]]:
        """Ask sites for their cards; tell those that cannot take part why."""
        found: list[tuple[str, SiteCard | None]] = []
        refused: dict[str, bytes] = {}
        for name, answer in self.link.call({name: self._order("hello") for name in names}, HELLO_SECONDS):
            card, reason = None, None
            if isinstance(answer, Failure):
                reason = f"no answer ({answer.kind})"
            else:
                try:
                    card = read_card(decode(answer).header.get("card"))
                    reason = why_not(card, name, self.agreement)
                except WireError as error:
                    reason = str(error)
            if reason is not None:
                self.tell(f"site {name} cannot take part: {reason}")
                log.warning("site '%s' cannot take part: %s", name, reason)
                refused[name] = self._order("refused", reason=reason)
            found.append((name, None if reason is not None else card))
        for _ in self.link.call(refused, HELLO_SECONDS):
            pass
        return found

    @staticmethod
    def _order(what: str, **more: Any) -> bytes:
        header = {"order": what, "run_id": "", "round": 0, "learning_rate": 0.0, "counted": 0, **more}
        return Frame({**header, "nonce": secrets.token_hex(8)}).encode()

    # ---------------------------------------------------------------- the study

    def carry_out(self, cards: Mapping[str, SiteCard]) -> StudyFolder:
        """Carry the study to its end, from where it is, and write its report."""
        study = StudyFolder(self.folder.study)
        if not study.path.is_dir():
            study.create(self.config)
        with study.held():
            self._runs(study, cards)
        return study

    def _runs(self, study: StudyFolder, cards: Mapping[str, SiteCard]) -> None:
        config, lora = self.config, federation_of(self.agreement, self.config.lora.lora_alpha, names=self.names)
        cohorts = {seed: self._cohort(seed, lora, cards) for seed in config.seeds}
        recipes = [recipe_of(entry) for entry in config.methods]
        built = [
            build(recipe, place, cohorts, lora.ranks, config.training_of(recipe.entry))
            for place, recipe in enumerate(recipes)
        ]
        for one in built:
            check_possible(one, config.seeds[0])
        due = [
            (one, seed) for seed in config.seeds for one in built if not is_complete(study.run(one.label, seed), config)
        ]
        self.observer(StudyBegun(study.path, len(due)))
        start: Scores | None = None
        for one, seed in due:
            federation = replace(lora.under(one.methods[seed], self.agreement.width), run=f"{one.label}/seed-{seed}")
            remote = self._remote(federation, one, seed)
            if start is None:
                self.observer(StepBegun("scoring the untouched base"))
                start = self._start_scores(remote)
            self._run(study, one, seed, cohorts[seed], federation, remote, start, cards)
        self.observer(ReportBegun())
        write_report(study.path)

    def _remote(self, federation: Federation, built: Built, seed: int) -> Remote:
        return Remote(
            self.link,
            federation,
            built.methods[seed],
            self.closing,
            self.folder.inbox,
            self.audit,
            metrics=tuple(self.config.evaluation.metrics),
        )

    def _cohort(self, seed: int, lora: Federation, cards: Mapping[str, SiteCard]) -> Cohort:
        federation = self.config.federation
        return Cohort(
            ids=self.names,
            examples=tuple(int(cards[name].examples["train"]) for name in self.names),
            columns=tuple(cards[name].columns for name in self.names),
            schedule=draw_schedule(
                len(self.names), rounds=federation.rounds, participation=federation.participation, seed=seed
            ),
            seed=seed,
            ranks=lora.ranks,
            scale=scales(lora.ranks, lora.alpha),
        )

    def _start_scores(self, remote: Remote) -> Scores:
        """Return the scores of the untouched base, asked for once."""
        path = self.folder.cards / "start.json"
        if path.is_file():
            stored = read_json(path)
            if stored["sites"] == list(self.names):
                return Scores(stored["validation"], stored["test"])
        scores = remote.start(lambda done: None)
        stored = {"sites": list(self.names), "validation": list(scores.validation), "test": dict(scores.test)}
        write_json(path, stored)
        return scores

    def _run(
        self,
        study: StudyFolder,
        built: Built,
        seed: int,
        cohort: Cohort,
        federation: Federation,
        remote: Remote,
        start: Scores,
        cards: Mapping[str, SiteCard],
    ) -> None:
        folder = study.run(built.label, seed)
        job = Job(
            folder=folder,
            config=self.config,
            built=built,
            cohort=cohort,
            federation=federation,
            facts=self._facts(built, cohort, federation),
            clients=partial(client_table, self.names, cards, federation),
            start=start,
        )
        carry_out(job, lambda: remote, lambda clients, ended: None, self.observer)

    def _facts(self, built: Built, cohort: Cohort, federation: Federation) -> RunFacts:
        agreement = self.agreement
        return describe_run(
            self.config,
            built,
            cohort,
            federation,
            template=agreement.template,
            architecture=agreement.architecture,
            dtype=agreement.dtype,
            device="sites",
            width=1,
            threads=torch.get_num_threads(),
            versions=installed_versions(),
        )

    def goodbye(self) -> None:
        """Tell the sites that the study is complete."""
        frames = {name: self._order("end") for name in self.link.sites & set(self.names)}
        for _ in self.link.call(frames, HELLO_SECONDS):
            pass


def check_possible(built: Built, seed: int) -> None:
    """Raise MethodError for a method that sites with private data cannot carry out."""
    if built.methods[seed].regime.trainees == "pool":
        raise MethodError(
            f"method '{built.label}' trains on all clients' data together, and a federation's data stay where they "
            "are; remove it from study.yaml, and compare with it in a simulation"
        )


def client_table(
    names: Sequence[str], cards: Mapping[str, SiteCard], federation: Federation
) -> dict[str, dict[str, Any]]:
    """Return clients.json, from what the sites say of themselves."""
    mixed = is_mixed(federation.ranks)
    return {
        name: {
            "folder": name,
            "name": name,
            "group": next(iter(cards[name].columns.values()), None),
            "rank": int(ranks.max()),
            **({"ranks": ranks.tolist()} if mixed and ranks.ndim else {}),
            "examples": dict(cards[name].examples),
            "trained_tokens": cards[name].trained_tokens,
        }
        for name, ranks in zip(names, federation.ranks, strict=True)
    }
