"""The server of a federation: it gathers the sites, and carries out the study with them as a simulation would.

It has no data and no base: names, rows, numbers, and what each site says of itself when it joins.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedmira.adapters import scales
from fedmira.adapters.ranks import is_mixed
from fedmira.config.sections import Config
from fedmira.deploy.audit import Audit
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.joining import SiteCard
from fedmira.deploy.link import Link
from fedmira.deploy.members import Members
from fedmira.deploy.remote import Closing, Remote
from fedmira.deploy.settings import installed_versions
from fedmira.deploy.site_run import federation_of
from fedmira.disk.checkpoints import checkpoint_rounds
from fedmira.disk.files import read_json, write_json
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.disk.run_facts import RunFacts
from fedmira.engine.clients import Scores
from fedmira.engine.events import Event, Observer, RoundDone
from fedmira.engine.federation import Federation
from fedmira.engine.schedule import draw_schedule
from fedmira.errors import MethodError, Stopped
from fedmira.methods import Recipe, recipe_of
from fedmira.methods.base import Cohort
from fedmira.reports.render import write_report
from fedmira.study.assemble import Built, build, count_values
from fedmira.study.carry_out import Job, carry_out, describe_run, is_complete
from fedmira.study.events import ReportBegun, StepBegun, StudyBegun
from fedmira.study.loading import load_config
from fedmira.study.passes import PassShape
from fedmira.study.privacy import count_rounds

RAM_BYTES = 1 << 26  # of a run's rows; larger ones are in a file: frames under way, and NVFlare's, need the memory
Tell = Callable[[str], None]


class SiteJoined(Stopped):
    """A run ends after a round, to go on with one more site."""


class Server:
    """One federation's study. tell: shows a line to whoever started the server."""

    def __init__(self, folder: ServerFolder, link: Link, tell: Tell, observer: Observer) -> None:
        self.folder, self.observer = folder, observer
        self.members = Members(folder, link, tell)
        self.config: Config = load_config(folder.study_config, [f"output_dir={json.dumps(str(folder.study))}"])
        self.audit = Audit(folder.audit)

    def carry_out(self) -> StudyFolder:
        """Carry the study to its end, from where it is, with the members that have gathered; write its report."""
        study = StudyFolder(self.folder.study)
        if not study.path.is_dir():
            study.create(self.config)
        with study.held():
            while True:
                self._take_in()
                try:
                    self._runs(study)
                except SiteJoined:
                    continue
                break
            self.observer(ReportBegun())
            write_report(study.path)
        return study

    # ---------------------------------------------------------------- sites that join later

    def _take_in(self) -> bool:
        """Make members of the sites that have arrived; say whether there are new ones."""
        before = self.members.names
        for name in self.members.arrivals():
            if (reason := self._why_alone(name)) is not None:
                self.members.refuse(name, reason)
            else:
                self.members.admit(name)
        return self.members.names != before

    def _why_alone(self, name: str) -> str | None:
        """Say why a method cannot take in one more site, None if all can."""
        names = self.members.names
        old = torch.arange(len(names))
        for recipe in map(recipe_of, self.config.methods):
            seed = self.config.seeds[0]
            try:
                now, then = (self._build(recipe, self._cohort(seed, some)) for some in (names, (*names, name)))
            except MethodError as error:
                return str(error)
            one, other = now.methods[seed], then.methods[seed]
            same = torch.equal(one.row_of(old), other.row_of(old))
            if not one.has_row_of_each and not (same and one.count_rows(len(old)) == other.count_rows(len(old) + 1)):
                return (
                    f"method '{now.label}' has a row for each group, and the site's group is a new one; begin a new "
                    "study with it"
                )
        return None

    def _observe(self, event: Event) -> None:
        """Show an event. Raises SiteJoined once a round is durable and a site has arrived meanwhile."""
        self.observer(event)
        if isinstance(event, RoundDone) and self._take_in():
            raise SiteJoined("a site joins")

    # ---------------------------------------------------------------- the study

    def _runs(self, study: StudyFolder) -> None:
        config = self.config
        recipes = [recipe_of(entry) for entry in config.methods]
        due = [
            (recipe, seed)
            for seed in config.seeds
            for recipe in recipes
            if not is_complete(study.run(recipe.entry.folder, seed), config)
        ]
        self.observer(StudyBegun(study.path, len(due)))
        for recipe in recipes:  # refused before the first round of any
            check_possible(self._build(recipe, self._cohort(config.seeds[0], self.members.names)), config.seeds[0])
        for recipe, seed in due:
            self._run(study.run(recipe.entry.folder, seed), recipe, seed)

    def _run(self, folder: RunFolder, recipe: Recipe, seed: int) -> None:
        names = self.members.names
        since = self._since(folder)
        cohort = self._cohort(seed, names, since)
        built = self._build(recipe, cohort)
        lora = federation_of(self.members.agreement, self.config.lora, names=names)
        federation = replace(
            lora.under(built.methods[seed], self.members.agreement.width),
            run=f"{built.label}/seed-{seed}",
            since=torch.tensor(since),
        )
        settings = self.members.settings
        remote = Remote(
            self.members.listed,
            federation,
            built.methods[seed],
            Closing(settings.deadline, settings.quorum),
            self.folder.inbox,
            self.audit,
            cohort.examples,
            metrics=tuple(self.config.evaluation.metrics),
        )
        start = self._start_scores(remote)
        job = Job(
            folder=folder,
            config=self.config,
            built=built,
            cohort=cohort,
            federation=federation,
            facts=self._facts(built, cohort, federation),
            clients=partial(client_table, names, self.members.cards, federation),
            start=start,
            ram_bytes=RAM_BYTES,
        )
        carry_out(job, lambda: remote, lambda clients, ended: None, self._observe)

    def _build(self, recipe: Recipe, cohort: Cohort) -> Built:
        place = [entry.folder for entry in self.config.methods].index(recipe.entry.folder)
        assert cohort.ranks is not None
        built = build(recipe, place, {cohort.seed: cohort}, cohort.ranks, self.config.training_of(recipe.entry))
        check_budget(self.config, built, cohort)
        return built

    def _since(self, folder: RunFolder) -> list[int]:
        """Return the first round of every member in a run: 1, or that after the newest durable one when it joined."""
        names = self.members.names
        if not (folder.path / "run.json").is_file():
            return [1] * len(names)
        old, joined = folder.names.by_id, folder.facts.joined or {}
        next_round = max(checkpoint_rounds(folder.checkpoints), default=0) + 1
        return [joined.get(name, 1 if name in old else next_round) for name in names]

    def _cohort(self, seed: int, names: Sequence[str], since: Sequence[int] | None = None) -> Cohort:
        federation, cards = self.config.federation, self.members.cards
        lora = federation_of(self.members.agreement, self.config.lora, names=tuple(names))
        return Cohort(
            ids=tuple(names),
            examples=tuple(int(cards[name].examples["train"]) for name in names),
            columns=tuple(cards[name].columns for name in names),
            schedule=draw_schedule(
                len(names),
                rounds=federation.rounds,
                participation=federation.participation,
                seed=seed,
                since=since,
            ),
            seed=seed,
            profile=partial(profile_of, [cards[name] for name in names]),
            ranks=lora.ranks,
            scale=scales(lora.ranks, lora.alpha),
            validation=tuple(int(cards[name].examples.get("validation", 0)) for name in names),
        )

    def _start_scores(self, remote: Remote) -> Scores:
        """Return the scores of the untouched base; each site is asked until it has answered once."""
        names, path = self.members.names, self.folder.cards / "start.json"
        stored: dict[str, Any] = read_json(path) if path.is_file() else {}
        if missing := [k for k, name in enumerate(names) if name not in stored]:
            self.observer(StepBegun("scoring the untouched base"))
            for k, found in remote.start(missing).items():
                test = {metric: values[0] for metric, values in found.test.items()}
                stored[names[k]] = {"validation": found.validation[0], "test": test}
            write_json(path, stored)
        absent = {"validation": None, "test": dict.fromkeys(self.config.evaluation.metrics)}
        every = [stored.get(name, absent) for name in names]
        return Scores(
            [one["validation"] for one in every],
            {metric: [one["test"].get(metric) for one in every] for metric in self.config.evaluation.metrics},
        )

    def _facts(self, built: Built, cohort: Cohort, federation: Federation) -> RunFacts:
        agreement = self.members.agreement
        return describe_run(
            self.config,
            built,
            cohort,
            federation,
            template=agreement.template,
            architecture=agreement.architecture,
            dtype=agreement.dtype,
            device="sites",
            shape=PassShape(1),
            threads=torch.get_num_threads(),
            versions=installed_versions(),
        )


