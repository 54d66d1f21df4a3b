"""Optimizers over rows are torch's, client by client; clipping is each client's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedmira.adapters.optim import Optimizer, OptimizerMemory, adamw, clip_, on_columns, sgd

P = 5

CASES: dict[str, tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "adamw": (
        adamw(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda own: torch.optim.AdamW(own, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    "adamw without decay": (adamw(), lambda own: torch.optim.AdamW(own, lr=0.1, weight_decay=0.0)),
    "sgd": (sgd(), lambda own: torch.optim.SGD(own, lr=0.1)),
    "sgd, momentum and decay": (
        sgd(momentum=0.9, weight_decay=0.1),
        lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def pair(
    request: pytest.FixtureRequest,
) -> tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    return request.param


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def head(memory: OptimizerMemory, count: int) -> OptimizerMemory:
    return {name: value[:count] for name, value in memory.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_move_as_torch_moves_them_although_clients_stop_at_different_steps(
    pair: tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]], dtype: torch.dtype
) -> None:
    ours, theirs = pair
    rows = draw(3, P, dtype=dtype)
    judged = [row.clone().requires_grad_() for row in rows]
    judges = [theirs([row]) for row in judged]
    memory = ours.start(rows)
    for step, working in enumerate((3, 3, 2, 1, 1)):
        gradient = draw(working, P, seed=10 + step, dtype=dtype)
        for row, judge, push in zip(judged, judges, gradient, strict=False):
            row.grad = push.clone()
            judge.step()
        ours.update(rows[:working], gradient, head(memory, working), 0.1)
    tight = dtype == torch.float64
    expected = torch.stack([row.detach() for row in judged])
    torch.testing.assert_close(rows, expected, rtol=1e-12 if tight else 1e-5, atol=1e-14 if tight else 1e-6)


def test_a_finished_client_keeps_row_moments_and_step_count(
    pair: tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]],
) -> None:
    ours, _ = pair
    rows = draw(2, P)
    memory = ours.start(rows)
    ours.update(rows, draw(2, P, seed=1), memory, 0.1)
    still = [rows[1].clone(), *(value[1].clone() for value in memory.values())]
    ours.update(rows[:1], draw(1, P, seed=2), head(memory, 1), 0.1)
    assert all(
        torch.equal(now, then) for now, then in zip([rows[1], *(v[1] for v in memory.values())], still, strict=True)
    )


def test_memory_holds_the_named_keys_with_a_client_axis(
    pair: tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]],
) -> None:
    ours, _ = pair
    memory = ours.start(draw(4, P))
    assert set(memory) == set(ours.keys)
    assert all(len(value) == 4 for value in memory.values())


def test_the_first_step_of_adamw_is_the_learning_rate_in_the_direction_of_the_gradient() -> None:
    rows = torch.zeros(1, 2)
    optimizer = adamw()
    optimizer.update(rows, torch.tensor([[3.0, -0.001]]), optimizer.start(rows), 0.5)
    assert rows.tolist()[0] == pytest.approx([-0.5, 0.5], abs=1e-4)


def test_momentum_by_hand() -> None:
    """g = 1 twice, momentum 1/2, lr 1: b = 1, then 1.5; w = -1, then -2.5."""
    rows = torch.zeros(1, 1)
    optimizer = sgd(momentum=0.5)
    memory = optimizer.start(rows)
    for expected in (-1.0, -2.5):
        optimizer.update(rows, torch.ones(1, 1), memory, 1.0)
        assert rows.item() == expected


def test_sgd_without_momentum_keeps_nothing() -> None:
    assert sgd().start(torch.zeros(2, 2)) == {}


def test_some_columns_move_as_they_do_alone_and_the_others_not_at_all(
    pair: tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]],
) -> None:
    """Neither decay nor momentum touches the others, whatever their gradient; a finished client stays too."""
    ours, _ = pair
    columns = torch.tensor([True, False, True, True, False])
    partly = on_columns(ours, columns)
    rows = draw(3, P)
    alone, others = rows[:, columns].clone(), rows[:, ~columns].clone()
    memory, memory_alone = partly.start(rows), ours.start(alone)
    assert memory.keys() == memory_alone.keys() == set(partly.keys)
    for step, working in enumerate((3, 2, 1)):
        gradient = draw(working, P, seed=20 + step)
        before = gradient.clone()
        ours.update(alone[:working], gradient[:, columns].clone(), head(memory_alone, working), 0.1)
        partly.update(rows[:working], gradient, head(memory, working), 0.1)
        assert torch.equal(gradient, before)
    assert torch.equal(rows[:, columns], alone)
    assert torch.equal(rows[:, ~columns], others)
    for name, value in memory.items():
        assert torch.equal(value if value.ndim == 1 else value[:, columns], memory_alone[name])
        assert value.ndim == 1 or not value[:, ~columns].any()


def test_adamw_gives_a_client_the_same_bits_alone_beside_others_and_on_any_number_of_threads() -> None:
    """Rows that no vector divides, long enough for several threads; clients at different steps and rates."""
    count, length = 3, 100_003
    optimizer = adamw(weight_decay=0.1)
    start = draw(count, length, dtype=torch.float32)
    pushes = [draw(count, length, seed=seed, dtype=torch.float32) for seed in (1, 2)]
    rates = torch.tensor([[0.1], [0.02], [0.1]], dtype=torch.float64)

    def train(clients: list[int], threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            rows = start[clients]
            memory = optimizer.start(rows)
            memory["steps"] += torch.tensor([0, 7, 2])[clients]
            for push in pushes:
                optimizer.update(rows, push[clients], memory, rates[clients])
        finally:
            torch.set_num_threads(before)
        return [rows, *memory.values()]

    together = train([0, 1, 2], threads=1)
    for clients in ([0], [1], [2], [2, 0], [0, 1, 2]):
        for threads in (1, 2):
            expected = [value[clients] for value in together]
            assert all(map(torch.equal, train(clients, threads), expected))


def test_one_learning_rate_for_all_gives_the_bits_of_that_rate_for_each() -> None:
    one, each = draw(3, P), draw(3, P)
    optimizer = adamw(weight_decay=0.1)
    optimizer.update(one, draw(3, P, seed=1), optimizer.start(one), 0.1)
    rates = torch.full((3, 1), 0.1, dtype=torch.float64)
    optimizer.update(each, draw(3, P, seed=1), optimizer.start(each), rates)
    assert torch.equal(one, each)


def test_rows_and_gradients_of_any_strides_move_alike(
    pair: tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]],
) -> None:
    """Such as a method may make: the transpose of a stack, one gradient for all clients."""
    ours, _ = pair
    gradient = draw(1, P, seed=1)
    plain = draw(3, P)
    strided = plain.T.contiguous().T
    assert not strided.is_contiguous()
    memory, memory_strided = ours.start(plain), ours.start(strided)
    for _ in range(2):
        ours.update(plain, gradient.repeat(3, 1), memory, 0.1)
        ours.update(strided, gradient.expand(3, P), memory_strided, 0.1)
    assert torch.equal(strided, plain)
    assert all(torch.equal(memory_strided[name], value) for name, value in memory.items())


def test_clipping_scales_each_client_by_its_own_norm() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [30.0, 40.0]])
    before = clip_(gradient, 1.0)
    assert before.tolist() == pytest.approx([5, 0.5, 0, 50])
    assert gradient.tolist() == [pytest.approx(row) for row in ([0.6, 0.8], [0.3, 0.4], [0, 0], [0.6, 0.8])]


def test_a_gradient_below_the_limit_keeps_its_bits() -> None:
    gradient = draw(3, P, dtype=torch.float32)
    before = gradient.clone()
    clip_(gradient, 100.0)
    assert torch.equal(gradient, before)


def test_clipping_agrees_with_torch_up_to_its_millionth() -> None:
    gradient = draw(1, P)
    row = torch.zeros(P, dtype=torch.float64, requires_grad=True)
    row.grad = gradient[0].clone()
    norm = torch.nn.utils.clip_grad_norm_([row], 0.5)
    before = clip_(gradient, 0.5)
    assert float(before) == pytest.approx(float(norm))
    assert row.grad is not None
    torch.testing.assert_close(gradient[0], row.grad, rtol=1e-5, atol=0)


def test_a_gradient_whose_square_overflows_float32_is_still_clipped() -> None:
    gradient = torch.full((1, 4), 1e30)
    clip_(gradient, 1.0)
    assert gradient.tolist()[0] == pytest.approx([0.5] * 4)
