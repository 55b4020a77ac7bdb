"""Which photos are copies of others, or look like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.data.quality import DUPLICATE_BITS, NEAR_DUPLICATE_BITS, find_alike
from trainer.doctor.findings import PhotoFacts
from trainer.types import Photo

# "equal": the same file; "duplicate": stored anew or resized; "near": changed a little;
# "similar": perhaps the next picture of a series.
Kinship = Literal["equal", "duplicate", "near", "similar"]


@dataclass(frozen=True, slots=True)
class Twin:
    """An earlier photo that another looks like. mirrored: like its mirror image."""

    other: Photo
    kinship: Kinship
    mirrored: bool = False


def find_twins(photos: Sequence[Photo], facts: Mapping[str, PhotoFacts]) -> dict[Path, Twin]:
    """Of each photo that looks like an earlier one, that one; by the photo's path.

    Args:
        photos: the earliest is the one that the others are copies of.
        facts: by digest; photos without any are compared by their files alone.
    """
    twins: dict[Path, Twin] = {}
    first: dict[str, Photo] = {}
    for photo in photos:
        original = first.setdefault(photo.digest, photo)
        if original.path != photo.path:  # a folder may be in two sets
            twins[photo.path] = Twin(original, "equal")
    known = [facts[digest] for digest in first if digest in facts]
    matches = find_alike(
        [fact.hash for fact in known],
        [fact.mirrored_hash for fact in known],
        [fact.thumbnail for fact in known],
    )
    for match in matches:
        photo, other = (first[known[place].digest] for place in (match.picture, match.other))
        twins[photo.path] = Twin(other, _kinship(match.bits), match.mirrored)
    return twins


def _kinship(bits: int) -> Kinship:
    if bits <= DUPLICATE_BITS:
        return "duplicate"
    return "near" if bits <= NEAR_DUPLICATE_BITS else "similar"
