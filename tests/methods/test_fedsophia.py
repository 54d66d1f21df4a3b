"""Fed-Sophia in numbers worked by hand, against Sophia-G's public form, and through the engine."""

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import small_study, tiny
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout
from fedmira.adapters.optim import adamw, sgd
from fedmira.disk.checkpoints import load_chain
from fedmira.engine.phase import PhaseResult, local_phase
from fedmira.engine.tools import Training
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, State, Tools

LAYOUT = lora_layout([("m", 1, 1)], 1)  # two parameters; the rest of a row is padding
COHORT = Cohort(("a", "b", "c"), (1, 3, 9), ({}, {}, {}), (np.arange(3),), 0)


def sophia(**settings: Any) -> Method:
    return build("fedsophia", settings, COHORT)


def rows(*pairs: Sequence[float]) -> Tensor:
    """Rows whose two parameters are given."""
    found = torch.zeros(len(pairs), LAYOUT.size, dtype=torch.float64)
    found[:, :2] = torch.tensor(pairs, dtype=torch.float64)
    return found


@dataclass
class Client:
    """Clients of two parameters whose gradients, drawn gradients and labels [S] are the same or given step by step."""

    method: Method
    start: Tensor
    rate: float = 0.1
    memory: Memory = field(init=False)
    adapters: Adapters = field(init=False)
    asked: list[int] = field(default_factory=list)  # the steps in which curvature was asked for
    taken: int = 0

    def __post_init__(self) -> None:
        count = len(self.start)
        self.adapters = Adapters(LAYOUT, self.start.clone(), torch.ones(count, dtype=torch.int64), torch.ones(count))
        self.memory = self.method.client.start(self.adapters)

    def step(self, gradient: Tensor, drawn: Tensor, tokens: Sequence[int]) -> Tensor:
        """Take one step; return the two parameters of each client."""

        def curvature(current: Adapters) -> tuple[Tensor, Tensor]:
            self.asked.append(self.taken)
            return torch.tensor(tokens), drawn.clone()

        def grad(current: Adapters) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(current)), gradient.clone()

        tools = Tools(Clock(1, learning_rate=self.rate), grad, never, lambda name: [], curvature, never, never)
        self.adapters, self.memory = self.method.client.step(self.adapters, self.memory, Message(self.start), tools)
        self.taken += 1
        return self.adapters.rows[:, :2]

    def end_round(self) -> None:
        """Finish a round and begin another, with the memory that is kept."""
        tools = Tools(Clock(1), never, never, lambda name: [], never, never, never)
        _, self.memory = self.method.client.finish(self.adapters, self.memory, Message(self.start), tools)


def never(*arguments: object) -> Any:
    raise AssertionError("this tool is not for this method, or not here")


# ---------------------------------------------------------------- the step, by hand

BY_HAND = {"betas": [0.5, 0.5], "rho": 1.5, "tau": 2, "weight_decay": 0.5}


def test_three_steps_of_two_parameters() -> None:
    """eta = 0.1, so that decay takes 5 %; B = 2 in the first step and 1 in the third, no estimate in the second."""
    client = Client(sophia(**BY_HAND), rows((1, -2)))
    # m = (2, -0.5), v = 1/2 2 (1, 4) = (1, 4), m / v = (2, -0.125), of which 2 is cut to 1.5
    found = client.step(rows((4, -1)), rows((1, 2)), [2])
    assert found[0].tolist() == pytest.approx([0.95 - 0.15, -1.9 + 0.0125])
    # m = (1, 1.25), m / v = (1, 0.3125)
    found = client.step(rows((0, 3)), rows((9, 9)), [7])
    assert found[0].tolist() == pytest.approx([0.76 - 0.1, -1.793125 - 0.03125])
    # m = (-2, 0.25), v = 1/2 (1, 4) + 1/2 (9, 0) = (5, 2), m / v = (-0.4, 0.125)
    found = client.step(rows((-5, -0.75)), rows((3, 0)), [1])
    assert found[0].tolist() == pytest.approx([0.627 + 0.04, -1.73315625 - 0.0125])
    assert client.asked == [0, 2]
    assert client.memory["sophia_m"][0, :2].tolist() == pytest.approx([-2, 0.25])
    assert client.memory["sophia_v"][0, :2].tolist() == pytest.approx([5, 2])
    assert client.memory["sophia_count"].tolist() == [3]


