"""Noise on uploads: how much there is, that it is secret, what it promises a client, what it leaves of the signal."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from tests.marks import one_in
from tests.methods import hand
from torch import Tensor

from fedmira.errors import MethodError, StoreError
from fedmira.methods.base import Clock, Message, Tools
from fedmira.privacy.accountant import gaussian_epsilon
from fedmira.privacy.uploads import FILE, Hidden, UploadNoise, Uploads, signal_to_noise
from fedmira.study.client_privacy import Promise, rounded_up

pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
CLIP, SIGMA = 1.0, 2.0
Draw = Callable[[Tensor, Tensor], Tensor]


def sent_of(rows: Tensor, draw: Draw | None, *, given: Tensor | None = None, sigma: float = SIGMA) -> Tensor:
    """What clients with these rows send, by the wrappers themselves."""
    wrappers = [{"name": "clip", "norm": CLIP}, {"name": "noise", "sigma": sigma}]
    method = hand.make("fedavg", **{"with": wrappers})
    noise = None if draw is None else lambda updates, deviations, streams: draw(updates, deviations)
    never = hand.never
    tools = Tools(Clock(1), never, never, never, never, never, never, noise=noise)
    start = torch.zeros_like(rows) if given is None else given
    return method.client.finish(hand.adapters(rows), {}, Message(start), tools)[0].rows


def secret(noise: UploadNoise, *, number: int = 1, prefix: str = "c", hidden: list[Hidden] | None = None) -> Draw:
    """Noise as the engine gives it. hidden: gets what it hides."""

    def draw(updates: Tensor, deviations: Tensor) -> Tensor:
        if hidden is not None:
            hidden.append(Hidden.of(updates, deviations))
        clients = [f"{prefix}{k}" for k in range(len(updates))]
        return noise.draw(updates, clients=clients, round_number=number)[0] * deviations

    return draw


# ---------------------------------------------------------------- what it promises


def exact_epsilon(mu: float, delta: float) -> float:
    """Of a normal number that moves by mu deviations (Balle & Wang 2018, Theorem 8)."""

    def excess(eps: float) -> float:
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu)) - delta

    return float(optimize.brentq(excess, 0, 2e4, xtol=1e-12)) if excess(0) > 0 else 0.0


POINTS = [
    (clip, sigma, uploads)
    for clip in (0.5, 1.0)
    for sigma in (0.1, 0.5, 2.0, 5.0, 20.0)
    for uploads in (1, 2, 5, 20, 60)
]


@pytest.mark.parametrize(("clip", "sigma", "uploads"), one_in(7, POINTS))
def test_epsilon_of_a_client_meets_the_closed_form_from_above(clip: float, sigma: float, uploads: int) -> None:
    """An update may be anywhere within C of nothing, so that two of them differ by 2 C."""
    exact = exact_epsilon(2 * clip * math.sqrt(uploads) / sigma, 1e-5)
    found = Promise(clip, sigma, 1e-5, "").epsilon(uploads)
    hidden = 2 * clip * math.sqrt(uploads) / sigma <= 100
    assert exact <= found <= (exact * 1.001 + 1e-3 if hidden else exact * 1.02)


def test_noise_that_hides_nothing_has_an_epsilon_that_is_true() -> None:
    assert exact_epsilon(150, 1e-5) <= gaussian_epsilon(1 / 150, 1, 1e-5) <= 1.02 * exact_epsilon(150, 1e-5)
    assert gaussian_epsilon(1e-9, 1, 1e-5) > 1e17


def test_digits_that_are_left_out_make_no_epsilon_smaller() -> None:
    assert [rounded_up(value) for value in (0, 1.3201, 0.012301, 633.2, 12.3)] == ["0", "1.33", "0.0124", "634", "12.3"]


CASES = 8_000
EPSILON = 0.5
CLAIMED = float(stats.norm.cdf(0.5 - EPSILON) - math.exp(EPSILON) * stats.norm.cdf(-0.5 - EPSILON))  # delta at mu = 1


def found_delta(draw: Draw) -> tuple[float, float]:
    """Play against a client with the longest update either way: delta at EPSILON that is seen, and its error."""
    worst = [sent_of(hand.rows(*[(pole, 0.0)] * CASES), draw)[:, 0] for pole in (50.0, -50.0)]
    threshold = SIGMA**2 * EPSILON / (2 * CLIP)  # where one is exp(epsilon) times as likely as the other
    shares = [float((one > threshold).double().mean()) for one in worst]
    variance = sum(
        weight**2 * share * (1 - share) for weight, share in zip((1, math.exp(EPSILON)), shares, strict=True)
    )
    return shares[0] - math.exp(EPSILON) * shares[1], math.sqrt(variance / CASES)


def test_whoever_tells_two_clients_apart_does_so_as_often_as_promised_and_no_more() -> None:
    found, error = found_delta(secret(UploadNoise(bytes(32))))
    assert abs(found - CLAIMED) < 4 * error
    assert exact_epsilon(2 * CLIP / SIGMA, CLAIMED) == pytest.approx(EPSILON, abs=1e-6)


def test_a_bug_that_halves_the_noise_is_caught() -> None:
    draw = secret(UploadNoise(bytes(32)))
    found, error = found_delta(lambda updates, deviations: draw(updates, deviations) / 2)
    assert found > CLAIMED + 10 * error


def test_an_update_is_cut_before_it_is_hidden() -> None:
    rows = hand.rows((50.0, 0.0), (-50.0, 0.0))
    assert sent_of(rows, lambda updates, deviations: torch.zeros_like(updates))[:, 0].tolist() == [CLIP, -CLIP]


# ---------------------------------------------------------------- the noise


def test_each_number_that_is_sent_has_noise_of_deviation_sigma_and_no_other_number_has() -> None:
    sent = sent_of(hand.rows(*[(0.0, 0.0)] * 10_000), secret(UploadNoise(bytes(32))))
    for column in range(2):
        assert float(sent[:, column].std()) == pytest.approx(SIGMA, rel=0.03)
        assert abs(float(sent[:, column].mean())) < 0.06
    assert abs(float((sent[:, 0] * sent[:, 1]).mean())) < 0.12
    assert not sent[:, 2:].any()


def test_the_same_release_has_the_same_noise_and_any_other_has_other_noise() -> None:
    noise, rows = UploadNoise(), hand.rows((1.0, 2.0))
    first = sent_of(rows, secret(noise))
    assert torch.equal(first, sent_of(rows, secret(noise)))
    others = [
        sent_of(hand.rows((1.0, 2.000001)), secret(noise)),
        sent_of(rows, secret(noise, number=2)),
        sent_of(rows, secret(noise, prefix="d")),
        sent_of(rows, secret(UploadNoise())),
    ]
    for other in others:
        assert float((other - first)[:, :2].abs().min()) > 1e-3


def test_without_a_key_secret_noise_is_refused() -> None:
    with pytest.raises(MethodError, match="there is no secret key here"):
        sent_of(hand.rows((1.0, 2.0)), None)


def nothing(updates: Tensor, deviations: Tensor) -> Tensor:
    return torch.zeros_like(updates)


def test_a_long_row_is_cut_to_its_limit_to_the_last_digits() -> None:
    """The difference of two nearly equal long rows has few digits left."""
    given = torch.tensor([[0.5, -0.25]]).repeat(3, 1)
    long = torch.tensor([[1e6, 1e6], [3e30, -1.0], [-7e5, 2.0]])
    rows = torch.zeros(3, hand.LAYOUT.size)
    rows[:, :2] = long
    start = torch.zeros_like(rows)
    start[:, :2] = given
    sent = sent_of(rows, nothing, given=start)
    lengths = (sent - start)[:, :2].double().norm(dim=1)
    assert float(lengths.max()) <= CLIP * (1 + 1e-6)
    assert float(lengths[0]) == pytest.approx(CLIP, abs=1e-6)


def test_a_row_that_is_not_finite_is_sent_as_it_came() -> None:
    rows = hand.rows((math.nan, 1.0), (math.inf, 1.0), (0.0, 0.5))
    assert hand.pairs(sent_of(rows, nothing)) == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.5]]


# ---------------------------------------------------------------- signal to noise


def test_the_ratio_is_that_of_the_mean_update_to_the_noise_on_it() -> None:
    """Updates (0.6, 0) and (0, 0.8) have a sum of length 1; noise of 0.25 on four numbers one of length 0.5."""
    noise, hidden = UploadNoise(), list[Hidden]()
    assert signal_to_noise(hidden) is None
    sent_of(hand.rows((0.6, 0.0), (0.0, 0.8)), secret(noise, hidden=hidden), sigma=0.25)
    assert signal_to_noise(hidden) == pytest.approx(2.0)
    hidden.clear()
    sent_of(hand.rows((30.0, 0.0)), secret(noise, hidden=hidden), sigma=0.5)  # cut to 1; noise on two numbers
    assert signal_to_noise(hidden) == pytest.approx(1 / math.sqrt(0.5))


def test_clients_of_several_passes_are_one_round() -> None:
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 2)))
    whole, parts = list[Hidden](), list[Hidden]()
    sent_of(hand.rows(*rows.tolist()), secret(UploadNoise(), hidden=whole))
    for some in (rows[:2], rows[2:]):
        sent_of(hand.rows(*some.tolist()), secret(UploadNoise(), hidden=parts))
    assert (len(whole), len(parts)) == (1, 2)
    assert signal_to_noise(parts) == pytest.approx(signal_to_noise(whole))


# ---------------------------------------------------------------- the account


def account(folder: Path) -> Uploads:
    return Uploads(folder, 1.0, 1e-5)


def marks(*clients: str, number: int = 1, key: bytes = bytes(32), update: float = 0.0) -> dict[str, str]:
    """The marks of these clients' uploads in a round."""
    rows = torch.full((len(clients), 2), update)
    return UploadNoise(key).draw(rows, clients=clients, round_number=number)[1]


