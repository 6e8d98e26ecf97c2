"""What the embedded models can be asked for: ten digits, said in many ways, and how to hear which one was said.

    prompts_of : digit  ->  prompts           digit_of : prompt  ->  digit, or None

`digit_of` is a left inverse: `digit_of(p) == d` for every `p in prompts_of(d)`. It hears names and numerals in any text
and case, and answers None where there is no digit or more than one ("3 or 4", "twenty", "17").
"""

from __future__ import annotations

import re
from itertools import product

__all__ = ["DIGIT_NAMES", "TEMPLATES", "all_prompts", "digit_of", "prompts_of"]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The digits in words, by their number."""

TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "digit {}",
    "number {}",
    "the digit {}",
    "the number {}",
    "the numeral {}",
    "a handwritten {}",
    "a handwritten digit {}",
    "the handwritten number {}",
    "a picture of a {}",
    "a picture of the digit {}",
    "a photo of a {}",
    "a photo of the number {}",
    "a drawing of a {}",
    "a drawing of the digit {}",
    "an image of a {}",
    "an image of the numeral {}",
    "a sketch of the number {}",
    "a white {}",
    "a white {} on black",
    "a white digit {} on a black background",
    "a {} written by hand",
)
"""What a prompt of a digit looks like; `{}` is its name."""

_WORD = re.compile(r"[^\W\d_]+|\d+")
_VALUE = {name: d for d, name in enumerate(DIGIT_NAMES)} | {str(d): d for d in range(10)}
_OTHER_NUMBER = re.compile(
    r"\d\d+|ten|eleven|twelve|thirteen|fourteen|fifteen|\w+teen|(twen|thir|for|fif|six|seven|eigh|nine)ty"
)


def prompts_of(digit: int) -> list[str]:
    """Every template filled with the digit's name and with its numeral.

    >>> prompts_of(7)[:4]
    ['seven', '7', 'a seven', 'a 7']
    >>> len(prompts_of(7)) == 2 * len(TEMPLATES)
    True
    """
    if not 0 <= digit <= 9:
        raise ValueError(f"A digit is one of 0, 1, ..., 9; got {digit}.")
    return [template.format(word) for template, word in product(TEMPLATES, (DIGIT_NAMES[digit], str(digit)))]


def all_prompts() -> list[str]:
    """The prompts of all ten digits, digit after digit.

    >>> all(digit_of(prompt) == digit for digit in range(10) for prompt in prompts_of(digit))
    True
    """
    return [prompt for digit in range(10) for prompt in prompts_of(digit)]


def digit_of(prompt: str) -> int | None:
    """The digit that a prompt asks for, None if it asks for none, for several, or for a longer number.

    A "one" beside another digit is a pronoun ("one seven" asks for a seven), unless both are numerals.

    >>> digit_of("A handwritten SEVEN, please"), digit_of("an image of the numeral 0")
    (7, 0)
    >>> digit_of("a horse"), digit_of("3 or 4"), digit_of("17"), digit_of("")
    (None, None, None, None)
    >>> digit_of("seven, that is: 7"), digit_of("one seven"), digit_of("number one")
    (7, 7, 1)
    """
    words = _WORD.findall(prompt.lower())
    if any(_OTHER_NUMBER.fullmatch(word) for word in words):
        return None
    said = {_VALUE[word] for word in words if word in _VALUE}
    if len(said) == 2 and 1 in said and "1" not in words:
        said.remove(1)
    return said.pop() if len(said) == 1 else None
