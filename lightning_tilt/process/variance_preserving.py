"""The variance-preserving process of DDPM and SD 1.5, on diffusers' discrete schedules.

    alpha_n = sqrt(alphas_cumprod[n]),   beta = sqrt(1 - alpha^2),   n = 0 (cleanest) .. N - 1 (noisiest)

Node `n` sits at `t = 1 - (n + 1)/N`, so `t = 0` is the noisiest node and `t = 1` is clean data (alpha = 1), one node
below diffusers' cleanest.  Between the nodes alpha is linear in t; at a node the derivative is the one towards the
data, the way a step goes.

SD 1.5's noisiest node still holds a little data (alpha = .068): `X_0` and `X_1` of the memoryless chain are then not
quite independent.  `zero_terminal_snr` rescales the nodes so that alpha = 0 there (2305.08891, algorithm 1); it asks
for a model that was trained so, and for another prediction type than epsilon.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_tilt.process.base import Process

__all__ = ["BETA_SCHEDULES", "Spacing", "VariancePreserving"]

Spacing = Literal["trailing", "leading", "linspace"]
"""Where K of the N nodes lie (2305.08891, table 2); only "trailing" and "linspace" hold the noisiest node."""

# How far a time may be from a node and still be that node: float32 times are off by 6e-8.
_TOLERANCE = 1e-6


def _linear(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def _scaled_linear(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64) ** 2


def _squaredcos(start: float, end: float, n: int) -> Tensor:
    # 2102.09672, equation 17; the ends of the other schedules play no part.
    bar = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


BETA_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos,
}
"""Known schedules: (beta_start, beta_end, N) -> betas (N,) in float64."""


class VariancePreserving(Process):
    """`X_t = alpha_t X_1 + sqrt(1 - alpha_t^2) eps` on N nodes.

    Args:
        alphas_cumprod: `alpha^2` at the nodes, (N,), falling, as diffusers' schedulers hold it.
        spacing: which nodes `grid` takes.
        zero_terminal_snr: rescale the nodes so that the noisiest is pure noise.
        steps_offset: added to every node of the "leading" spacing, as in diffusers; the others ignore it.

    Raises:
        ValueError: if `alphas_cumprod` is no falling sequence in [0, 1], or `spacing` is unknown.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        spacing: Spacing = "trailing",
        zero_terminal_snr: bool = False,
        steps_offset: int = 0,
    ) -> None:
        bar = alphas_cumprod.detach().double().cpu()
        if bar.ndim != 1 or len(bar) == 0 or bar[0] > 1 or bar[-1] < 0 or not bool((bar.diff() < 0).all()):
            raise ValueError(f"alphas_cumprod must be falling, in [0, 1], of shape (N,); got shape {tuple(bar.shape)}")
        if spacing not in get_args(Spacing):
            raise ValueError(f"unknown spacing {spacing!r}; known are {', '.join(get_args(Spacing))}")
        nodes = bar.sqrt()
        if zero_terminal_snr:
            nodes = (nodes - nodes[-1]) * nodes[0] / (nodes[0] - nodes[-1])
        self.spacing: Spacing = spacing
        self.steps_offset = steps_offset
        self.num_nodes = len(nodes)
        # Entry j belongs to t = 1 - j/N: clean data first, then the nodes.
        self._table = torch.cat([torch.ones(1, dtype=torch.float64), nodes])
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def from_betas(
        cls,
        schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        *,
        spacing: Spacing = "trailing",
        zero_terminal_snr: bool = False,
        steps_offset: int = 0,
    ) -> "VariancePreserving":
        """A schedule by name; the defaults are SD 1.5's.

        Raises:
            ValueError: if `schedule` is unknown.
        """
        if schedule not in BETA_SCHEDULES:
            raise ValueError(f"unknown beta schedule {schedule!r}; known are {', '.join(BETA_SCHEDULES)}")
        betas = BETA_SCHEDULES[schedule](beta_start, beta_end, num_train_timesteps)
        bar = (1 - betas).cumprod(0)
        return cls(bar, spacing=spacing, zero_terminal_snr=zero_terminal_snr, steps_offset=steps_offset)

    @classmethod
    def from_scheduler(
        cls, config: Mapping[str, Any], *, spacing: Spacing = "trailing", zero_terminal_snr: bool | None = None
    ) -> "VariancePreserving":
        """The process of a diffusers scheduler of the DDPM family.

        The config's own `timestep_spacing` is not followed: a tilted chain starts at the noisiest node, and SD 1.5's
        "leading" spacing does not.  Pass `spacing` to have another one.

        Args:
            config: `scheduler.config`: `beta_schedule`, `beta_start`, `beta_end`, `num_train_timesteps`,
                `trained_betas`, `rescale_betas_zero_snr` and `steps_offset` are read, with diffusers' defaults.
            spacing: which nodes `grid` takes.
            zero_terminal_snr: None follows the config's `rescale_betas_zero_snr`.

        Raises:
            ValueError: if the config names an unknown beta schedule, or none.
        """
        trained = config.get("trained_betas")
        rescale = bool(config.get("rescale_betas_zero_snr")) if zero_terminal_snr is None else zero_terminal_snr
        offset = int(config.get("steps_offset") or 0)
        if trained is not None:
            bar = (1 - torch.as_tensor(trained, dtype=torch.float64)).cumprod(0)
            return cls(bar, spacing=spacing, zero_terminal_snr=rescale, steps_offset=offset)
        if "beta_schedule" not in config:
            raise ValueError(
                f"scheduler {config.get('_class_name', 'config')!r} has no beta_schedule: VariancePreserving reads "
                f"DDPM-family configs ({', '.join(BETA_SCHEDULES)}); a flow-matching one is a RectifiedFlow"
            )
        return cls.from_betas(
            config["beta_schedule"],
            config.get("beta_start", 0.0001),
            config.get("beta_end", 0.02),
            config.get("num_train_timesteps", 1000),
            spacing=spacing,
            zero_terminal_snr=rescale,
            steps_offset=offset,
        )

    def __repr__(self) -> str:
        return f"VariancePreserving(N={self.num_nodes}, alpha_0={self._table[-1]:.4g}, spacing={self.spacing!r})"

    def alpha(self, t: Tensor) -> Tensor:
        """Linear in t between the nodes."""
        table, place, j = self._locate(t)
        return (table[j] + (place - j) * (table[j + 1] - table[j])).to(t.dtype)

    def beta(self, t: Tensor) -> Tensor:
        """`sqrt(1 - alpha^2)`."""
        alpha = self.alpha(t.double())
        return ((1 - alpha) * (1 + alpha)).clamp(min=0).sqrt().to(t.dtype)

    def d_alpha(self, t: Tensor) -> Tensor:
        """The slope towards the data."""
        table, _, j = self._locate(t)
        return (self.num_nodes * (table[j] - table[j + 1])).to(t.dtype)

    def d_beta(self, t: Tensor) -> Tensor:
        """`-alpha alpha'/beta`, infinite at t = 1."""
        t64 = t.double()
        return (-self.alpha(t64) * self.d_alpha(t64) / self.beta(t64)).to(t.dtype)

    def eta(self, t: Tensor) -> Tensor:
        """`kappa`: what `beta (kappa beta - beta')` is where `alpha^2 + beta^2 = 1`, and finite at t = 1."""
        return self.kappa(t)

    def grid(self, steps: int) -> Tensor:
        """Times of `steps` nodes by `spacing`, then 1.0; (steps + 1,) float64."""
        n = self.num_nodes
        if not 1 <= steps <= n:
            raise ValueError(f"steps must lie in 1 .. {n} (the nodes of the schedule), not {steps}")
        k = torch.arange(steps, dtype=torch.float64)
        if self.spacing == "trailing":
            nodes = (n * (steps - k) / steps).round() - 1
        elif self.spacing == "leading":
            nodes = (steps - 1 - k) * (n // steps) + self.steps_offset
        else:
            nodes = ((n - 1) * (steps - 1 - k) / (steps - 1)).round() if steps > 1 else k + n - 1
        if nodes[0] > n - 1:
            raise ValueError(f"{steps} leading steps with offset {self.steps_offset} pass the last of {n} nodes")
        return torch.cat([1 - (nodes + 1) / n, torch.ones(1, dtype=torch.float64)])

    def node(self, t: Tensor) -> Tensor:
        """The nearest node, of which t = 1 is none."""
        place = ((1 - t.double()) * self.num_nodes).round().clamp(min=1)
        return 1 - place / self.num_nodes

    def timestep(self, t: Tensor) -> Tensor:
        """The integer node of each time, long.

        Raises:
            ValueError: for a time that is no node (further than 1e-6); t = 1 is clean data and no node either.
        """
        node = (1 - t.double()) * self.num_nodes - 1
        nearest = node.round()
        if bool(((node - nearest).abs() > _TOLERANCE * self.num_nodes).any()) or bool((nearest < 0).any()):
            raise ValueError(
                f"times {t.flatten()[:4].tolist()} are no nodes of a schedule of {self.num_nodes}: take them from "
                "grid(steps), in float64, without the last"
            )
        return nearest.long()

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table on t's device, the place of t in it, and the left end j of the interval towards the data."""
        if t.device not in self._tables:
            # Kept for all later calls, so not a tensor of inference mode.
            with torch.inference_mode(False):
                self._tables[t.device] = self._table.to(t.device)
        place = (1 - t.double()) * self.num_nodes
        if t.dtype != torch.float64:
            # Coarse times mean the node next to them.
            nearest = place.round()
            place = torch.where((place - nearest).abs() <= _TOLERANCE * self.num_nodes, nearest, place)
        j = (place - _TOLERANCE * self.num_nodes).ceil().long() - 1
        return self._tables[t.device], place, j.clamp(0, self.num_nodes - 1)
