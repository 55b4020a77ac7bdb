"""What a prompt of the embedded base names, found with a table of phrases.

The table comes with the reader's weights: every phrase that the base's captions use, and the looks
it states. Words outside the table say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# A phrase in its normal form to the looks it states, each with its value.
Phrases = Mapping[str, Mapping[str, str]]

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_FILLING = frozenset(("a", "an", "the", "wearing"))


def normal(text: str) -> str:
    """Lower-case words without articles and without "wearing"."""
    words: list[str] = _WORD.findall(text.lower())
    return " ".join(word for word in words if word not in _FILLING)


def named_looks(prompt: str, phrases: Phrases) -> dict[str, str]:
    """The looks that a prompt names; of contradicting statements the first counts.

    The longest phrase wins ("yellow striped shirt" is no shirt of its own beside it), and no phrase
    reaches across a comma.
    """
    longest = max((len(phrase.split()) for phrase in phrases), default=0)
    found: dict[str, str] = {}
    for piece in re.split(r"[,.;:\n]", prompt):
        words = normal(piece).split()
        start = 0
        while start < len(words):
            for length in range(min(longest, len(words) - start), 0, -1):
                looks = phrases.get(" ".join(words[start : start + length]))
                if looks is not None:
                    found = {**looks, **found}
                    start += length
                    break
            else:
                start += 1
    return found
