"""`python -m lightning_tilt` is the console script `lightning-tilt`."""

import os
import signal
import sys

__all__ = ["main"]


def main() -> None:
    """The console script; what needs no library does not wait for them to load."""
    command = "".join(sys.argv[1:2])
    try:
        if command in ("configs", "--version"):
            from lightning_tilt.cli_configs import without_a_run

            without_a_run(sys.argv[1:])
        else:
            from lightning_tilt.cli import main

            main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # while libraries load, or a second one
        sys.stderr.write("\nlightning-tilt: stopped by SIGINT\n")
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # `| head` has read what it wants; a run that loses its output does say so
        if command not in ("configs", "--version", "cite"):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered would fail at exit again
        raise SystemExit(141) from None  # 128 + SIGPIPE, which not every system knows


if __name__ == "__main__":
    main()
