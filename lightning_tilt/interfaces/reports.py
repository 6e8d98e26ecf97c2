"""What other people's loaders say, in one line of ours: no tables of weights before it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["first_line", "without_reports"]


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message, or its name if it has none.

    Example:
        >>> first_line(ValueError("too long; see below\nmuch more")), first_line(KeyError())
        ('too long; see below', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep the tables of missing weights of transformers and diffusers off the terminal, where they are read by us."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
