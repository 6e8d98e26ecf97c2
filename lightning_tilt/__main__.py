"""`python -m lightning_tilt` is the console script `lightning-tilt`."""

from lightning_tilt.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
