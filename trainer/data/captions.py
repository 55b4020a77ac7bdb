"""The text each photo is trained on: its sidecar file, else a captioner's words, else a template.

A sidecar has the photo's name with the ending `.txt` (in any case): `anna 01.jpg` goes with
`anna 01.txt`. Names are compared as Unicode text, so it does not matter which of the two ways of
writing an accented letter the file system uses. Photos with one stem share a sidecar.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from trainer.data.caption_text import fill, one_line
from trainer.data.caption_variants import CaptionStyle, dress
from trainer.data.decode import shown
from trainer.data.listing import list_folder, stem_key
from trainer.data.publish import publish
from trainer.errors import DataError
from trainer.types import Captioned, Photo

# A caption is a sentence or a list of tags; a larger file is something else by mistake.
MAXIMUM_SIDECAR_BYTES = 1_000_000

# Names of texts about a folder, which may stand among the photos. What follows the word may be
# anything that does not continue it: "README first", "license-cc0".
_NOT_CAPTIONS = re.compile(
    r"(read.?me|licen[cs]e|copy(ing|right)|notice|credits?|attribution|authors?|sources?|notes?"
    r"|changelog|urls?|links?)(?![^\W_])",
    re.IGNORECASE,
)

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
    style: CaptionStyle | None = None,
    several_lines: bool = False,
) -> tuple[Captioned, ...]:
    """Give each photo its caption, or its captions.

    `{trigger}` and `{class}` are replaced, wherever a text comes from. Each caption names the
    trigger exactly once: where it is missing, "<trigger> <class>, " is put in front; where it comes
    again, later occurrences go. An empty sidecar counts as none.

    Args:
        photos: in any order, which is kept.
        trigger: the word that shall call up what is learned; empty for none.
        class_noun: what it is ("woman", "avatar").
        template: the caption of photos that have no other.
        use_sidecars: False ignores all sidecars.
        describe: a captioner, asked about the photos without a sidecar; "" means it has no answer.
        style: prefix, suffix and the like; `trigger` and `class_noun` take the place of its own.
        several_lines: each line of a sidecar is a caption of its own; otherwise they are one.

    Raises:
        DataError: a sidecar cannot be read or is no caption.
    """
    style = replace(style or CaptionStyle(), trigger=trigger, class_noun=class_noun)
    sidecars = find_sidecars(photos) if use_sidecars else {}

    def filled(texts: Iterable[str]) -> tuple[str, ...]:
        whole = (fill(text, trigger, class_noun, style.separator) for text in texts)
        return tuple(text for text in whole if text)

    def texts_of(photo: Photo) -> tuple[tuple[str, ...], str]:
        if sidecar := sidecars.get(photo.path):
            lines = read_lines(sidecar)
            if texts := filled(lines if several_lines else [" ".join(lines)]):
                return texts, "sidecar"
        if describe and (texts := filled([describe(photo)])):
            return texts, "captioner"
        return (fill(template, trigger, class_noun, style.separator),), "template"

    captioned = []
    for photo in photos:
        texts, origin = texts_of(photo)
        captioned.append(Captioned(photo, tuple(dress(text, style) for text in texts), origin))
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


def read_sidecar(path: Path) -> str:
    """The caption in a file, on one line; "" if there is none. Reads as `read_lines` does."""
    return " ".join(read_lines(path))


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a sidecar that hold something, cleaned.

    Read as UTF-8, as UTF-16 or UTF-32 if a byte order mark says so, else as Windows-1252 (where
    captions in no UTF encoding mostly come from).

    Raises:
        DataError: the file cannot be read, is far too large, or lies outside of its folder.
    """
    if leads_out(path):
        raise DataError(
            f"The caption {shown(path.name)} is a link to a file outside of its folder.",
            where=shown(path),
            fix="Put a copy of that file in its place, or remove the link.",
        )
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
    lines = (one_line(line) for line in _decode(raw).splitlines())
    return tuple(line for line in lines if line)


def leads_out(sidecar: Path) -> bool:
    """Whether a sidecar is a link out of its folder: a folder of photos from somebody else could
    otherwise have any text of this machine become a caption, or be overwritten with one.

    Where the photo is a link itself, its caption may lie where it leads.
    """
    if not sidecar.is_symlink():
        return False
    try:
        target = sidecar.resolve()
        if target.is_relative_to(sidecar.parent.resolve()):
            return False
        others = (path for path in sidecar.parent.iterdir() if stem_key(path) == stem_key(sidecar))
        return all(path.resolve().parent != target.parent for path in others if path != sidecar)
    except (OSError, RuntimeError):  # links in a circle
        return True


def orphan_sidecars(
    folder: Path, photos: Iterable[Photo] = (), *, recursive: bool = False
) -> tuple[Path, ...]:
    """The `.txt` files of a folder that no picture goes with, sorted by name.

    A picture that cannot be used keeps its sidecar. Files that say what they are ("README.txt",
    "license-cc0.txt", see `_NOT_CAPTIONS`) are no captions.

    Raises:
        DataError: the folder cannot be listed.
    """
    pictured = {stem_key(photo.path) for photo in photos}
    return tuple(
        path
        for path in sorted(list_folder(folder, recursive=recursive).other)
        if path.suffix.lower() == ".txt"
        and not _NOT_CAPTIONS.match(path.stem)
        and stem_key(path) not in pictured
    )


def write_sidecar(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a caption to a file, as UTF-8: all of it or nothing, even if the power goes.

    A link is followed within its folder, and a file that is overwritten keeps its permissions.

    Raises:
        FileExistsError: there is a file of this name, and it is not to be overwritten.
        OSError: it cannot be written, is write-protected, or is a link that leads out of its
            folder. Nothing has changed then.
    """
    if not overwrite and (path.exists() or path.is_symlink()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if leads_out(path):
        raise PermissionError(errno.EPERM, "it is a link that leads out of its folder", str(path))
    target = path.resolve()
    # Short, since the caption's own name may be as long as names can be; hidden from every scan.
    temporary = target.with_name(f".likeness-{secrets.token_hex(8)}.tmp")
    with ExitStack() as stack:
        with temporary.open("xb") as file:
            stack.callback(temporary.unlink, missing_ok=True)
            file.write(f"{text}\n".encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        if not overwrite:
            publish(temporary, path)
            return
        if target.exists():
            target.open("r+b").close()  # replacing would not ask whether it is write-protected
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)


def _decode(raw: bytes) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return raw.decode(encoding, errors="replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")
