"""Every method obeys the laws, on quadratic losses and on a tiny transformer through the engine's local phase."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.laws import laws
from tests.laws.variants import FEW, VARIANTS, Variant, similarities
from tests.laws.worlds import WORLDS, World, transformer

from fedmira.engine.rates import Schedule
from fedmira.methods import build, names
from fedmira.methods.base import Method

# Their local halves are plain steps, or like those of others that are put before the laws on a transformer too.
PLAIN_HALVES = {"fedprox", "fedopt", "ffa_lora", "fedsa_lora", "rolora", "raflora", "pfedme", "apfl", "fedamp"}
PLAIN_HALVES |= {"pftt", "fedbone"}
PLAIN_HALVES |= {"dfedu"}  # its step between phases is put before MIRA's on a transformer in tests/methods
FIRST = [next(variant for variant in FEW if variant.name == name) for name in dict.fromkeys(one.name for one in FEW)]
CASES = [("quadratic", variant) for variant in VARIANTS] + [
    ("transformer", variant)
    if variant.name not in PLAIN_HALVES and (variant in FIRST or "with" in variant.settings)
    else pytest.param(("transformer", variant), marks=pytest.mark.slow)  # further settings of one method
    for variant in FEW
]
SYMMETRIC = [
    variant
    for variant in VARIANTS
    if variant.graph not in (None, "file, asymmetric") and variant.settings.get("space") != "product"
]
UNIFORM = {"column": "family", "weights": "uniform"}  # means of groups, as a graph step from clients to their mean
GROUPS = [variant for variant in VARIANTS if variant.settings == UNIFORM]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[World, Variant]:
    kind, variant = request.param
    return world_of(kind), variant


@functools.cache
def world_of(kind: str) -> World:
    return WORLDS[kind]()


BUILT: dict[tuple[int, str], tuple[Method, World]] = {}  # so that two rounds are trained once for all laws of a case


def at_home(case: tuple[World, Variant], folder: Path) -> tuple[Method, World]:
    """A method, and the world with the rows that it carries."""
    world, variant = case
    key = (id(world), str(variant))
    if key not in BUILT:
        method = variant.build(world, folder)
        BUILT[key] = method, world.under(method)
    return BUILT[key]


@pytest.mark.parametrize("law", laws.LAWS)
def test_every_method_obeys(law: str, case: tuple[World, Variant], tmp_path: Path) -> None:
    if case[1].moves_by_itself and law == laws.law_equal_clients_stay_equal.__name__:
        return
    laws.LAWS[law](*at_home(case, tmp_path))


@functools.cache
def falling() -> World:
    """An epoch each, so of other lengths, of accumulated steps at falling rates: clients of a pass have other rates."""
    schedule = Schedule("cosine", rounds=4)
    return transformer(local_steps=None, local_epochs=1, batch_size=1, accumulation=2, schedule=schedule)


@pytest.mark.parametrize(
    "law",
    [
        laws.law_a_batch_of_one_equals_a_batch_of_all,
        laws.law_the_order_in_the_stack_does_not_matter,
        laws.law_inputs_of_a_phase_and_of_a_merge_are_unchanged,
    ],
    ids=lambda law: law.__name__,
)
def test_a_falling_learning_rate_and_accumulated_steps_break_no_law_of_training(
    law: Callable[[Method, World], None],
) -> None:
    """For fedsophia's own step, SCAFFOLD, which divides by the sum of a client's rates, and FedRep's two phases."""
    world = falling()
    options = [
        ("fedsophia", {"tau": 2}),
        ("fedrep", {"head": 0.5}),
        *(("scaffold", {"variate": how}) for how in ("difference", "gradient")),
    ]
    for method in (build(name, settings, world.cohort) for name, settings in options):
        law(method, world.under(method))


def test_renaming_clients_renames_the_answer(case: tuple[World, Variant], tmp_path: Path) -> None:
    _, variant = case
    method, world = at_home(case, tmp_path)
    laws.law_renaming_clients_renames_the_answer(
        method, world, rebuild=lambda other: variant.rebuild(other, tmp_path, method.facts.graph)
    )


def test_an_absent_client_has_no_influence(case: tuple[World, Variant], tmp_path: Path) -> None:
    _, variant = case
    if variant.meets_anybody:  # an absent client's stored row may be sent: tests of these methods say to whom
        return
    method, world = at_home(case, tmp_path)
    laws.law_an_absent_client_has_no_influence(method, world, stored=variant.stored)


@pytest.mark.parametrize("variant", SYMMETRIC + GROUPS, ids=str)
def test_the_graph_step_never_widens_disagreement(variant: Variant, tmp_path: Path) -> None:
    world = WORLDS["quadratic"]()
    method = variant.build(world, tmp_path)
    graph = method.facts.graph
    assert graph is not None
    laws.law_the_graph_step_never_widens_disagreement(method, world, similarities=similarities(variant, graph))


@pytest.mark.parametrize("variant", [one for one in SYMMETRIC if one.settings["normalise"] != "row"] + GROUPS, ids=str)
def test_the_graph_step_keeps_the_mean(variant: Variant, tmp_path: Path) -> None:
    world = WORLDS["quadratic"]()
    laws.law_the_graph_step_keeps_the_mean(variant.build(world, tmp_path), world)


def test_mira_without_its_penalty_is_local_training(case: tuple[World, Variant], tmp_path: Path) -> None:
    world, variant = case
    if variant.name != "mira" or "lambda" not in variant.settings:
        return
    nothing = {"choice": {"alphas": [0]}} if variant.chooses else {"lambda": 0}
    unpulled = Variant(variant.name, {**variant.settings, **nothing}, variant.graph)
    laws.law_a_zero_penalty_is_the_simpler_neighbour(unpulled.build(world, tmp_path), world, simpler=local(world))


@functools.cache
def local(world: World) -> Method:
    return build("local", {}, world.cohort)


@pytest.mark.parametrize("variant", [*SYMMETRIC, *(one for one in VARIANTS if "column" in one.settings)], ids=str)
def test_only_clients_that_are_joined_have_influence(variant: Variant, tmp_path: Path) -> None:
    world = WORLDS["quadratic"]()
    laws.law_only_clients_that_are_joined_have_influence(variant.build(world, tmp_path), world)


def test_where_nobody_trains_nothing_moves(case: tuple[World, Variant], tmp_path: Path) -> None:
    method, world = at_home(case, tmp_path)
    if method.regime.trainees == "nobody":
        laws.law_where_nobody_trains_nothing_moves(method, world)
        return
    with pytest.raises(AssertionError):  # every other method moves
        laws.law_where_nobody_trains_nothing_moves(method, world)


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("name", ["groupavg", "fedavg_ft"])
@pytest.mark.parametrize("kind", WORLDS)
def test_a_group_of_everybody_and_rounds_before_fine_tuning_are_fedavg(kind: str, name: str, weights: str) -> None:
    world = WORLDS[kind]()
    method, fedavg = (build(one, {"weights": weights}, world.cohort) for one in (name, "fedavg"))
    laws.law_a_zero_penalty_is_the_simpler_neighbour(method, world, simpler=fedavg)


def test_every_method_of_the_tree_is_put_before_the_laws() -> None:
    assert {variant.name for variant in VARIANTS} == set(names())
    assert {variant.name for variant in FEW} == set(names())
