"""Every method obeys the laws, on quadratic losses and on a tiny transformer through the engine's local phase."""

from pathlib import Path

import pytest
from tests.laws import laws
from tests.laws.variants import FEW, VARIANTS, Variant, similarities
from tests.laws.worlds import WORLDS, World

from fedmira.methods import build, names

CASES = [("quadratic", variant) for variant in VARIANTS] + [("transformer", variant) for variant in FEW]
SYMMETRIC = [variant for variant in VARIANTS if variant.graph not in (None, "file, asymmetric")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[World, Variant]:
    kind, variant = request.param
    return WORLDS[kind](), variant


@pytest.mark.parametrize("law", laws.LAWS)
def test_every_method_obeys(law: str, case: tuple[World, Variant], tmp_path: Path) -> None:
    world, variant = case
    laws.LAWS[law](variant.build(world, tmp_path), world)


def test_renaming_clients_renames_the_answer(case: tuple[World, Variant], tmp_path: Path) -> None:
    world, variant = case
    method = variant.build(world, tmp_path)
    laws.law_renaming_clients_renames_the_answer(
        method, world, rebuild=lambda other: variant.rebuild(other, tmp_path, method.graph)
    )


def test_an_absent_client_has_no_influence(case: tuple[World, Variant], tmp_path: Path) -> None:
    world, variant = case
    laws.law_an_absent_client_has_no_influence(variant.build(world, tmp_path), world, stored=variant.stored)


@pytest.mark.parametrize("variant", SYMMETRIC, ids=str)
def test_the_graph_step_never_widens_disagreement(variant: Variant, tmp_path: Path) -> None:
    world = WORLDS["quadratic"]()
    method = variant.build(world, tmp_path)
    assert method.graph is not None
    laws.law_the_graph_step_never_widens_disagreement(method, world, similarities=similarities(variant, method.graph))


@pytest.mark.parametrize("variant", [one for one in SYMMETRIC if one.settings["normalise"] != "row"], ids=str)
def test_the_graph_step_keeps_the_mean(variant: Variant, tmp_path: Path) -> None:
    world = WORLDS["quadratic"]()
    laws.law_the_graph_step_keeps_the_mean(variant.build(world, tmp_path), world)


def test_mira_without_its_penalty_is_local_training(case: tuple[World, Variant], tmp_path: Path) -> None:
    world, variant = case
    if "lambda" not in variant.settings:
        return
    unpulled = Variant(variant.name, {**variant.settings, "lambda": 0}, variant.graph)
    laws.law_a_zero_penalty_is_the_simpler_neighbour(
        unpulled.build(world, tmp_path), world, simpler=build("local", {}, world.cohort)
    )


def test_every_method_of_the_tree_is_put_before_the_laws() -> None:
    assert {variant.name for variant in VARIANTS} == set(names())
    assert {variant.name for variant in FEW} == set(names())
