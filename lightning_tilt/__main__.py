"""`python -m lightning_tilt` is the console script `lightning-tilt`."""

import sys

__all__ = ["main"]


def main() -> None:
    """The console script; what needs no library does not wait for them to load."""
    if sys.argv[1:2] == ["configs"]:
        from lightning_tilt.cli_configs import without_a_run

        without_a_run(sys.argv[1:])
    else:
        from lightning_tilt.cli import main

        main()


if __name__ == "__main__":
    main()
