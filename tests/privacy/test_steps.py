"""A private gradient: each example's own, as a plain pass gives it alone, cut, summed, and noise of the stated size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters, norms, prompt_layout, start_adapters
from fedmira.adapters.optim import sgd
from fedmira.data.batches import ClientData, Encoded, collate
from fedmira.engine.phase import local_phase
from fedmira.engine.tools import Training
from fedmira.errors import MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, Tools
from fedmira.model.base.load import Base
from fedmira.model.passes import gradients
from fedmira.privacy import steps as private_steps
from fedmira.privacy.steps import PrivateSteps

RANKS = (2, 1, 2)
COUNTS = (5, 0, 3)  # examples of each client in the sample
CLIENTS = tuple(tiny.client(f"c{k}", train=5) for k in range(3))
BASES = {
    "packed": tiny.base("llama", targets=["q_proj", "v_proj"]),
    "padded": replace(tiny.base("llama", targets=["q_proj", "v_proj"]), packs=False),
    "gpt2": tiny.base("gpt2", targets=["c_attn"]),
}
BARE = PrivateSteps(1e9, 0.0, 1, {client.id: 1 for client in CLIENTS}, bytes(32), "mark")  # no clip, no noise, a sum


def sample() -> list[list[Encoded]]:
    return [list(client.train[:count]) for client, count in zip(CLIENTS, COUNTS, strict=True)]


def private(
    steps: PrivateSteps, base: Base, adapters: Adapters, examples: Sequence[Sequence[Encoded]], **options: Any
) -> Tensor:
    """The private gradients of three clients; `size` examples of each in a pass."""
    size = options.pop("size", 8)
    longest = max(1, *map(len, examples))
    passes = [[one[first : first + size] for one in examples] for first in range(0, longest, size)]
    into = torch.full_like(adapters.rows, float("nan"))
    settings: dict[str, Any] = {"trained": torch.ones(adapters.layout.size, dtype=torch.bool), "step": 0, "number": 0}
    steps.gradient(
        base,
        adapters,
        [collate(part, pad_id=base.pad_id) for part in passes],
        clients=[client.id for client in CLIENTS],
        into=into,
        **settings | options,
    )
    return into


def alone(base: Base, adapters: Adapters, client: int, example: Encoded) -> Tensor:
    """The gradient [P] of one example, as a plain pass of one client with one example gives it."""
    one = adapters.take(torch.tensor([client]))
    into = torch.zeros_like(one.rows)
    gradients(base, one, collate([[example]], pad_id=base.pad_id), into=into)
    return into[0]


def rows_of(base: Base, *, prompt: bool = False) -> Adapters:
    if not prompt:
        return tiny.adapters(tiny.layout(base, 2), RANKS)
    layout = prompt_layout(base.width, 3, 4)
    return (drawn := start_adapters(layout, torch.zeros(3).long(), 1.0, torch.Generator())).with_rows(
        drawn.rows.double()
    )


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("at_once", [1, 2**24])
@pytest.mark.parametrize(("kind", "prompt"), [*((kind, False) for kind in BASES), ("packed", True)])
def test_gradients_of_examples_are_those_of_each_example_alone(
    kind: str, prompt: bool, at_once: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_steps, "NUMBERS_AT_ONCE", at_once)
    base = BASES[kind]
    adapters, examples = rows_of(base, prompt=prompt), sample()
    clip = 0.5 * float(norms(alone(base, adapters, 0, examples[0][0])[None])[0])  # some are cut, and some are not
    for limit in (1e9, clip):
        wanted = torch.zeros_like(adapters.rows)
        for client, own in enumerate(examples):
            for example in own:
                gradient = alone(base, adapters, client, example)
                wanted[client] += gradient * min(1.0, limit / float(gradient.norm()))
        found = private(replace(BARE, clip=limit), base, adapters, examples, size=size)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_one_example_more_moves_the_sum_by_the_clip_at_most() -> None:
    base, clip = BASES["packed"], 1e-3
    adapters, examples = rows_of(base), sample()
    steps = replace(BARE, clip=clip)
    whole = private(steps, base, adapters, examples)
    for place in range(COUNTS[0]):
        less = [examples[0][:place] + examples[0][place + 1 :], *examples[1:]]
        distance = float((whole - private(steps, base, adapters, less))[0].norm())
        assert distance == pytest.approx(clip, rel=1e-9)  # reached: every gradient here is longer


def test_an_example_with_a_gradient_that_is_no_number_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    base = BASES["packed"]
    adapters, examples = rows_of(base), sample()
    wanted = private(BARE, base, adapters, [examples[0][1:], *examples[1:]])

    def broken(base: Base, stack: Adapters, batch: Any, *, into: Tensor, **options: Any) -> Any:
        found = gradients(base, stack, batch, into=into, **options)
        into[0, 3] = float("inf")
        return found

    monkeypatch.setattr(private_steps, "gradients", broken)
    torch.testing.assert_close(private(BARE, base, adapters, examples), wanted)


def test_columns_that_are_not_trained_get_no_gradient_and_take_none_of_the_clip() -> None:
    base, clip = BASES["packed"], 1e-3
    adapters, (example, *_) = rows_of(base), CLIENTS[0].train
    trained = torch.arange(adapters.layout.size) % 3 == 0
    found = private(replace(BARE, clip=clip), base, adapters, [[example], [], []], trained=trained)[0]
    assert bool((found[~trained] == 0).all())
    assert float(found.norm()) == pytest.approx(clip)
    noisy = private(replace(BARE, clip=clip, noise_multiplier=1.0), base, adapters, sample(), trained=trained)
    assert bool((noisy[:, ~trained] == 0).all())


def test_noise_stays_within_a_client_s_rank() -> None:
    base = BASES["packed"]
    adapters = rows_of(base)
    noisy = private(replace(BARE, clip=1.0, noise_multiplier=1.0), base, adapters, sample())
    inside = adapters.layout.rank_mask(adapters.ranks)
    assert bool((noisy[~inside] == 0).all())
    assert bool((noisy[inside] != 0).all())


def test_a_sample_without_examples_releases_noise_alone() -> None:
    base = BASES["packed"]
    adapters = rows_of(base)
    steps = replace(BARE, clip=2.0, noise_multiplier=3.0)
    noisy, none = (private(steps, base, adapters, examples) for examples in (sample(), [[], [], []]))
    inside = adapters.layout.rank_mask(adapters.ranks)
    assert none[inside].std() == pytest.approx(6.0, rel=0.1)
    torch.testing.assert_close((noisy - none)[0], private(replace(BARE, clip=2.0), base, adapters, sample())[0])


# ---------------------------------------------------------------- a real phase

LOCAL = build("local", {}, Cohort(tuple(client.id for client in CLIENTS), (5,) * 3, ({},) * 3, (), 0))


def phase(steps: PrivateSteps, method: Method = LOCAL, clients: Sequence[ClientData] = CLIENTS) -> Tensor:
    """Rows after one step of SGD at rate 1 on the examples of `sample`, and what was said of the losses."""
    base = BASES["packed"]
    start = rows_of(base)
    training = Training(sgd(), 1.0, 8, 1, None, None, False, 0.0, seed=3, private=steps)
    plans = [[np.arange(count)] for count in COUNTS]
    found = local_phase(
        base,
        method,
        clients,
        start,
        Message(start.rows),
        method.client.start(start),
        training=training,
        clock=Clock(1),
        cohort=8,
        plans=plans,
    )
    assert bool(found.losses.isnan().all())
    return found.rows


def check_noise(*, clip: float, noise_multiplier: float, expected: int) -> None:
    """Compare the noise in the rows of real phases with z C / B; raise AssertionError if it is another."""
    steps = replace(
        BARE, clip=clip, noise_multiplier=noise_multiplier, expected={client.id: expected for client in CLIENTS}
    )
    inside = rows_of(BASES["packed"]).layout.rank_mask(torch.tensor(RANKS))
    without = phase(replace(steps, noise_multiplier=0.0))
    drawn = [(phase(replace(steps, mark=f"{number}")) - without)[inside] for number in range(20)]
    scaled = torch.cat(drawn) * expected / (noise_multiplier * clip)
    error = 1 / np.sqrt(2 * len(scaled))
    assert float(scaled.std()) == pytest.approx(1, abs=5 * error)
    assert 5 * error < 0.05  # half of the noise, or twice, is far outside
    assert stats.kstest(scaled.numpy(), "norm").pvalue > 0.001
    assert abs(np.corrcoef(torch.stack(drawn).numpy())[np.triu_indices(20, 1)].mean()) < 0.01


def test_the_noise_of_a_phase_has_the_stated_size() -> None:
    check_noise(clip=0.5, noise_multiplier=1.5, expected=4)


def test_half_of_the_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = private_steps.gaussian
    monkeypatch.setattr(private_steps, "gaussian", lambda count, **options: whole(count, **options) / 2)
    with pytest.raises(AssertionError):
        check_noise(clip=0.5, noise_multiplier=1.5, expected=4)


def test_the_same_noise_in_every_phase_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = private_steps.gaussian
    same = {"purpose": "always"}
    monkeypatch.setattr(private_steps, "gaussian", lambda count, **options: whole(count, **options | same))
    with pytest.raises(AssertionError):
        check_noise(clip=0.5, noise_multiplier=1.5, expected=4)


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (lambda adapters, tools: tools.grad(adapters) and tools.grad(adapters), "more gradients than the 1"),
        (lambda adapters, tools: tools.curvature(adapters), "asks for curvature"),
        (lambda adapters, tools: tools.loss(adapters, on="batch"), "asks for losses on training examples"),
    ],
    ids=["two gradients", "curvature", "training losses"],
)
def test_a_method_that_looks_otherwise_at_training_examples_is_refused(ask: Any, why: str) -> None:
    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        ask(adapters, tools)
        return adapters, memory

    curious = replace(LOCAL, client=replace(LOCAL.client, step=step))
    with pytest.raises(MethodError, match=why):
        phase(replace(BARE, clip=1.0), curious)
