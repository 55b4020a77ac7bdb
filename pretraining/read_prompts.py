"""What the reader knows beside its weights: what prompts say, and what hides what."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pretraining import data, palette
from pretraining.captions import (
    Statement,
    context_statements,
    identity_statements,
    style_statements,
)
from pretraining.looks import (
    BEARDS,
    BROWS,
    CLOTHES,
    COLOURS,
    EYES,
    FACES,
    GLASSES,
    HAIR_STYLES,
    HATS,
    HELD_OUT_STYLE,
    MARKS,
    MOUTHS,
    PATTERNS,
    SCENES,
    STYLES,
    sample_context,
    sample_identity,
)
from trainer.scoring.words import normal

# Enough for every wording of a statement to come up.
_TRIES = 60
# Under a hat these hair styles are drawn the same (pretraining/hair.py).
_ALIKE_UNDER_HAT = (("short", "spiky", "bun"), ("bald", "mohawk"))


def knowledge() -> dict[str, object]:
    """What `trainer.scoring.reader` reads from the description beside the weights."""
    hats = [hat for hat in HATS if hat != "none"]
    return {
        "looks": dict(data.label_fields()),
        "phrases": phrases(),
        "absent": [
            ["hat_colour", "hat", ["none"]],
            ["background_colour", "background", list(SCENES)],
        ],
        "covers": [
            {"look": "hair_style", "by": "hat", "values": hats, "groups": _ALIKE_UNDER_HAT},
            {"look": "eyes", "by": "glasses", "values": ["sunglasses"], "groups": [EYES]},
        ],
    }


def phrases() -> dict[str, dict[str, str]]:
    """Every phrase in its normal form, and the looks it states."""
    found: dict[str, dict[str, str]] = dict(_short_phrases())
    for statement, values in _statements():
        known = set(statement.fields) <= set(values)
        # Two things worn make two phrases, which stand in the table on their own.
        if known and "and" not in statement.text.split():
            found[normal(statement.text)] = {look: values[look] for look in statement.fields}
    return dict(sorted(found.items()))


def _statements() -> Iterator[tuple[Statement, dict[str, str]]]:
    """Every statement that captions can make, with the looks it is made for."""
    rng = random.Random("statements")
    for values in _identity_values():
        for _ in range(_TRIES):
            said = identity_statements(replace(sample_identity(0), **values), rng)
            yield from ((statement, values) for statement in said)
    for today in _context_values():
        for _ in range(_TRIES):
            said = context_statements(replace(sample_context(0), **today), rng)
            yield from ((statement, today) for statement in said)
    for style in (style for style in STYLES if style != HELD_OUT_STYLE):
        for _ in range(_TRIES * 5):
            said = style_statements(style, rng)
            yield from ((statement, {"style": style}) for statement in said)


def _identity_values() -> Iterator[dict[str, str]]:
    single = {
        "skin": palette.SKIN,
        "face": FACES,
        "eyes": EYES,
        "brows": BROWS,
        "glasses": GLASSES,
        "mark": MARKS,
    }
    for look, options in single.items():
        for value in options:
            yield {look: value}
    for colour in palette.HAIR:
        for style in HAIR_STYLES:
            yield {"hair_style": style, "hair_colour": colour}
        for beard in BEARDS:
            yield {"beard": beard, "hair_colour": colour}


def _context_values() -> Iterator[dict[str, Any]]:
    for mouth in MOUTHS:
        yield {"mouth": mouth}
    for scene in SCENES:
        yield {"background": scene}
    for colour in COLOURS:
        for hat in HATS:
            yield {"hat": hat, "hat_colour": colour}
        for clothes in CLOTHES:
            yield {"clothes": clothes, "clothes_colour": colour}
        for pattern in PATTERNS:
            yield {"background": pattern, "background_colour": colour}


def _short_phrases() -> Iterator[tuple[str, dict[str, str]]]:
    """What captions never say, but people do: half a statement, and what is not there."""
    for colour in palette.HAIR:
        yield f"{colour} hair", {"hair_colour": colour}
    for style in HAIR_STYLES:
        yield f"{style} hair", {"hair_style": style}
    for look, options in {
        "hair_style": ("bob", "bun", "pigtails", "mohawk"),
        "hat": HATS[1:],
        "clothes": CLOTHES,
        "background": SCENES,
        "beard": BEARDS[1:],
    }.items():
        for value in options:
            yield value, {look: value}
    for look in ("beard", "glasses"):
        yield f"no {look}", {look: "none"}
    yield normal("a star on the cheek"), {"mark": "star"}
    yield "neon style", {"style": HELD_OUT_STYLE}
