"""What is done to the text of a caption: cleaning, placeholders, tags, and the trigger in it.

Pure functions on strings. A word is found whole and in any case: "ohwx" is in "Ohwx, smiling" and
in "ohwx's hat", not in "ohwxy".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from unicodedata import category, normalize

# Control characters, and halves of characters that no tokenizer takes.
_UNPRINTABLE = ("Cc", "Cs")
_PAIRS = ("()", "[]", '""', "''", "“”", "„“", "«»")


def one_line(text: str) -> str:
    """Unicode's composed form, white space in single blanks, control characters removed."""
    spaced = " ".join(text.split())
    kept = (c for c in spaced if category(c) not in _UNPRINTABLE and c != "\ufeff")
    return " ".join(normalize("NFC", "".join(kept)).split())


def fill(text: str, trigger: str, class_noun: str, separator: str = ",") -> str:
    """Replace `{trigger}` and `{class}`, on one line.

    In one pass, so that a word that looks like a placeholder is left alone. Without a trigger its
    place closes up.
    """
    words = {"trigger": trigger, "class": class_noun}
    filled = one_line(re.sub(r"\{(trigger|class)\}", lambda match: words[match[1]], text))
    return filled if trigger or "{trigger}" not in text else tidy(filled, separator)


def occurrences(text: str, word: str) -> tuple[tuple[int, int], ...]:
    """Start and end of each place where a word stands whole, in any case; none for ""."""
    pattern = re.compile(re.escape(word), re.IGNORECASE)
    found: list[tuple[int, int]] = []
    place = 0
    while word and (match := pattern.search(text, place)):
        start, end = match.span()
        whole = not _in_word(text[start - 1 : start]) and not _in_word(text[end : end + 1])
        if whole:
            found.append((start, end))
        place = end if whole else start + 1
    return tuple(found)


def mentions(text: str, word: str) -> bool:
    """Whether a word stands whole in a text, in any case."""
    return bool(occurrences(one_line(text), one_line(word)))


def with_word_once(text: str, word: str, separator: str = ",") -> str:
    """The text with a word exactly once, spelled as given.

    The first occurrence stays and the later ones go, with the signs that belonged to them; a text
    without one begins with it. An empty word changes nothing.
    """
    if not word:
        return text
    while len(found := occurrences(text, word)) > 1:
        text = _cut(text, found[1:], separator, untouched=found[0][1])
    if not found:
        return f"{word} {text}".rstrip()
    start, end = found[0]
    return text[:start] + word + text[end:]


def without_word(text: str, word: str, separator: str = ",") -> str:
    """The text with no occurrence of a word, tidily ("a man, ohwx, hat" -> "a man, hat")."""
    while found := occurrences(text, word):
        text = _cut(text, found, separator)
    return text


def split_tags(text: str, separator: str = ",") -> tuple[str, ...]:
    """What stands between the separators, trimmed; nothing is left of empty places."""
    tags = text.split(one_line(separator) or " ")
    return tuple(tag.strip() for tag in tags if tag.strip())


def join_tags(tags: Iterable[str], separator: str = ",") -> str:
    """Texts one after the other with one separator between each two, whatever their ends."""
    trimmed = (_trim(tag, one_line(separator)) for tag in tags)
    return glue_of(separator).join(tag for tag in trimmed if tag)


def glue_of(separator: str) -> str:
    """What stands between two tags: a separator without blanks of its own is followed by one."""
    mark = one_line(separator)
    if not mark or separator == separator.strip():
        return f"{mark} "
    return f"{' ' * separator[0].isspace()}{mark}{' ' * separator[-1].isspace()}"


def tidy(text: str, separator: str = ",") -> str:
    """Close the gaps that words leave when they go: double blanks, commas and separators."""
    text = one_line(text)
    for mark in _marks(separator):
        sign = re.escape(mark)
        text = re.sub(rf"(\s*{sign})(?:\s*{sign})+", r"\1", text)
        text = _trim(text, mark)
    return re.sub(r"\s+,", ",", text)


def _marks(separator: str) -> tuple[str, ...]:
    """The signs that close a tag: the comma and the separator, where that is not a blank."""
    return tuple(mark for mark in dict.fromkeys((",", one_line(separator))) if mark)


def _in_word(character: str) -> bool:
    """Whether a character (or "") continues the word beside it; accents and vowel signs do."""
    return character == "_" or character.isalnum() or category(character or " ").startswith("M")


def _trim(text: str, mark: str) -> str:
    """Without blanks and marks at either end."""
    trimmed = text.strip()
    while mark and trimmed.startswith(mark):
        trimmed = trimmed.removeprefix(mark).lstrip()
    while mark and trimmed.endswith(mark):
        trimmed = trimmed.removesuffix(mark).rstrip()
    return trimmed


def _cut(text: str, places: tuple[tuple[int, int], ...], separator: str, untouched: int = 0) -> str:
    """Take words out of a text, all after its first `untouched` characters.

    From the last to the first, in pieces: copying the text for each would take minutes where a
    file by mistake holds a word a hundred thousand times.
    """
    starts = [untouched, *(end for _, end in places[:-1])]
    right = text[places[-1][1] :]
    pieces = []
    for begin, (start, _) in zip(reversed(starts), reversed(places), strict=True):
        left, right = _closed(text[begin:start], right, separator, first=not begin)
        if left:
            pieces.append(right)
            right = left
    return "".join((text[:untouched], right, *reversed(pieces)))


def _closed(left: str, right: str, separator: str, *, first: bool) -> tuple[str, str]:
    """What is beside a word without what belonged to it: its 's, hyphen, brackets, comma.

    first: whether the text begins with `left`.
    """
    right = right[match.end() :] if (match := re.match(r"['’]s(?!\w)|-(?=\w)", right)) else right
    left = left if left.endswith(" -") else left.removesuffix("-")
    left, right = left.rstrip(), right.lstrip()
    while left and right and left[-1] + right[0] in _PAIRS:
        left, right = left[:-1].rstrip(), right[1:].lstrip()
    marks = _marks(separator)
    stops = (".", ";", ":", "!", "?", *marks)
    if not right or right.startswith(stops):
        for mark in marks:
            left = left.removesuffix(mark).rstrip()
    if first and not left:
        for mark in marks:
            right = right.removeprefix(mark).lstrip()
    glue = "" if (first and not left) or not right or right.startswith(stops) else " "
    return (f"{left}{glue}", right) if left else ("", f"{glue}{right}")
