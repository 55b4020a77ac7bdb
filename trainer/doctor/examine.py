"""Photos -> facts: each picture is decoded, looked at and let go, several at the same time.

No more pictures are in memory than there are workers, however many the folder holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from PIL import Image

from trainer.data.decode import WHITE, PictureError, decode_upright
from trainer.data.photos import PhotoProblem
from trainer.data.quality import reduced, scaled
from trainer.doctor.facts import FactStore, measure_photo
from trainer.doctor.findings import PhotoFacts
from trainer.faces import FaceFinder
from trainer.types import Face, Photo, Size

# Photos are looked at with this long side at least, where they have it: what finders look for
# faces at, and more than anything else needs.
LOOKED_AT_PX = 1024


@dataclass(frozen=True, slots=True)
class Examination:
    """facts: by the digest of the photo. problems: photos that could be read when the folder was
    looked through and cannot be any more (deleted, or altered meanwhile)."""

    facts: Mapping[str, PhotoFacts]
    problems: tuple[PhotoProblem, ...]


def examine(
    photos: Sequence[Photo],
    finder: FaceFinder | None,
    store: FactStore,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Examination:
    """Measure each photo, or take what is kept of it; equal files are measured once.

    Args:
        photos: as the folder was scanned.
        finder: looks for faces, asked by several threads at once; None: nothing can.
        store: where facts are kept.
        workers: photos looked at at the same time, 1 or more.
        progress: told (photos done, photos in all) after each, in the caller's thread.
        background: colour behind transparent photos.
    """
    copies: dict[str, list[Photo]] = {}
    for photo in photos:
        copies.setdefault(photo.digest, []).append(photo)
    seen_by = f"{finder.name if finder else 'nothing'} on {background}"

    def look(same: list[Photo]) -> tuple[PhotoFacts | None, list[PhotoProblem]]:
        problems: list[PhotoProblem] = []
        kept = store.get(same[0].digest, seen_by)
        if kept:
            return kept, problems
        for photo in same:  # should the first be gone by now, its copy may be there
            try:
                facts = _measured(photo, finder, background)
            except PictureError as error:
                problems.append(PhotoProblem(photo.path, error.reason, error.fix))
            else:
                store.put(facts, seen_by)
                return facts, problems
        return None, problems

    facts: dict[str, PhotoFacts] = {}
    problems: list[PhotoProblem] = []
    done = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for same, (measured, missing) in zip(
            copies.values(), pool.map(look, copies.values()), strict=True
        ):
            if measured:
                facts[measured.digest] = measured
            problems += missing
            done += len(same)
            if progress:
                progress(done, len(photos))
    finally:  # when stopped by the user, without looking at the rest first
        pool.shutdown(cancel_futures=True)
    return Examination(facts, tuple(problems))


def _measured(
    photo: Photo, finder: FaceFinder | None, background: tuple[int, int, int]
) -> PhotoFacts:
    image = decode_upright(
        photo.path, background=background, at_least=reduced(photo.size, LOOKED_AT_PX)
    )
    faces = None
    if finder:
        faces = tuple(_full_size(face, image, photo.size) for face in finder.find(image))
    return measure_photo(image, photo.digest, faces, photo.size)


def _full_size(face: Face, image: Image.Image, size: Size) -> Face:
    """A face found in a reduced picture, in pixels of the photo."""
    if image.size == (size.width, size.height):
        return face
    across, down = size.width / image.width, size.height / image.height
    landmarks = tuple((x * across, y * down) for x, y in face.landmarks)
    return replace(face, box=scaled(face.box, Size(*image.size), size), landmarks=landmarks)