def test_the_first_step_by_default() -> None:
    """m = 0.035 x 3, v = 0.01 x 4 x 5^2 = 1: 0.105 is cut to 0.04. m = 0.035 x 0.1, v = 1: it stays 0.0035."""
    found = Client(sophia(), rows((1, 1))).step(rows((3, 0.1)), rows((5, 5)), [4])
    assert found[0].tolist() == pytest.approx([1 - 0.1 * 0.04, 1 - 0.1 * 0.0035])


def test_without_curvature_a_step_is_as_long_as_it_may_be_and_without_a_gradient_there_is_none() -> None:
    found = Client(sophia(rho=0.5), rows((1, 1))).step(rows((-1e-9, 0)), rows((0, 0)), [4])
    assert found[0].tolist() == pytest.approx([1 + 0.1 * 0.5, 1])


def test_eps_is_the_least_that_curvature_counts_as() -> None:
    """m = 0.035 x 2 over eps = 7 is 0.01."""
    found = Client(sophia(eps=7), rows((1, 1))).step(rows((2, 2)), rows((0, 10)), [1])
    assert found[0].tolist() == pytest.approx([1 - 0.1 * 0.01, 1 - 0.1 * 0.01])


def test_nothing_beyond_a_clients_rank_is_filled_whatever_a_gradient_says() -> None:
    layout, ranks = lora_layout([("m", 3, 2)], 2), torch.tensor([2, 1])
    own = layout.rank_mask(ranks)
    adapters = Adapters(layout, torch.ones(2, layout.size), ranks, torch.ones(2)).mask_()
    method = sophia()

    def ones(current: Adapters) -> tuple[Tensor, Tensor]:
        return torch.ones(2), torch.ones_like(current.rows)

    tools = Tools(Clock(1, learning_rate=1.0), ones, never, lambda name: [], ones, never, never)
    found, _ = method.client.step(adapters, method.client.start(adapters), Message(adapters.rows), tools)
    assert bool((found.rows[1][~own[1]] == 0).all())
    assert bool((found.rows[own] < 1).all())


# ---------------------------------------------------------------- the public form

DRAWS = np.random.default_rng(0).normal(size=(6, 2, 2)).tolist()  # a gradient and a drawn one in each of six steps
LABELS = 5


def walk(method: Method, rate: float) -> Tensor:
    client = Client(method, rows((1, -2)), rate)
    for gradient, drawn in DRAWS:
        client.step(rows(gradient), rows(drawn), [LABELS])
    return client.adapters.rows[0, :2]


def public(rate: float, rho: float, *, tau: int, decay: float) -> Tensor:
    """Sophia-G as its authors' code has it: lr sign(m) min(|m| / (rho bs h + 1e-15), 1), bs constant, h without B."""
    w, m, h = rows((1, -2))[0, :2], torch.zeros(2).double(), torch.zeros(2).double()
    for place, (gradient, drawn) in enumerate(DRAWS):
        m = 0.965 * m + 0.035 * rows(gradient)[0, :2]
        if place % tau == 0:
            h = 0.99 * h + 0.01 * rows(drawn)[0, :2] ** 2
        w = w * (1 - rate * decay)
        w = w - rate * m.sign() * (m.abs() / (rho * LABELS * h + 1e-15)).clamp(max=1)
    return w


@pytest.mark.parametrize("rho", [0.04, 0.7, 30.0])  # nearly all numbers are cut, some, none
def test_the_papers_form_is_the_public_one_with_lr_as_eta_rho_and_bs_as_b(rho: float) -> None:
    found = walk(sophia(rho=rho, tau=3), 0.2)
    torch.testing.assert_close(found, public(0.2 * rho, rho, tau=3, decay=0.0), rtol=1e-9, atol=1e-12)


