"""What a class stands on, as data: the one place where a loss, a reward or a model says which papers it is from."""

from collections.abc import Iterable
from typing import ClassVar

__all__ = ["Cited", "sources_of"]


class Cited:
    """What should be cited where it is used; `lightning_tilt.citation` collects it.

    Attributes:
        sources: keys of entries in `lightning_tilt/references.bib`, or whole BibTeX entries, `@misc{...}`; a subclass
            that says nothing has those of its base.
    """

    sources: ClassVar[tuple[str, ...]] = ()


def sources_of(parts: Iterable[object]) -> list[str]:
    """The sources of those that have some, objects or classes, each once, in order.

    Example:
        >>> class Mine(Cited):
        ...     sources = ("havens2025adjoint", "neal2003slice")
        >>> sources_of([Mine(), 3, Mine])
        ['havens2025adjoint', 'neal2003slice']
    """
    classes = (part if isinstance(part, type) else type(part) for part in parts)
    return list(dict.fromkeys(source for c in classes if issubclass(c, Cited) for source in c.sources))
