"""The text each photo is trained on: its sidecar file, else a captioner's words, else a template.

A sidecar has the photo's name with the ending `.txt` (in any case): `anna 01.jpg` goes with
`anna 01.txt`. Names are compared as Unicode text, so it does not matter which of the two ways of
writing an accented letter the file system uses. Photos with one stem share a sidecar.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trainer.data.decode import shown
from trainer.data.listing import stem_key
from trainer.errors import DataError
from trainer.types import Captioned, Photo

# A caption is a sentence or a list of tags; a larger file is something else by mistake.
MAXIMUM_SIDECAR_BYTES = 1_000_000

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def caption_photos(
    photos: Sequence[Photo],
    *,
    trigger: str,
    class_noun: str,
    template: str = "{trigger} {class}",
    use_sidecars: bool = True,
    describe: Callable[[Photo], str] | None = None,
) -> tuple[Captioned, ...]:
    """Give each photo its caption.

    `{trigger}` and `{class}` are replaced in sidecars and in the template. A sidecar or a
    description that does not name the trigger as a whole word gets "<trigger> <class>, " in
    front. An empty sidecar counts as none.

    Args:
        photos: in any order, which is kept.
        trigger: the word that shall call up what is learned; empty for none.
        class_noun: what it is ("woman", "avatar").
        template: the caption of photos that have no other.
        use_sidecars: False ignores all sidecars.
        describe: a captioner, asked about the photos without a sidecar; "" means it has no answer.

    Raises:
        DataError: a sidecar cannot be read or is no caption.
    """
    words = {"trigger": trigger, "class": class_noun}
    sidecars = find_sidecars(photos) if use_sidecars else {}
    captioned = []
    for photo in photos:
        sidecar = sidecars.get(photo.path)
        text, origin = (_fill(read_sidecar(sidecar), words) if sidecar else ""), "sidecar"
        if not text and describe:
            text, origin = _one_line(describe(photo)), "captioner"
        if text:
            captioned.append(Captioned(photo, _with_trigger(text, trigger, class_noun), origin))
        else:
            captioned.append(Captioned(photo, _fill(template, words), "template"))
    return tuple(captioned)


def find_sidecars(photos: Iterable[Photo]) -> dict[Path, Path]:
    """The sidecar of each photo that has one, by the photo's path."""
    photos = tuple(photos)
    found: dict[tuple[Path, str], Path] = {}
    for folder in {photo.path.parent for photo in photos}:
        # Of "a.TXT" and "a.txt" the latter, the usual one, comes last here and stays.
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() == ".txt" and path.is_file():
                found[stem_key(path)] = path
    keys = {photo.path: stem_key(photo.path) for photo in photos}
    return {path: found[key] for path, key in keys.items() if key in found}


def write_sidecar(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a caption to a file, as UTF-8.

    Raises:
        FileExistsError: there is a file of this name, and it is not to be overwritten.
        OSError: it cannot be written.
    """
    with path.open("w" if overwrite else "x", encoding="utf-8") as file:
        file.write(f"{text}\n")


def read_sidecar(path: Path) -> str:
    """The caption in a file, on one line; "" if there is none.

    Read as UTF-8, as UTF-16 or UTF-32 if a byte order mark says so, else as Windows-1252 (where
    captions in no UTF encoding mostly come from).

    Raises:
        DataError: the file cannot be read, or is far too large.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAXIMUM_SIDECAR_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"The caption {shown(path.name)} cannot be read ({error.strerror}).",
            where=shown(path),
            fix="Give yourself the permission to read it, or remove it.",
        ) from error
    if len(raw) > MAXIMUM_SIDECAR_BYTES:
        raise DataError(
            f"The caption {shown(path.name)} is larger than {MAXIMUM_SIDECAR_BYTES // 1000} kB.",
            where=shown(path),
            fix="A caption is a sentence or a list of tags. Shorten it, or remove it.",
        )
    return _one_line(_decode(raw))


def tag_frequency(captions: Iterable[Captioned]) -> dict[str, int]:
    """How often each tag occurs, the most frequent first; tags are what stands between commas."""
    tags = (tag.strip().lower() for caption in captions for tag in caption.text.split(","))
    counts = Counter(tag for tag in tags if tag)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _decode(raw: bytes) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return raw.decode(encoding, errors="replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def _one_line(text: str) -> str:
    """Unicode's composed form, white space in single blanks, other control characters removed."""
    spaced = " ".join(unicodedata.normalize("NFC", text).split())
    kept = (c for c in spaced if unicodedata.category(c) != "Cc" and c != "\ufeff")
    return " ".join("".join(kept).split())


def _fill(text: str, words: dict[str, str]) -> str:
    """Replace the placeholders in one pass, so that a word that looks like one is left alone."""
    filled = re.sub(r"\{(trigger|class)\}", lambda match: words[match[1]], text)
    return _one_line(filled)


def _with_trigger(text: str, trigger: str, class_noun: str) -> str:
    word = _one_line(trigger)
    if not word or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE):
        return text
    return f"{_one_line(f'{trigger} {class_noun}')}, {text}"