def test_the_client_that_sends_most_counts(tmp_path: Path) -> None:
    uploads = account(tmp_path)
    for number, clients in enumerate((["a", "b"], ["b", "c"], ["b"]), 1):
        uploads.book(marks(*clients, number=number), number)
    assert (uploads.most, account(tmp_path).most) == (3, 3)
    assert uploads.epsilon() == gaussian_epsilon(1.0, 3, 1e-5)
    assert account(tmp_path / "nothing").epsilon() == 0


def test_an_upload_again_is_free_with_its_key_and_its_update_alone(tmp_path: Path) -> None:
    for _ in range(3):
        account(tmp_path).book(marks("a"), 1)
    assert account(tmp_path).most == 1
    account(tmp_path).book(marks("a", key=bytes([1] * 32)), 1)
    assert account(tmp_path).most == 2
    account(tmp_path).book(marks("a", update=1e-7), 1)
    assert account(tmp_path).most == 3, "the server sent something else"
    assert len((tmp_path / FILE).read_text().splitlines()) == 3
    assert bytes(32).hex()[:16] not in (tmp_path / FILE).read_text()


def test_half_a_line_counts_for_nothing_and_a_damaged_account_is_refused(tmp_path: Path) -> None:
    account(tmp_path).book(marks("a"), 1)
    whole = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(whole + whole[:20])
    assert account(tmp_path).most == 1
    (tmp_path / FILE).write_text("{" + whole)
    with pytest.raises(StoreError, match="can no longer be counted"):
        _ = account(tmp_path).most
    assert [*json.loads(whole)["clients"]] == ["a"]
