"""Everything that can be checked and settled before a study writes anything: methods, base, ranks, cohort, threads.

A pipe: recipes -> intake -> base -> ranks -> cohorts of clients -> methods -> width of a pass -> Prepared.
"""

import hashlib
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from fedmira import bundled
from fedmira.adapters import Alpha, Layout, lora_layout, scales
from fedmira.adapters.ranks import by_ending, client_ranks
from fedmira.config.sections import Config, TrainingConfig
from fedmira.data.batches import ClientData
from fedmira.data.partition import client_key
from fedmira.disk.run_facts import RunFacts
from fedmira.engine.cost import CohortPlan
from fedmira.engine.events import Observer
from fedmira.engine.federation import Federation, Given
from fedmira.engine.schedule import draw_schedule
from fedmira.engine.workplace import Evaluation, Workplace
from fedmira.errors import MethodError, ModelError, StoreError, nearest
from fedmira.evaluation.embed import embed_prompts
from fedmira.export.asking import Asking, find_asking
from fedmira.export.peft_folder import check_targets, short_targets
from fedmira.methods import Recipe, recipe_of
from fedmira.methods.base import Cohort, Method
from fedmira.model.base.load import Base, choose_device, load_base
from fedmira.model.base.trial import check_embeddings
from fedmira.model.quantised import check_installed
from fedmira.study.adapting import alpha_of, quantisation_of, ranks_by_module, start_of, wanted_of
from fedmira.study.events import StudyPrepared
from fedmira.study.intake import Intake, check_examples, take_in
from fedmira.study.notes import apart_notes, lonely_notes, rank_notes
from fedmira.study.passes import shape_of_passes
from fedmira.study.privacy import check_privacy, check_profile, held_back, study_notes
from fedmira.study.spreading import check_spread, count_workers
from fedmira.study.starts import read_start
from fedmira.study.threads import count_threads
from fedmira.study.training import check_least_rate, check_optimizer, check_validation


@dataclass(frozen=True, eq=False)
class Built:
    """One entry of `methods:`: its checked settings, its method for each seed, and warnings of the build.

    training: of its clients, the study's with what the entry changes.
    """

    recipe: Recipe
    methods: Mapping[int, Method]
    notes: Sequence[str]
    training: TrainingConfig

    @property
    def label(self) -> str:
        return self.recipe.entry.folder


def base_of(config: Config, dtype: str, *, tokenizer: Any = None) -> Base:
    """Load the base that a config names. tokenizer: the base's, if it is read already. Raises ModelError."""
    return load_base(
        bundled.resolve(config.model.base_model),
        revision=config.model.revision,
        dtype=dtype,
        device=config.model.device,
        targets=wanted_of(config.lora),
        tokenizer=tokenizer,
        quantisation=quantisation_of(config.model),
    )


@dataclass(eq=False)
class Materials:
    """What several studies of the same data and base share: the encoded data, and the base once it is loaded."""

    tokenizer: Any
    intake: Intake
    base: Base | None = None
    profiles: dict[str | None, np.ndarray] = field(default_factory=dict)

    def load(self, config: Config, dtype: str) -> Base:
        """Return the base, loaded at the first call. Raises ModelError if it cannot read an id of the examples."""
        if self.base is None:
            base = base_of(config, dtype, tokenizer=self.tokenizer)
            check_examples(
                self.intake, self.tokenizer, vocabulary=base.vocabulary, name=config.model.base_model
            )  # the weights may have fewer embeddings than the config says
            self.base = base
        return self.base


