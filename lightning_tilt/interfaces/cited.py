"""What a class stands on, as data: the one place where a loss, a reward or a model says which papers it is from."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import nn

__all__ = ["Cited", "sources_of", "sources_of_run"]


class Cited:
    """What should be cited where it is used; `lightning_tilt.citation` collects it.

    Attributes:
        sources: keys of entries in `lightning_tilt/references.bib`, or whole BibTeX entries, `@misc{...}`; a subclass
            that says nothing has those of its base.
    """

    sources: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def sources_with(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The sources of an object that a configuration makes; more than `sources` where an option is from a paper.

        Args:
            arguments: of the constructor, as a configuration has them; those that are left out have their defaults.
        """
        return cls.sources

    def own_sources(self) -> tuple[str, ...]:
        """The same of an object that has been made."""
        return self.sources


def sources_of(parts: Iterable[object]) -> list[str]:
    """The sources of those that have some, objects or classes (made with their defaults), each once, in order.

    Example:
        >>> class Mine(Cited):
        ...     sources = ("havens2025adjoint", "neal2003slice")
        >>> sources_of([Mine(), 3, Mine])
        ['havens2025adjoint', 'neal2003slice']
    """
    found = list[str]()
    for part in parts:
        if isinstance(part, type):
            found += part.sources_with({}) if issubclass(part, Cited) else ()
        elif isinstance(part, Cited):
            found += part.own_sources()
    return list(dict.fromkeys(found))


def sources_of_run(module: nn.Module, callbacks: Iterable[object]) -> list[str]:
    """The sources of a run, each once: of its module, its sampler, and what judges it.

    Args:
        module: what is trained, a loss and host in one, with its model and reward.
        callbacks: the Trainer's; what they hold counts too, made or yet to be made: further rewards, an embedding.
    """
    held = (source for callback in callbacks for value in (callback, *vars(callback).values()) for source in _in(value))
    return list(dict.fromkeys([*sources_of(module.modules()), *held]))


def _in(value: object) -> Iterator[str]:
    if isinstance(value, partial):  # what a configuration says of an object that is made later
        kinds = [part for part in (value.func, *value.args) if isinstance(part, type) and issubclass(part, Cited)]
        yield from (source for kind in kinds for source in kind.sources_with(value.keywords))
    elif isinstance(value, (Mapping, list, tuple)):
        yield from (s for part in (value.values() if isinstance(value, Mapping) else value) for s in _in(part))
    else:
        yield from sources_of(value.modules() if isinstance(value, nn.Module) else [value])
