"""The sum of low-rank products, factored without the dense matrix, against the dense formula."""

import pytest
import torch
from torch import Tensor

from fedmira.adapters.lowrank import decompose_sum, factors
from fedmira.errors import ShapeError


def draw(ranks: list[int], outputs: int, inputs: int, *, modules: tuple[int, ...] = ()) -> tuple[list[Tensor], ...]:
    stream = torch.Generator().manual_seed(sum(ranks) + outputs)
    lefts = [torch.randn(*modules, outputs, r, generator=stream, dtype=torch.float64) for r in ranks]
    rights = [torch.randn(*modules, r, inputs, generator=stream, dtype=torch.float64) for r in ranks]
    return lefts, rights


def dense(lefts: list[Tensor], rights: list[Tensor], weights: Tensor) -> Tensor:
    return sum((w * (b @ a) for w, b, a in zip(weights, lefts, rights, strict=True)), torch.zeros(()))


def product(lefts: list[Tensor], rights: list[Tensor], weights: Tensor, rank: int, scale: float = 2.0) -> Tensor:
    left, right = factors(decompose_sum(lefts, rights, weights), rank, scale, dtype=torch.float64)
    return scale * left @ right


def best(matrix: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * values[..., None, :rank]) @ v[..., :rank, :]


MIXED = [
    ([8, 30, 200], 320, 260),  # the sum of ranks, 238, is below both sides
    ([8, 30, 200], 300, 200),  # at the narrower side or over it: the dense sum is decomposed
    ([8], 64, 48),
    ([1, 2, 3], 40, 9),
]


@pytest.mark.parametrize(("ranks", "outputs", "inputs"), MIXED)
@pytest.mark.parametrize("rank", [1, 8, 30, 200])
def test_factors_of_any_rank_are_those_of_the_dense_sum(ranks: list[int], outputs: int, inputs: int, rank: int) -> None:
    lefts, rights = draw(ranks, outputs, inputs)
    weights = torch.linspace(0.1, 1.5, len(ranks), dtype=torch.float64)
    expected = best(dense(lefts, rights, weights), rank)
    torch.testing.assert_close(product(lefts, rights, weights, rank), expected, rtol=1e-9, atol=1e-9)


def test_one_client_gets_its_own_product_back() -> None:
    lefts, rights = draw([4], 20, 30)
    torch.testing.assert_close(product(lefts, rights, torch.ones(1), 4), lefts[0] @ rights[0])


def test_the_scale_of_the_receiver_is_taken_out_of_its_b() -> None:
    lefts, rights = draw([4], 20, 30)
    found = decompose_sum(lefts, rights, torch.ones(1))
    one, other = (factors(found, 4, scale, dtype=torch.float32) for scale in (1.0, 4.0))
    torch.testing.assert_close(one[0], 4 * other[0])
    assert torch.equal(one[1], other[1])


def test_modules_of_equal_shape_are_a_batch() -> None:
    lefts, rights = draw([3, 5], 40, 30, modules=(2, 3))
    weights = torch.tensor([0.25, 0.75])
    expected = best(dense(lefts, rights, weights), 4)
    torch.testing.assert_close(product(lefts, rights, weights, 4), expected)


def test_directions_that_the_sum_lacks_get_no_b_and_orthonormal_rows_of_a() -> None:
    """Two clients share one factorisation of rank 2: the sum of ranks is 4, the rank is 2, the receiver's is 7."""
    lefts, rights = draw([2], 20, 30)
    left, right = factors(decompose_sum(lefts * 2, rights * 2, torch.ones(2)), 7, 0.5, dtype=torch.float64)
    assert left.shape == (20, 7)
    assert bool((left[:, 2:] == 0).all())
    assert bool((left[:, :2] != 0).any(dim=0).all())
    torch.testing.assert_close(right @ right.T, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(0.5 * left @ right, 2 * lefts[0] @ rights[0])


def test_zero_b_gives_zero_b_and_rows_of_a_that_can_train() -> None:
    _, rights = draw([2, 3], 20, 30)
    lefts = [torch.zeros(20, 2), torch.zeros(20, 3)]
    left, right = factors(decompose_sum(lefts, rights, torch.ones(2)), 8, 1.0, dtype=torch.float64)
    assert not bool(left.any())
    torch.testing.assert_close(right @ right.T, torch.eye(8, dtype=torch.float64))


def test_rows_of_a_beyond_the_number_of_inputs_are_zero() -> None:
    lefts, rights = draw([2], 20, 3)
    left, right = factors(decompose_sum(lefts, rights, torch.ones(1)), 5, 1.0, dtype=torch.float64)
    torch.testing.assert_close(right @ right.T, torch.diag(torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)))
    assert not bool(left[:, 2:].any())