@dataclass(frozen=True, eq=False)
class Prepared:
    """A study that passed every check: what its runs share, and each run's method."""

    config: Config
    federation: Federation  # with LoRA's rows
    workplace: Workplace
    materials: Materials
    cohorts: Mapping[int, Cohort]  # seed -> what a method may know of the federation
    built: Mapping[str, Built]  # label -> method
    targets: Sequence[str]  # the adapted modules, as exported adapters name them
    asking: Asking  # how exported adapters are asked
    threads: int
    workers: int | None = None  # actors of Ray that compute the passes; None = this process does
    plans: Sequence[CohortPlan] = ()  # of the kinds of training pass, where they were measured

    @property
    def intake(self) -> Intake:
        return self.materials.intake

    @property
    def sampled(self) -> int:
        """Clients of one round."""
        return len(next(iter(self.cohorts.values())).schedule[0])

    def under(self, method: Method) -> Federation:
        """The federation with the rows that a method carries."""
        return self.federation.under(method, self.workplace.base.width)

    def passes(self) -> list[tuple[Layout, TrainingConfig]]:
        """Every kind of training pass in the study: layouts of rows, each with the trainings it is used with."""
        trained = (
            (self.under(method).layout, built.training)
            for built in self.built.values()
            for method in built.methods.values()
        )
        return list(dict.fromkeys(trained))

    def kinds(self) -> dict[Layout, Federation]:
        """Every layout of rows that a method of the study carries."""
        methods = (method for built in self.built.values() for method in built.methods.values())
        return {federation.layout: federation for federation in map(self.under, methods)}


def prepare(
    config: Config, observer: Observer, saved: RunFacts | None = None, *, materials: Materials | None = None
) -> Prepared:
    """Read data, check the methods, load the base and settle the cohort; nothing is written.

    saved: run.json of an earlier run of the study, whose dtype, threads and cohort are used again. materials: of an
    earlier study with the same data, model and target modules, which then are neither read nor loaded.
    """
    choose_device(config.model.device)  # refused now if it is not there, and not after minutes of reading
    check_privacy(config)
    check_spread(config)
    if quantisation_of(config.model) is not None:
        check_installed()
    recipes = [recipe_of(entry) for entry in config.methods]
    config = keep_positions(config, recipes)
    if materials is None:
        materials = Materials(*take_in(config, observer))
    dtype = config.model.dtype if saved is None else saved.dtype
    clients = held_back(config, materials.intake.clients)
    check_validation(config, clients)

    def modules() -> list[str]:
        return [name for name, _, _ in materials.load(config, dtype).shapes]

    ranks = client_ranks(
        config.lora.ranks,
        usual=config.lora.r,
        ids=[client.id for client in clients],
        names=materials.intake.names,
        columns=[client.columns for client in clients],
        keys=[client_key(client.id) for client in clients],
        seed=config.data.seed,
        modules=modules,
        by_module=(lambda: ranks_by_module(config.lora, modules())) if config.lora.rank_pattern else None,
    )
    alpha = alpha_of(config.lora, modules() if config.lora.alpha_pattern else ())
    profiles = Profiles(config, dtype, materials)
    cohorts = {seed: make_cohort(config, seed, ranks, alpha, profiles) for seed in config.seeds}
    built = {
        recipe.entry.folder: build(recipe, place, cohorts, ranks, config.training_of(recipe.entry))
        for place, recipe in enumerate(recipes)
    }
    for label, one in built.items():
        more = study_notes(config, label, one.methods, one.training, clients, cohorts, one.recipe.wrappers)
        built[label] = replace(one, notes=[*one.notes, *more])
    base = materials.load(config, dtype)
    threads = count_threads(base, saved, spread_over=config.federation.workers)
    workers = count_workers(config, base, threads)
    check_base(config, base, saved)
    federation = Federation(
        names=tuple(client.id for client in clients),
        layout=lora_layout(base.shapes, ranks.amax(dim=0).tolist()),  # of each module the largest
        ranks=ranks,
        alpha=alpha,
        start_of=start_of(config.lora),
        base=base.fingerprint,
        called=materials.intake.names,
    )
    given = read_start(config.lora, federation, base, clients)
    check_start(config, given, saved)
    federation = replace(federation, given=given)
    sampled = len(next(iter(cohorts.values())).schedule[0])
    workplace = Workplace(base, tuple(clients), sampled, evaluation_of(config))
    targets = targets_of(base)
    asking = find_asking(materials.intake.template, materials.tokenizer)
    prepared = Prepared(config, federation, workplace, materials, cohorts, built, targets, asking, threads, workers)
    kinds = prepared.kinds()
    check_virtual_tokens(config, prepared, kinds)
    if not all(layout.virtual_tokens for layout in kinds):
        check_targets(base.model, [name for name, _, _ in base.shapes], targets)
    shape = shape_of_passes(config, workplace, prepared.passes(), sampled, saved, workers=workers)
    prepared = replace(prepared, workplace=shape.laid_on(workplace), plans=shape.plans)
    observer(StudyPrepared(prepared))
    return prepared


