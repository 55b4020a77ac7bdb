"""A caption that differs from step to step: one of several texts, wildcards, tags in other orders.

What a photo is trained on at a step is a pure function of (seed, step, key), so a resumed run reads
the captions that an uninterrupted one does. Each draw has a name of its own: switching one of these
settings on does not move the draws of another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from trainer.data.caption_text import (
    fill,
    glue_of,
    join_tags,
    occurrences,
    one_line,
    split_tags,
    tidy,
    with_word_once,
    without_word,
)

_INNERMOST = re.compile(r"\{([^{}]*)\}")
# Braces and bars that are meant as such, while wildcards are resolved. Control characters: captions
# hold none, see `one_line`.
_LITERAL = {"{": "\x01", "|": "\x02", "}": "\x03"}

# Wildcards within wildcards; what is nested more deeply stays as it is. Each level takes the whole
# text once more, and a file by mistake may hold a million brackets.
_DEEPEST = 20

# A number in [0, 1) for a purpose and a place.
Draw = Callable[[str, int], float]


@dataclass(frozen=True, slots=True)
class CaptionStyle:
    """What is done to the captions of a set of photos.

    trigger: stands exactly once in each; "" for none, as for pictures of the class in general.
    class_noun: follows the trigger where it is put in front. prefix, suffix: texts before and
    after every caption; they may hold `{trigger}` and `{class}`. separator: between tags.
    shuffle_tags, tag_dropout: put tags in another order, leave out this share of them (0..1).
    keep_tags: so many at the beginning are never moved or dropped, nor are the prefix, the suffix
    and a tag that holds the trigger. wildcards: of "{red|blue}" one is taken.
    """

    trigger: str = ""
    class_noun: str = ""
    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    wildcards: bool = False

    def varies(self, texts: Sequence[str]) -> bool:
        """Whether a photo with these texts is trained on another text at another step."""
        if len(set(texts)) > 1 or (self.wildcards and has_wildcards(texts[0])):
            return True
        if not self.shuffle_tags and not self.tag_dropout:
            return False
        tags = split_tags(_parts(texts[0], self)[1], self.separator)
        movable = len(tags) - sum(_staying(tags, self))
        return movable > 1 or bool(movable and self.tag_dropout)


def dress(text: str, style: CaptionStyle) -> str:
    """A caption as it is kept: with prefix, suffix and the trigger.

    Where there are wildcards, a trigger among their choices is left to `vary`.
    """
    head, tail = _ends(style)
    words = (head, text, tail)
    if style.wildcards and any(has_wildcards(part) for part in words):
        trigger = one_line(style.trigger)
        if trigger and not any(occurrences(part, trigger) for part in words):
            text = join_tags((_introduction(style), text), style.separator)
        return join_tags((head, text, tail), style.separator)
    return _assemble(head, text, tail, style)


def vary(texts: Sequence[str], style: CaptionStyle, seed: int, step: int, key: str) -> str:
    """What a photo is trained on at a step.

    Args:
        texts: its captions, as `caption_photos` makes them.
        style: of its set.
        seed: of the run.
        step: number of the batch since the start of training.
        key: of the sample.

    Returns:
        The first text as it is, where nothing varies.
    """

    def draw(purpose: str, place: int = 0) -> float:
        parts = repr(("caption", purpose, seed, step, key, place)).encode()
        number = int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big")
        return (number >> 11) / 2**53

    text = texts[int(draw("text") * len(texts))]
    if not style.varies((text,)):
        return text
    head, body, tail = _parts(text, style)
    if style.wildcards:
        head = _resolve(head, style.separator, "prefix", draw)
        body = _resolve(body, style.separator, "wildcard", draw)
        tail = _resolve(tail, style.separator, "suffix", draw)
    if style.shuffle_tags or style.tag_dropout:
        body = _stir(body, style, draw)
    return _assemble(head, body, tail, style)


def has_wildcards(text: str) -> bool:
    """Whether a text holds choices ("{red|blue}") or escaped signs ("\\{")."""
    return re.search(r"\\[{|}]", text) is not None or _choose(text, lambda _: 0.0) != text


def _choose(text: str, draw: Callable[[int], float]) -> str:
    """Take one of each wildcard's choices, the innermost first; "{x}" is no wildcard."""
    numbers = count()

    def choice(match: re.Match[str]) -> str:
        choices = match[1].split("|")
        if len(choices) == 1:
            return f"{_LITERAL['{']}{match[1]}{_LITERAL['}']}"
        return choices[int(draw(next(numbers)) * len(choices))]

    resolved = re.sub(r"\\([{|}])", lambda match: _LITERAL[match[1]], text)
    for _ in range(_DEEPEST):
        if not _INNERMOST.search(resolved):
            break
        resolved = _INNERMOST.sub(choice, resolved)
    for sign, literal in _LITERAL.items():
        resolved = resolved.replace(literal, sign)
    return resolved


