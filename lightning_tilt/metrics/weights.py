"""How good weights are: effective sample size, from either side, and log Z.

With w = Z p*/q on samples of the law q of the tuned model (theory: `lightning_tilt.identities`)

    reverse     ESS = (E_q w)^2 / E_q[w^2]  ~  (sum w)^2 / (n sum w^2)                      samples of q
    forward     ESS = Z / E_p*[w]           ~  [ mean w ]^-1 [ mean 1/w ]^-1                samples of p*

both in (0, 1], and 1 where all weights are equal.  E_q[w^2] = Z E_p*[w] and E_p*[1/w] = 1/Z: they estimate the same
number.  What differs is where they look.  Samples of q never meet a mode that q has lost, and the reverse one stays
high; samples of p* find w = Z p*/q huge there, and the forward one falls.  Both depend on few large weights and are
biased upwards when n is small, so n stands beside them.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_tilt.identities import ess, log_partition

__all__ = ["EffectiveSampleSize", "LogPartition", "LogWeights", "forward_ess"]


def forward_ess(log_w: Tensor) -> float:
    """Effective sample size from the log weights (n,) at samples of p*, as a fraction: 1 / (mean w  mean 1/w).

    A constant in log w does not matter.

    Example:
        >>> forward_ess(torch.zeros(5)), round(forward_ess(torch.tensor([0.0, 2.0]).log1p()), 3)
        (1.0, 0.75)
    """
    log_w = log_w.double()
    log_n = math.log(log_w.numel())
    fraction = torch.exp(2 * log_n - torch.logsumexp(log_w, 0) - torch.logsumexp(-log_w, 0))
    return float(fraction.clamp(max=1))  # above 1 only by rounding


class LogWeights(Metric):
    """What metrics of log weights share: `update` collects them, in float64 and from all processes.

    All are kept, 8 bytes each: a jackknife leaves every one of them out once.
    """

    is_differentiable = False
    full_state_update = False

    log_w: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A process without samples then sends an empty tensor of the same dtype as the others.
        self.set_dtype(torch.float64)
        self.add_state("log_w", [], dist_reduce_fx="cat")

    def update(self, log_w: Tensor) -> None:
        """Add log weights (n,)."""
        if log_w.ndim != 1:
            raise ValueError(f"log weights must be (n,), not {tuple(log_w.shape)}")
        assert isinstance(self.log_w, list)
        self.log_w.append(log_w.detach().double())


class EffectiveSampleSize(LogWeights):
    """ESS as a fraction of n, as {"reverse_ess" or "forward_ess", "n"}.

    Args:
        direction: "reverse" if the samples are the model's, "forward" if they are the target's.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: for another direction.

    Example:
        >>> metric = EffectiveSampleSize()
        >>> metric.update(torch.tensor([0.0, 0.0]))
        >>> metric.update(torch.tensor([-1e9, -1e9]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'reverse_ess': 0.5, 'n': 4}
    """

    higher_is_better = True

    def __init__(self, direction: Literal["reverse", "forward"] = "reverse", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if direction not in ("reverse", "forward"):
            raise ValueError(f"direction must be 'reverse' (samples of the model) or 'forward', not {direction!r}")
        self.direction = direction

    def compute(self) -> dict[str, Tensor]:
        """The fraction under its name, and how many weights it rests on."""
        log_w = dim_zero_cat(self.log_w)
        value = ess(log_w) if self.direction == "reverse" else forward_ess(log_w)
        name = f"{self.direction}_ess"
        return {name: torch.tensor(value, device=log_w.device), "n": torch.tensor(len(log_w), device=log_w.device)}


class LogPartition(LogWeights):
    """Log Z = log E[w] from the log weights of independent paths, jackknifed, as {"mean", "se", "n"}.

    Example:
        >>> metric = LogPartition()
        >>> metric.update(torch.full((3,), 2.0))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'mean': 2.0, 'se': 0.0, 'n': 3}
    """

    def compute(self) -> dict[str, Tensor]:
        """Log Z, its standard error, and how many weights they rest on."""
        log_w = dim_zero_cat(self.log_w)
        return {k: torch.tensor(v, device=log_w.device) for k, v in log_partition(log_w).as_dict().items()}
