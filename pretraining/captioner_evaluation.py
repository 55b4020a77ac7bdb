"""How much of what the captioner says is right, on drawings it never saw and on a photo folder."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pretraining.avatars import draw_avatar
from pretraining.captioner_material import describe, stranger
from pretraining.captions import describe_identity
from pretraining.data import looks
from pretraining.looks import CLOTHES, COLOURS, HATS, MOUTHS, SCENES, sample_style
from trainer.captioners import CaptionerOptions
from trainer.captioners.image_text import ImageTextCaptioner, load_captioner

_SEED = 70_000_000
_COLUMNS = "{:<34}{:>6}{:>9}"


def read_context(text: str) -> dict[str, str]:
    """The looks that a caption states of expression, dress and surroundings, by name.

    What it does not state, or in other words than `describe_context` has, is left out; a caption
    that names clothes and no hat says that there is none.
    """
    found: dict[str, str] = {}
    parts = text.split(", ")
    if mouths := [part for part in parts if part in MOUTHS]:
        found["mouth"] = mouths[0]
    dress = next((part for part in parts if part.startswith("wearing ")), "")
    worn = re.findall(rf"\ban? ({'|'.join(COLOURS)}) ({'|'.join((*HATS[1:], *CLOTHES))})\b", dress)
    for colour, thing in worn:
        name = "clothes" if thing in CLOTHES else "hat"
        found |= {name: thing, f"{name}_colour": colour}
    if "clothes" in found:
        found.setdefault("hat", "none")
    place = parts[-1]
    if scenes := [scene for scene in SCENES if place.endswith(f" {scene}")]:
        found["background"] = scenes[0]
    patterns = {"": "plain", "dotted ": "dots", "striped ": "stripes"}
    if ground := re.fullmatch(rf"({'|'.join(COLOURS)}) (dotted |striped )?background", place):
        colour, pattern = ground[1], patterns[ground[2] or ""]
        found |= {"background": pattern, "background_colour": colour}
    return found


class Tally:
    """How often each look was stated as it is."""

    def __init__(self) -> None:
        self.right: dict[str, list[bool]] = {}

    def add(self, truth: Mapping[str, str], stated: Mapping[str, str]) -> None:
        """Count one caption; what is left out counts as wrong."""
        for name, value in truth.items():
            self.right.setdefault(name, []).append(stated.get(name) == value)

    @property
    def share(self) -> float:
        """Right ones of all looks, 0 to 1."""
        return float(np.mean([one for each in self.right.values() for one in each]))

    def lines(self, title: str) -> list[str]:
        """The share of all looks and of each."""
        rows = [(title, self.share, sum(map(len, self.right.values())))]
        rows += [
            (f"  {name}", float(np.mean(each)), len(each)) for name, each in self.right.items()
        ]
        return [_COLUMNS.format(name, f"{share:.3f}", count) for name, share, count in rows]


def evaluate(folder: Path, drawings: int, photo_sets: Mapping[str, Path]) -> str:
    """Measure the captioner in `folder`: a table of shares and of how many were counted.

    Args:
        folder: of the captioner.
        drawings: how many fresh drawings of each sort.
        photo_sets: by kind of training, a folder of pictures with true captions beside them.
    """
    captioner = load_captioner(CaptionerOptions(str(folder)))
    lines = [_COLUMNS.format("", "right", "counted")]
    sorts = (("64 px", 64, False), ("256 px", 256, False), ("64 px, any skin and hair", 64, True))
    for number, (title, size, strange) in enumerate(sorts):
        seeds = range(_SEED + number * drawings, _SEED + (number + 1) * drawings)
        lines += _on_drawings(captioner, title, seeds, size, strange=strange)
    lines += _identities(captioner, range(_SEED + 3 * drawings, _SEED + 4 * drawings))
    for kind, photo_set in photo_sets.items():
        lines += _on_photos(captioner, kind, photo_set)
    return "\n".join(lines)


def _on_drawings(
    captioner: ImageTextCaptioner, title: str, seeds: range, size: int, *, strange: bool
) -> list[str]:
    tally, whole = Tally(), []
    for seed in seeds:
        identity, context = looks(seed)
        if strange:
            image = Image.fromarray(stranger(seed, size))
        else:
            image = draw_avatar(identity, context, size, sample_style(seed))
        text, truth = captioner.describe(image, "face"), describe("face", identity, context)
        tally.add(read_context(truth), read_context(text))
        whole.append(text == truth)
    words = _COLUMNS.format("  whole captions", f"{np.mean(whole):.3f}", len(whole))
    return [*tally.lines(f"face, {title}"), words]


def _identities(captioner: ImageTextCaptioner, seeds: range) -> list[str]:
    """Captions of everything: statements of who is shown, both ways, and the context."""
    tally, found, true = Tally(), [], []
    for seed in seeds:
        identity, context = looks(seed)
        image = draw_avatar(identity, context, 64, sample_style(seed))
        text = captioner.describe(image, "style")
        tally.add(read_context(describe("face", identity, context)), read_context(text))
        known = set(describe_identity(identity).split(", "))
        opening = re.split(rf",? ?\b(?:{'|'.join(MOUTHS)}), wearing", text)[0]
        said = {part for part in opening.split(", ") if part}
        found += [part in said for part in known]
        true += [part in known for part in said]
    return [
        *tally.lines("style, 64 px: context"),
        _COLUMNS.format("  of who is shown: true is said", f"{np.mean(found):.3f}", len(found)),
        _COLUMNS.format("  of who is shown: said is true", f"{np.mean(true):.3f}", len(true)),
    ]


def _on_photos(captioner: ImageTextCaptioner, kind: str, folder: Path) -> list[str]:
    tally, whole = Tally(), []
    for sidecar in sorted(folder.glob("*.txt")):
        truth = sidecar.read_text(encoding="utf-8").strip()
        path = next(p for p in folder.glob(f"{sidecar.stem}.*") if p.suffix != ".txt")
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        text = captioner.describe(image, kind)
        tally.add(read_context(truth), read_context(text))
        whole.append(f"  {path.name}: {text}" + (f" | true: {truth}" if text != truth else ""))
    return [*tally.lines(f"{kind}, {folder.name}"), *whole]
