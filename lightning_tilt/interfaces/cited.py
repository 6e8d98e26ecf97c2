"""What a class stands on, as data: the one place where a loss, a reward or a model says which papers it is from."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

__all__ = ["Cited", "sources_of"]


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