def _resolve(text: str, separator: str, purpose: str, draw: Draw) -> str:
    if not has_wildcards(text):
        return text
    return tidy(_choose(text, lambda number: draw(purpose, number)), separator)


def _staying(tags: Sequence[str], style: CaptionStyle) -> list[bool]:
    """Of each tag whether it is never moved or dropped."""
    trigger = one_line(style.trigger)
    return [
        number < style.keep_tags or bool(occurrences(tag, trigger))
        for number, tag in enumerate(tags)
    ]


def _stir(text: str, style: CaptionStyle, draw: Draw) -> str:
    """Drop and shuffle the tags of a text; those that stay keep their places among the others."""
    tags = split_tags(text, style.separator)
    stays = _staying(tags, style)
    numbers = [
        number
        for number in range(len(tags))
        if stays[number] or draw("tag dropout", number) >= style.tag_dropout
    ]
    movable = [number for number in numbers if not stays[number]]
    if style.shuffle_tags:
        movable.sort(key=lambda number: draw("tag order", number))
    order = iter(movable)
    placed = tuple(tags[number if stays[number] else next(order)] for number in numbers)
    return join_tags(placed, style.separator)


def _introduction(style: CaptionStyle) -> str:
    return one_line(f"{style.trigger} {style.class_noun}")


def _ends(style: CaptionStyle) -> tuple[str, str]:
    """Prefix and suffix, filled in."""
    words = (style.trigger, style.class_noun, style.separator)
    prefix, suffix = (fill(text, *words) for text in (style.prefix, style.suffix))
    return join_tags((prefix,), style.separator), join_tags((suffix,), style.separator)


def _parts(text: str, style: CaptionStyle) -> tuple[str, str, str]:
    """Prefix, caption and suffix of a text that `dress` made."""
    glue = glue_of(style.separator)
    head, tail = _ends(style)
    for form in _forms(head, style):
        if text == form or text.startswith(form + glue):
            head, text = form, text[len(form) + len(glue) :]
            break
    else:
        head = ""
    for form in _forms(tail, style):
        if text == form or text.endswith(glue + form):
            return head, text[: -len(form) - len(glue)], form
    return head, text, ""


def _forms(end: str, style: CaptionStyle) -> tuple[str, ...]:
    """How a prefix or suffix may stand in a caption: as given, with its trigger once, without."""
    trigger = one_line(style.trigger)
    bare = without_word(end, trigger, style.separator)
    once = end if bare == end else with_word_once(end, trigger, style.separator)
    return tuple(form for form in (end, once, bare) if form)


def _assemble(head: str, text: str, tail: str, style: CaptionStyle) -> str:
    """One text of the three, with the trigger exactly once."""
    trigger = one_line(style.trigger)
    if trigger and not any(occurrences(part, trigger) for part in (head, text, tail)):
        text = join_tags((_introduction(style), text), style.separator)
    return with_word_once(join_tags((head, text, tail), style.separator), trigger, style.separator)
