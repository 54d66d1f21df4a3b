"""Private gradients: those of single examples, cut to a length, summed, and noise added.

g = (sum over the sample of g_i min(1, C / |g_i|) + z C N(0, 1)) / B, with g_i the gradient of example i's own mean loss
per labelled token, C the clip, z the noise multiplier, and B the examples of a step in the mean.
Source: Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1, with B instead of the sample's size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapters, norms
from fedmira.data.batches import Batch
from fedmira.errors import MethodError
from fedmira.model.base.load import Base
from fedmira.model.packed.lora import Dropout
from fedmira.model.passes import gradients
from fedmira.privacy.noise import gaussian, uniform

NUMBERS_AT_ONCE = 2**24  # of the rows of a pass, one row for each example: 64 MiB in float32


@dataclass(frozen=True, eq=False)
class PrivateSteps:
    """How the gradients of one local phase are made private; it is paid for.

    gradients: of one step, at most; expected: client -> examples of a step in the mean; mark: names the phase.
    """

    clip: float
    noise_multiplier: float
    gradients: int
    expected: Mapping[str, int]
    key: bytes
    mark: str

    def gradient(
        self,
        base: Base,
        adapters: Adapters,
        batches: Sequence[Batch],
        *,
        clients: Sequence[str],
        into: Tensor,
        trained: Tensor,
        step: int,
        number: int,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        """Write the private gradients of `clients` to `into` [S, P]; the batches together are the step's sample.

        number: of this gradient in the step, from 0 on. trained: columns bool [P]. Raises MethodError if the step asks
        for more gradients than are paid for.
        """
        if number >= self.gradients:
            raise MethodError(
                f"a step asks for more gradients than the {self.gradients} that privacy paid for: let the method's "
                "Regime.gradients say how many it takes at most"
            )
        purpose = f"{self.mark}/{step}/{number}"
        sums = torch.zeros(into.shape, dtype=torch.float64, device=into.device)
        for part, batch in enumerate(batches):
            where = f"dropout/{purpose}/{part}"
            self._add_clipped(base, adapters, batch, sums, trained, dropout, where, recompute)
        drawn = [gaussian(into.shape[1], key=self.key, purpose=f"noise/{purpose}/{client}") for client in clients]
        noise = torch.stack([torch.from_numpy(one) for one in drawn]).to(into.device)
        noise = adapters.with_rows(noise.mul_(trained)).mask_().rows
        expected = torch.tensor([[self.expected[client]] for client in clients], device=into.device)
        into.copy_((sums + self.noise_multiplier * self.clip * noise) / expected)

    def _add_clipped(
        self,
        base: Base,
        adapters: Adapters,
        batch: Batch,
        sums: Tensor,
        trained: Tensor,
        dropout: float,
        where: str,
        recompute: bool,
    ) -> None:
        """Add the clipped gradients of a batch's examples to `sums` [S, P], each example a client of its own."""
        present = batch.lengths.nonzero()
        for number, some in enumerate(torch.split(present, max(1, NUMBERS_AT_ONCE // adapters.layout.size))):
            owner, place = some.unbind(dim=1)
            lengths = batch.lengths[owner, place]
            width = int(lengths.max()) if len(lengths) else 0
            if not width:
                continue
            alone = Batch(
                batch.ids[owner, place, None, :width], batch.labels[owner, place, None, :width], lengths[:, None]
            )
            masks = None
            if dropout:  # from the secret key: masks known by an example's place would depend on the others
                drawn = uniform(len(owner), key=self.key, purpose=f"{where}/{number}")
                masks = Dropout(dropout, [int(one * 2**40) for one in drawn])
            each = torch.zeros(len(owner), sums.shape[1], dtype=adapters.rows.dtype, device=sums.device)
            gradients(base, adapters.take(owner), alone, into=each, dropout=masks, recompute=recompute)
            each.mul_(trained)
            long = norms(each)
            each[~long.isfinite()] = 0  # 0 x infinity would be nan, in a sum that is released
            shares = self.clip / long.nan_to_num(posinf=0.0).clamp(min=self.clip)
            sums.index_add_(0, owner.to(sums.device), each.double().mul_(shares[:, None]))