def test_equal_singular_values_keep_the_product() -> None:
    """The sum is 3 times a partial isometry of rank 4: any basis of the directions will do."""
    basis, _ = torch.linalg.qr(draw([4], 20, 20)[0][0])
    lefts, rights = [3 * basis[:, :1], 3 * basis[:, 1:]], [basis.T[:1], basis.T[1:]]
    found = decompose_sum(lefts, rights, torch.ones(2))
    torch.testing.assert_close(found.values, torch.full((4,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(product(lefts, rights, torch.ones(2), 4), 3 * basis @ basis.T)


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 30), (6, 5)])
def test_the_sign_of_a_direction_is_fixed_by_its_largest_entry(outputs: int, inputs: int) -> None:
    lefts, rights = draw([2, 3], outputs, inputs)
    found = decompose_sum(lefts, rights, torch.ones(2))
    flipped = decompose_sum([-one for one in lefts], [-one for one in rights], torch.ones(2))
    turned = decompose_sum(lefts[::-1], rights[::-1], torch.ones(2))
    peaks = found.right.gather(-1, found.right.abs().argmax(dim=-1, keepdim=True))
    assert bool((peaks > 0).all())
    for other in (flipped, turned):
        torch.testing.assert_close(other.right, found.right)
        torch.testing.assert_close(other.left, found.left)


def test_no_matrix_of_outputs_by_inputs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    plain = torch.linalg.svd

    def watched(matrix: Tensor, **options: bool) -> object:
        seen.append(tuple(matrix.shape))
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    lefts, rights = draw([2, 3], 40, 30)
    decompose_sum(lefts, rights, torch.ones(2))
    assert seen == [(5, 5)]


def test_no_gradient_is_kept() -> None:
    lefts, rights = draw([2], 20, 30)
    left, right = factors(
        decompose_sum([lefts[0].requires_grad_()], rights, torch.ones(1)), 2, 1.0, dtype=torch.float32
    )
    assert not left.requires_grad
    assert not right.requires_grad
    assert left.dtype == right.dtype == torch.float32


def test_factors_that_do_not_fit_are_refused() -> None:
    lefts, rights = draw([2, 3], 20, 30)
    with pytest.raises(ShapeError, match=r"\(20, 2\) and \(3, 30\) do not make a 20 x 30 update"):
        decompose_sum(lefts, rights[::-1], torch.ones(2))
    with pytest.raises(ShapeError, match="2 left factors, 2 right factors, 1 weights"):
        decompose_sum(lefts, rights, torch.ones(1))
    with pytest.raises(ShapeError, match="at least one client"):
        decompose_sum([], [], torch.ones(0))
    with pytest.raises(ShapeError, match="rank 0 and scale 1: need rank >= 1"):
        factors(decompose_sum(lefts, rights, torch.ones(2)), 0, 1.0, dtype=torch.float32)


@pytest.mark.parametrize("size", [1e8, 1e-18])
def test_whether_a_direction_is_rounding_is_judged_by_the_largest_one(size: float) -> None:
    """The same update twice has one direction, of any size; what rounding leaves of a second one gets no B."""
    (left,), (right,) = draw([1], 20, 30)
    found = decompose_sum([left * size, left * size], [right, right], torch.ones(2))
    b, a = factors(found, 2, 1.0, dtype=torch.float64)
    assert bool((b[:, 0] != 0).all())
    assert not b[:, 1].any()
    torch.testing.assert_close((b @ a) / size, 2 * left @ right)