def test_form_public_takes_the_learning_rate_for_the_longest_step_decay_included() -> None:
    found = walk(sophia(form="public", rho=3.0, tau=3, weight_decay=0.4), 0.2)
    torch.testing.assert_close(found, public(0.2, 3.0, tau=3, decay=0.4), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- whose estimate is due


def test_every_client_has_a_count_of_its_own() -> None:
    """A client that took three steps before and a new one, tau = 4: the new one's estimate is due, then the other's."""
    client = Client(sophia(betas=[0.5, 0.5], tau=4), rows((1, 1), (1, 1)))
    client.memory["sophia_count"][0] = 3
    client.memory["sophia_v"][0] = 8
    client.step(rows((1, 1), (1, 1)), rows((2, 2), (2, 2)), [3, 5])
    assert client.memory["sophia_v"][:, 0].tolist() == [8, 10]
    client.step(rows((1, 1), (1, 1)), rows((1, 1), (1, 1)), [2, 2])
    assert client.memory["sophia_v"][:, 0].tolist() == [5, 10]
    assert client.memory["sophia_count"].tolist() == [5, 2]


def test_counting_rounds_makes_an_estimate_in_every_step_of_each_tau_th_of_a_clients_rounds() -> None:
    client = Client(sophia(count="rounds", tau=2), rows((1, 1)))
    for _ in range(3):
        for _ in range(2):
            client.step(rows((1, 1)), rows((1, 1)), [1])
        client.end_round()
    assert client.asked == [0, 1, 4, 5]
    assert client.memory["sophia_count"].tolist() == [3]


def test_every_client_counts_its_own_rounds_by_one() -> None:
    client = Client(sophia(count="rounds"), rows((1, 1), (1, 1), (1, 1)))
    client.memory["sophia_count"][0] = 4
    client.end_round()
    assert client.memory["sophia_count"].tolist() == [5, 1, 1]


def test_counting_steps_goes_on_across_rounds() -> None:
    client = Client(sophia(tau=3), rows((1, 1)))
    for _ in range(3):
        for _ in range(2):
            client.step(rows((1, 1)), rows((1, 1)), [1])
        client.end_round()
    assert client.asked == [0, 3]


# ---------------------------------------------------------------- the server


def merge(method: Method, uploads: Tensor, *weights: float) -> list[float]:
    state = State(Adapters(LAYOUT, rows((7, 7)), torch.tensor([1]), torch.tensor([1.0])))
    ids = torch.arange(len(uploads))
    change = method.merge(state, ids, Message(uploads), torch.tensor(weights, dtype=torch.float64), Clock(1))
    assert change.ids.tolist() == [0]
    return change.rows[0, :2].tolist()


def test_every_client_counts_the_same_in_the_papers_mean() -> None:
    assert merge(sophia(), rows((0, 8), (4, 0)), 1, 3) == [2, 4]
    assert not sophia().facts.weighs


def test_clients_count_by_their_examples_where_that_is_asked_for() -> None:
    assert merge(sophia(weights="examples"), rows((0, 8), (4, 0)), 1, 3) == [3, 2]
    assert sophia(weights="examples").facts.weighs


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(MethodError, match="sum to 0"):
        merge(sophia(weights="examples"), rows((0, 8), (4, 0)), 0, 0)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rho": 0}, "rho"),  # the authors' command line has 0, which cuts every number to sign(m)
        ({"eps": 0}, "eps"),
        ({"tau": 0}, "tau"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"form": "code"}, "form"),
        ({"count": "epochs"}, "count"),
        ({"lambda": 0.1}, "lambda"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        sophia(**settings)


# ---------------------------------------------------------------- through the engine

BASE = tiny.base("gpt2", targets=["c_attn"])
TRAIN = (2, 7, 4)  # examples: 1, 4 and 2 batches of two in one epoch
EPOCH = Training(sgd(), 0.5, 2, None, 1, None, False, 0.3, seed=3)
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def phase(
    *, who: tuple[int, ...] = (0, 1, 2), training: Training = EPOCH, memory: Memory | None = None, **settings: Any
) -> PhaseResult:
    start = tiny.adapters(tiny.layout(BASE, 2), (2, 1, 2)).take(torch.tensor(who))
    method = sophia(tau=3, **settings)
    return local_phase(
        BASE,
        method,
        [tiny.client(f"c{k}", train=TRAIN[k]) for k in who],
        start,
        Message(start.rows),
        method.client.start(start) if memory is None else memory,
        training=training,
        clock=Clock(1),
        cohort=8,
    )


def test_a_client_alone_ends_where_it_ends_among_others_under_dropout_too() -> None:
    """Those beside it have more steps or fewer, and their estimates are due in other steps."""
    before = {name: value.clone() for name, value in phase().memory.items()}
    before["sophia_count"] = torch.tensor([0, 1, 5])
    together = phase(memory=before)
    for k in range(3):
        alone = phase(who=(k,), memory={name: value[k : k + 1] for name, value in before.items()})
        torch.testing.assert_close(alone.returned.rows[0], together.returned.rows[k], **CLOSE)
        for name, value in alone.memory.items():
            torch.testing.assert_close(value[0], together.memory[name][k], **CLOSE)


def test_a_client_that_has_finished_keeps_its_row_its_moments_and_its_count() -> None:
    found = phase(weight_decay=0.1)
    short = phase(training=replace(EPOCH, local_epochs=None, local_steps=1), weight_decay=0.1)
    assert found.steps.tolist() == found.memory["sophia_count"].tolist() == [1, 4, 2]
    torch.testing.assert_close(found.returned.rows[0], short.returned.rows[0], **CLOSE)
    for name in ("sophia_m", "sophia_v"):
        torch.testing.assert_close(found.memory[name][0], short.memory[name][0], **CLOSE)
        assert not torch.allclose(found.memory[name][1], short.memory[name][1])


def test_the_configs_optimizer_and_its_clipping_have_no_effect() -> None:
    other = replace(EPOCH, optimizer=adamw(weight_decay=0.5), max_grad_norm=1e-3)
    assert torch.equal(phase(training=other).returned.rows, phase().returned.rows)


def test_rows_travel_and_nothing_else() -> None:
    found = phase()
    assert found.returned.rows.shape == (3, tiny.layout(BASE, 2).size)
    assert not found.returned.scalars


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[[str], Path]:
    base, data = small_study.save_base(tmp_path / "base"), small_study.save_data(tmp_path / "data.jsonl")

    def make(name: str) -> Path:
        methods = [{"name": "fedsophia", "tau": 3, "form": "public"}]
        raw = small_study.settings(base, data, tmp_path / name, methods=methods, training={"learning_rate": 0.01})
        return small_study.save_config(tmp_path / f"{name}.yaml", raw)

    return make


def counts(study: Path) -> dict[int, int]:
    """Steps that each remembered client has counted, as the newest checkpoints have it."""
    found: dict[int, int] = {}
    for checkpoint in load_chain(study / "fedsophia" / "seed-3" / "checkpoints"):
        memory = checkpoint.files["memory"]
        names = {f"method/sophia_{name}" for name in ("m", "v", "count")}
        assert set(memory) == {"ids", *names}  # the optimizer's own is dropped
        found |= dict(zip(memory["ids"].tolist(), memory["method/sophia_count"].tolist(), strict=True))
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_has_the_moments_and_counts_of_one_that_was_not(
    make_config: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two steps a round and tau = 3: what is due after the kill is told by the counts of before."""
    ended = small_study.command("run", make_config("whole"))
    assert ended.code == 0, ended.err
    lines = (tmp_path / "whole" / "fedsophia" / "seed-3" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    sampled = [client for line in lines for client in json.loads(line)["clients"]]
    wanted = {k: 2 * sampled.count(client) for k, client in enumerate(small_study.CLIENTS) if client in sampled}
    assert len(set(wanted.values())) > 1
    assert counts(tmp_path / "whole") == wanted
    for place, done in ((45, 1), (75, 3)):
        config, study = make_config(f"study-{place}"), tmp_path / f"study-{place}"
        assert small_study.command("run", config, die_at=place).code == -signal.SIGKILL
        assert load_chain(study / "fedsophia" / "seed-3" / "checkpoints")[-1].round == done
        ended = small_study.command("resume", study)
        assert ended.code == 0, ended.err
        assert small_study.differences(small_study.outcome(study), small_study.outcome(tmp_path / "whole")) == []
        assert counts(study) == wanted
