"""The mix of two unbiased targets that has the least variance, learnt on the run in bins of time.

    y = y_0 + rho (y_1 - y_0),      E[y_0 | x] = E[y_1 | x] = e(x)

    E|y - e|^2 is least at      rho* = E[(e - y_0).(y_1 - y_0)] / E|y_1 - y_0|^2

With the model's prediction in place of e.  A bin that has not been seen has rho = 1.
"""

import torch
from torch import Tensor, nn

from lightning_tilt.losses.times import Times

__all__ = ["LeastVariance"]

_KEPT = 0.99  # of the running means


class LeastVariance(nn.Module):
    """Running means of numerator and denominator of rho*; they are its state.

    Args:
        times: whose bins are used.
    """

    moments: Tensor
    batch: Tensor

    def __init__(self, times: Times) -> None:
        super().__init__()
        self._times = [times]
        self.register_buffer("moments", torch.zeros(2, times.bins, dtype=torch.float64))
        self.register_buffer("batch", torch.zeros(3, times.bins, dtype=torch.float64), persistent=False)

    def forward(self, t: Tensor, most: Tensor) -> Tensor:
        """The rho of the times t (P,), between 0 and `most` (P,): (P,), float64."""
        return torch.minimum(self.rho().double().cpu()[self._times[0].bin(t)].to(most).clamp(min=0), most)

    def rho(self) -> Tensor:
        """The rho* of each bin, (bins,); 1 where nothing has been seen."""
        top, bottom = self.moments
        return torch.where(bottom > 0, top / bottom.where(bottom > 0, 1.0), 1.0)

    def forget_batch(self) -> None:
        """Begin the sums of a new batch."""
        self.batch.zero_()

    @torch.no_grad()
    def see(self, t: Tensor, error: Tensor, apart: Tensor, weight: Tensor) -> None:
        """Add points to the sums of the batch.

        Args:
            t: times, (P,).
            error: `e - y_0`, (P, *shape).
            apart: `y_1 - y_0`, (P, *shape).
            weight: of the points, (P,).
        """
        parts = torch.stack([(error * apart).flatten(1).sum(1), (apart**2).flatten(1).sum(1), torch.ones_like(weight)])
        self.batch.index_add_(1, self._times[0].bin(t).to(self.batch.device), (parts * weight).to(self.batch))

    @torch.no_grad()
    def learn(self, sums: Tensor) -> None:
        """Take sums (3, bins), added over the processes, into the running means."""
        *fresh, counts = sums.to(self.moments)
        means = torch.stack(fresh) / counts.where(counts > 0, 1.0)
        kept = torch.where(self.moments[1] > 0, _KEPT * self.moments + (1 - _KEPT) * means, means)
        self.moments.copy_(torch.where((counts > 0) & means.isfinite().all(0), kept, self.moments))