def keep_positions(config: Config, recipes: Sequence[Recipe]) -> Config:
    """Keep as many positions free as any method's virtual tokens take: all methods are to get the same texts.

    A run's own config has them too, so that a method alone cuts its prompts where it did beside the others.
    """
    ahead = max(config.data.positions_ahead, *(recipe.settings.tokens_ahead for recipe in recipes))
    return config.model_copy(update={"data": config.data.model_copy(update={"positions_ahead": ahead})})


@dataclass(frozen=True, eq=False)
class Profiles:
    """Profiles of the clients' data, computed when a method's build needs them, once for all methods and seeds."""

    config: Config
    dtype: str
    materials: Materials

    def __call__(self, column: str | None) -> np.ndarray:
        """Return mean embeddings of prompts [K, d] (None), or shares of a column's values [K, values]."""
        check_profile(self.config)
        profiles, clients = self.materials.profiles, self.materials.intake.clients
        if column not in profiles:
            with warnings.catch_warnings():  # libraries' warnings do not belong to the method's notes
                warnings.simplefilter("ignore")
                profiles[column] = (
                    embed_prompts(self.materials.load(self.config, self.dtype), clients)
                    if column is None
                    else count_values([client.counts for client in clients], column)
                )
        return profiles[column]


def make_cohort(config: Config, seed: int, ranks: Tensor, alpha: Alpha, profile: Profiles) -> Cohort:
    """Return what a method may know of the federation before it starts."""
    clients = profile.materials.intake.clients
    return Cohort(
        ids=tuple(client.id for client in clients),
        examples=tuple(len(client.train) for client in clients),
        columns=tuple(client.columns for client in clients),
        schedule=draw_schedule(
            len(clients),
            rounds=config.federation.rounds,
            participation=config.federation.participation,
            seed=seed,
        ),
        seed=seed,
        profile=profile,
        ranks=ranks,
        scale=scales(ranks, alpha),
        names=profile.materials.intake.names,
        validation=tuple(len(client.validation) for client in clients),
    )


def build(recipe: Recipe, place: int, cohorts: Mapping[int, Cohort], ranks: Tensor, training: TrainingConfig) -> Built:
    """Build one entry's method for each seed; its warnings become notes. Raises MethodError naming the entry."""
    methods: dict[int, Method] = {}
    label, notes = recipe.entry.folder, []
    for seed, cohort in cohorts.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                methods[seed] = recipe.build(cohort)
            except MethodError as error:
                raise MethodError(f"methods.{place} ({label}): {error}") from error
        notes = [str(warning.message) for warning in caught] + rank_notes(label, methods[seed], ranks)
        notes += lonely_notes(label, methods[seed].facts.graph, cohort) + apart_notes(label, methods[seed], cohort)
        check_least_rate(methods[seed], training, f"methods.{place} ({label})")
        check_optimizer(methods[seed], training, f"methods.{place} ({label})")
    return Built(recipe, methods, notes, training)


def check_base(config: Config, base: Base, saved: RunFacts | None) -> None:
    """Raise ModelError if a study goes on with another base than it began with."""
    if saved is not None and saved.base_fingerprint != base.fingerprint:
        raise ModelError(
            f"model.base_model '{config.model.base_model}' is not the base this study began with (sha256 "
            f"{base.fingerprint[:12]}, began with {saved.base_fingerprint[:12]}); put the old one back"
        )


def check_start(config: Config, given: Given | None, saved: RunFacts | None) -> None:
    """Raise StoreError if a study goes on with other adapters to begin with than it began with."""
    if saved is not None and saved.start_sha256 != (None if given is None else given.fingerprint):
        raise StoreError(f"lora.start {config.lora.start!r}: the adapters there have changed since this study began")


