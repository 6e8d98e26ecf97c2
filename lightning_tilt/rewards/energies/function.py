"""An energy of the user's own: any differentiable function of a batch of states that returns one number a state."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards.density import Density

__all__ = ["FunctionDensity", "function_named"]

Energy = Callable[[Tensor], Tensor]


class FunctionDensity(Density):
    """`exp(-E)` of a function `E`: (B, *state_shape) -> (B,).

    In `my_energies.py`, in the working directory or anywhere on Python's path:

        import torch

        def ring(x):  # (B, 2) -> (B,): a ring of radius 3
            return 10 * (x.norm(dim=1) - 3) ** 2

    and in the configuration:

        reward:
          class_path: FunctionDensity
          init_args:
            function: my_energies.ring
            log_z: 2.3576

    Args:
        function: `E`, a callable or the dotted name of one, `module.function`. A network is frozen. Give the name, or
            a function that a module defines, where the reward is pickled or a checkpoint is to be loaded again.
        log_z: log of the integral of exp(-E), if it is known: reports compare with it.
        particles: (n, d) where the energy does not change under relabelling, rotation, reflection and translation.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the name is not `module.function`, or the module or the function cannot be found.
        TypeError: if what is found cannot be called.

    Example:
        >>> import torch
        >>> FunctionDensity(lambda x: x.square().sum(1) / 2).energy(torch.ones(3, 2))
        tensor([1., 1., 1.])
    """

    def __init__(
        self,
        function: str | Energy,
        log_z: float | None = None,
        particles: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        found = function_named(function) if isinstance(function, str) else function
        if not callable(found):
            raise TypeError(f"FunctionDensity: {function!r} is a {type(found).__name__}, which cannot be called")
        self.function: Energy = Frozen(found) if isinstance(found, nn.Module) else found
        self.log_z = log_z
        self.particles = particles

    def energy(self, x: Tensor) -> Tensor:
        """`E(x)` of (B, *state_shape): (B,).

        Raises:
            ValueError: if the function returns another shape.
        """
        e = self.function(x)
        if e.shape != x.shape[:1]:
            raise ValueError(
                f"FunctionDensity: the energy of {len(x)} states must have the shape ({len(x)},), one number a state, "
                f"not {tuple(e.shape)}: sum over all axes but the first"
            )
        return e


def function_named(name: str) -> Any:
    """What the dotted name `module.function` means.

    Raises:
        ValueError: if there is no such module, or nothing of that name in it.
    """
    module_name, _, attribute = name.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"FunctionDensity: {name!r} is no dotted name: give module.function, as my_energies.ring")
    if not _exists(module_name):
        raise ValueError(
            f"FunctionDensity: {name}: there is no module {module_name!r}; it is looked for in the working directory "
            "and on Python's path"
        )
    members = vars(import_module(module_name))
    if attribute not in members:
        near = get_close_matches(attribute, members, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"FunctionDensity: {name}: the module {module_name} has no {attribute!r}{hint}")
    return members[attribute]


def _exists(module_name: str) -> bool:
    """Whether the module can be found; an error inside it is its own and comes when it is imported."""
    parts = module_name.split(".")
    for depth in range(1, len(parts) + 1):
        try:
            if find_spec(".".join(parts[:depth])) is None:
                return False
        except ModuleNotFoundError:  # the parent is a module, not a package
            return False
    return True
