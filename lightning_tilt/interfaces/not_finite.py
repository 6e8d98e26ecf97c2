"""Numbers that are not finite: what becomes of them, decided by all processes together.

A NaN or an infinity may come from the reward, its gradient, a state, an adjoint, the loss or its gradient.  What was
found is said with optimiser step, rank and prompts, and one policy serves all of it:

    stop    every process raises the same error, which names all that was found
    skip    samples get weight 0; without one good sample on any process, or with a loss or a gradient that is not
            finite, there is no update, neither by momentum nor by weight decay

A process that raised alone would leave the others waiting for it: so each counts what it has found, the counts are
added, and all of them draw the same conclusion.  A rollout whose caller brings a list writes into it what it finds, and
the caller judges; without a list the rollout judges by itself.
"""

import warnings
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tilt.condition import quoted
from lightning_tilt.trajectory import Trajectory

if TYPE_CHECKING:
    from lightning_tilt.interfaces.loss import Loss

__all__ = ["MEND", "BadPolicy", "UpdateGuard", "agree", "gathered", "judge", "judge_together", "named", "where_of"]

BadPolicy = Literal["stop", "skip"]
"""What to do about a number that is not finite."""

MEND = "Mend the reward, or pass sampler.on_bad_reward: skip."
"""How a message about a number that is not finite ends."""


def gathered(value: Any) -> list[Any]:
    """The value of every process, in their order; all of them must ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(host: Any, found: list[str], mend: str, running: bool = False) -> bool:
    """Raise on every process if one of them has found something; all of them must ask.

    Args:
        host: whose Trainer knows the processes.
        found: what this process has found.
        mend: what to do about it.
        running: whether this process will ask again though the others may have nothing left to do.

    Returns:
        Whether any process is `running`.

    Raises:
        FloatingPointError: with the messages of all processes.
    """
    counts = torch.tensor([float(len(found)), float(running)], device=host.trainer.strategy.root_device)
    bad, others = cast(Tensor, host.trainer.strategy.reduce(counts, reduce_op="sum")).tolist()
    if bad:
        _stop([message for messages in gathered(found) for message in messages], mend)
    return bool(others)


def judge(policy: BadPolicy, found: list[str], bad: list[str] | None = None) -> None:
    """What a process by itself makes of samples that are not finite: an error, or a warning.

    Args:
        policy: "stop" or "skip".
        found: what is said of them.
        bad: takes it, and the caller judges; None: judged here.

    Raises:
        FloatingPointError: under "stop", if anything was found and nobody else judges.
    """
    if bad is not None:
        bad += found
        return
    if found and policy == "stop":
        _stop(found, MEND)
    for message in found:
        warnings.warn(f"{message}; they are left out.", stacklevel=3)


def judge_together(host: Any, policy: BadPolicy, found: list[str], running: bool = False) -> bool:
    """The same of all processes, each with what it has found: see `agree`."""
    if policy == "stop":
        return agree(host, found, MEND, running)
    judge(policy, found)
    return False


def _stop(found: list[str], mend: str) -> NoReturn:
    raise FloatingPointError("; ".join(found) + ". " + mend)


def named(samples: list[int], prompts: list[str] | None) -> str:
    """The first of some samples by their prompts, or by their numbers where there are none."""
    names = sorted({quoted(prompts[i]) for i in samples}) if prompts else [f"sample {i}" for i in samples]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def where_of(host: Any) -> str:
    """Optimiser step and rank, as messages name them; nothing without a Trainer."""
    trainer = host._trainer
    return "" if trainer is None else f" (optimiser step {trainer.global_step}, rank {trainer.global_rank})"


class UpdateGuard:
    """Watches the losses of a window of batches, and decides whether there is an update at its end."""

    def __init__(self) -> None:
        self._good = 0.0
        self._losses: list[tuple[Tensor, Trajectory]] = []

    def see(self, loss: Tensor, trajectory: Trajectory, good: float) -> None:
        """A batch of the window: its loss, its rollout, and its good samples, a mean over the processes."""
        self._good += good
        self._losses.append((loss.detach(), trajectory))

    def refuses(self, host: "Loss", norm: Tensor | None) -> bool:
        """Whether there is to be no update; forgets the window. All processes must ask.

        Args:
            host: whose sampler has the policy, and counts the updates that were skipped.
            norm: of the gradient, the same on all processes; None: there is no gradient.

        Raises:
            FloatingPointError: under "stop", if a loss of any process, or the gradient, is not finite.
        """
        losses, good = self._losses, self._good
        self._losses, self._good = [], 0.0
        if norm is None:
            return False
        bad = sum(((~torch.isfinite(loss)).double() for loss, _ in losses), torch.zeros(()).double().to(norm.device))
        flags = torch.stack([bad, (~torch.isfinite(norm)).double()])
        # Without other processes nothing is exchanged; with them, two numbers an update.
        bad_losses, bad_norms = cast(Tensor, host.trainer.strategy.reduce(flags, reduce_op="sum")).tolist()
        if bad_losses == 0 and bad_norms == 0:
            host.sampler.skipped += int(good == 0)
            return good == 0
        if host.trainer.precision == "16-mixed" and bad_losses == 0:
            # The gradient of a scaled loss overflows now and then: the scaler makes no update, and scales less.
            host.sampler.skipped += 1
            return False
        if host.sampler.on_bad_reward == "stop":
            agree(
                host,
                _complaints(host, losses, bad_losses > 0),
                "Lower lam or the learning rate, or pass sampler.on_bad_reward: skip, which makes no such update.",
            )
        host.sampler.skipped += 1
        return True


def _complaints(host: "Loss", losses: list[tuple[Tensor, Trajectory]], of_loss: bool) -> list[str]:
    """What this process has to say of a window without an update: nothing, if the loss that is bad is another's."""
    blamed = [path for loss, path in losses if not of_loss or not bool(torch.isfinite(loss))]
    if not blamed:
        return []
    what = "the loss" if of_loss else "the gradient of the loss, a mean over all processes,"
    batches = "; ".join(f"rollout {p.rollout} with {named(list(range(len(p))), p.prompts)}" for p in blamed)
    return [f"{what} is not finite{where_of(host)}: {batches}"]