def is_over(folder: ServerFolder) -> bool:
    """Is the federation's study complete, with its report? Then sites are only to be told."""
    study = StudyFolder(folder.study)
    if not (study.path / "report.html").is_file():
        return False
    config = load_config(folder.study_config)
    return all(is_complete(study.run(entry.folder, seed), config) for entry in config.methods for seed in config.seeds)


def profile_of(cards: Sequence[SiteCard], column: str | None) -> np.ndarray:
    """Return what a kNN graph is made of, as sites said it: embeddings [K, d], or shares of a column's values."""
    if column is None:
        return np.array([card.embedding for card in cards])
    return count_values([card.counts for card in cards], column)


def check_possible(built: Built, seed: int) -> None:
    """Raise MethodError for a method that sites with private data cannot carry out."""
    if built.methods[seed].regime.trainees == "pool":
        raise MethodError(
            f"method '{built.label}' trains on all clients' data together, and a federation's data stay where they "
            "are; remove it from study.yaml, and compare with it in a simulation"
        )


def check_budget(config: Config, built: Built, cohort: Cohort) -> None:
    """Raise MethodError unless every site can pay for all rounds: each keeps its account, and would drop out."""
    if config.privacy is None:
        return
    examples = dict(zip(cohort.ids, cohort.examples, strict=True))
    method = built.methods[cohort.seed]
    rounds = count_rounds(config, built.label, method, built.training, examples, cohort.schedule)
    if rounds is not None and rounds < len(cohort.schedule):
        raise MethodError(
            f"{built.label}: privacy.epsilon = {config.privacy.epsilon:g} pays for {rounds} of "
            f"{len(cohort.schedule)} rounds with the sites' numbers of examples: make the federation anew with "
            f"federation.rounds={rounds}, more noise or a larger budget"
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