def check_virtual_tokens(config: Config, prepared: Prepared, kinds: Mapping[Layout, Federation]) -> None:
    """Raise MethodError for virtual tokens that settings do not announce, ModelError if the base cannot take any."""
    for label, built in prepared.built.items():
        method = built.methods[config.seeds[0]]
        found, said = prepared.under(method).layout.virtual_tokens, built.recipe.settings.tokens_ahead
        if said != found:
            raise MethodError(
                f"method '{label}' lays out {found} virtual tokens, and its settings say {said}: let "
                "Config.tokens_ahead return what the layout has, for they take positions of the base"
            )
    if any(layout.virtual_tokens for layout in kinds):
        base = prepared.workplace.base
        check_embeddings(
            base.decoder,
            base.model.get_input_embeddings(),
            vocabulary=base.vocabulary,
            name=config.model.base_model,
        )


def evaluation_of(config: Config) -> Evaluation:
    """Return what a config measures, as plain values."""
    section = config.evaluation
    return Evaluation(
        metrics=tuple(metric for metric in section.metrics if metric != "loss"),
        max_new_tokens=section.max_new_tokens,
        max_examples=section.max_examples,
        examples=config.report.examples,
    )


def targets_of(base: Base) -> list[str]:
    """Name the adapted modules of a base as exported adapters do."""
    return short_targets([name for name, _, _ in base.shapes], [name for name, _ in base.model.named_modules()])


def count_values(counts: Sequence[Mapping[str, Mapping[str, int]]], column: str) -> np.ndarray:
    """Return [K, values]: the share of each value of a column in every client's training examples.

    counts: of each client, column -> value -> examples. Raises MethodError if no client has that column, or it has too
    many values to be counted.
    """
    values = sorted({value for client in counts for value in client.get(column, {})})
    if not values:
        known = sorted({name for client in counts for name, own in client.items() if own})
        raise MethodError(
            f"no column '{column}' whose values can be counted{nearest(column, known)}; there are: "
            f"{', '.join(known) or 'none'}"
        )
    found = np.array([[client.get(column, {}).get(value, 0) for value in values] for client in counts])
    return found / np.maximum(found.sum(axis=1, keepdims=True), 1)


def client_table(workplace: Workplace, federation: Federation) -> dict[str, Any]:
    """Return clients.json: id -> folder, name, group, rank, counts of examples, tokens and cuts, sha256 of the data.

    rank is the largest of a client's modules; where they differ, ranks has each, by the ending of its name.
    """
    modules = [name for name, _, _ in workplace.base.shapes]
    return {
        client.id: {
            "folder": client.id,
            "name": client.name,
            "group": client.group,
            "rank": int(ranks.max()),
            **({"ranks": by_ending(modules, ranks.tolist())} if int(ranks.min()) < int(ranks.max()) else {}),
            "examples": {
                "train": len(client.train),
                "validation": len(client.validation),
                "test": len(client.test),
            },
            "sha256": fingerprint(client),
            "trained_tokens": client.trained_tokens,
            "prompts_cut": client.truncation.prompts_cut,
            "answers_cut": client.truncation.answers_cut,
            "questions_cut": client.truncation.questions_cut,
            "dropped": client.truncation.dropped,
        }
        for client, ranks in zip(workplace.clients, federation.ranks, strict=True)
    }


def fingerprint(client: ClientData) -> str:
    """sha256 over a client's token ids and answers, so that a resumed study can tell that its data has changed."""
    digest = hashlib.sha256()
    for part in (client.train, client.validation, client.test):
        digest.update(len(part).to_bytes(8, "big"))
        for example in part:
            spans = [place for span in example.labelled for place in span]
            digest.update(array("q", [len(spans), *spans, *example.ids]).tobytes())
            digest.update(repr(example.answers).encode())
            if example.own_question is not None:
                digest.update(array("q", [-1, *example.own_question]).tobytes())
    return digest.hexdigest()
