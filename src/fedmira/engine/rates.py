"""The learning rate of every local step: transformers' schedules, over a whole run, its rounds, or each local phase.

A client's place in a schedule depends on the round and on its own number of steps, never on how often it was sampled.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]
Over = Literal["run", "rounds", "steps"]


@dataclass(frozen=True)
class Schedule:
    """By what the learning rate is multiplied in each local step.

    kind: of transformers. over: what its steps are: all local steps of a client in `rounds` rounds (run), the rounds
    themselves, or the local steps of one phase. warmup: how many of these it rises over, or below 1 their share.
    min_lr, min_lr_rate: where cosine_with_min_lr ends, one of the two.
    """

    kind: Kind = "constant"
    over: Over = "run"
    rounds: int = 1
    warmup: float = 0
    min_lr: float | None = None
    min_lr_rate: float | None = None

    @property
    def is_constant(self) -> bool:
        return self.kind == "constant"

    @property
    def depends_on_rounds(self) -> bool:
        """Would the same step have another learning rate in a run of more rounds?"""
        decays = self.kind not in ("constant", "constant_with_warmup")
        return self.over != "steps" and (decays or 0 < self.warmup < 1)

    def at(self, peak: float, *, round_number: int, step: int, steps: int) -> float:
        """Return the learning rate of a client's local step, counted from 0, of `steps` in this round.

        peak x f(i, T): run: i = (round - 1) steps + step, T = rounds x steps;  steps: i = step, T = steps;
        rounds: i = round - 1, T = rounds. f is transformers' factor of step i of T. Over rounds with a warm-up of w
        it is f(i + 1, T + 1) with w + 1: f(0) is 0, and a whole round would be trained for nothing.
        """
        if self.is_constant:
            return peak
        done = min(round_number, self.rounds) - 1
        if self.over == "steps":
            index, total = step, steps
        elif self.over == "run":
            index, total = done * steps + step, self.rounds * steps
        else:
            index, total = done, self.rounds
        warmup = math.ceil(total * self.warmup) if self.warmup < 1 else int(self.warmup)
        if self.over == "rounds" and warmup:
            index, total, warmup = index + 1, total + 1, warmup + 1
        return peak * _factors(self, peak, total, warmup)(index)

    def mean(self, peak: float, *, round_number: int, steps: int) -> float:
        """Return the mean over a client's local steps of a round."""
        if self.is_constant or self.over == "rounds":
            return self.at(peak, round_number=round_number, step=0, steps=steps)
        return math.fsum(
            self.at(peak, round_number=round_number, step=step, steps=steps) for step in range(steps)
        ) / max(steps, 1)

    def of_round(self, peak: float, round_number: int) -> float:
        """Return the rate that all clients have in a round, or `peak` where it changes within the round."""
        return self.at(peak, round_number=round_number, step=0, steps=1) if self.over == "rounds" else peak

    def alone(self) -> "Schedule":
        """Return the schedule of what is trained after the last round, where one over the rounds has ended."""
        return self if self.over == "steps" else CONSTANT


CONSTANT = Schedule()


def by_client(rates: Sequence[float], device: torch.device) -> float | Tensor:
    """Return the rate that all clients of a pass share, or where they differ one for each row: float64 [S, 1]."""
    if len(set(rates)) == 1:
        return rates[0]
    return torch.tensor(rates, dtype=torch.float64, device=device)[:, None]


@functools.lru_cache(maxsize=4096)
def _factors(schedule: Schedule, peak: float, total: int, warmup: int) -> Callable[[int], float]:
    """Return transformers' own factor as a function of the step. The optimizer is never stepped: it holds the peak."""
    from transformers import get_scheduler

    limits = {"min_lr": schedule.min_lr, "min_lr_rate": schedule.min_lr_rate}
    scheduler = get_scheduler(
        schedule.kind,
        torch.optim.SGD([torch.zeros(1)], lr=peak),
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs={name: value for name, value in limits.items() if value is not None},
    )
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR), "every kind here multiplies the rate by a factor"
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
