"""Where a face is in the picture that is trained."""

from __future__ import annotations

import math

from trainer.types import Bucketed, Face, Photo

# A detector's box is not exact: only a face of which more than this share is outside is cut.
_CUT = 0.08
# A box that ends as near to the photo's edge (of the face's height) is cut off there.
_AT_EDGE = 0.02


def face_share(face: Face, crop: Bucketed) -> float:
    """The face's height, of the shorter side of the crop."""
    down = crop.resized.height / crop.captioned.photo.size.height
    return face.box.height * down / min(crop.bucket.width, crop.bucket.height)


def cut_by_frame(face: Face, photo: Photo) -> bool:
    """Whether the face goes on beyond the photo's edge, as far as its box shows."""
    box, margin = face.box, _AT_EDGE * face.box.height
    beside = min(box.left, photo.size.width - box.right)
    above = min(box.top, photo.size.height - box.bottom)
    return min(beside, above) <= margin


def cut_by_crop(face: Face, crop: Bucketed) -> bool:
    """Whether the crop leaves out part of the face."""
    size = crop.captioned.photo.size
    across, down = crop.resized.width / size.width, crop.resized.height / size.height
    box = face.box
    left, right = box.left * across - crop.left, box.right * across - crop.left
    top, bottom = box.top * down - crop.top, box.bottom * down - crop.top
    wide = max(0.0, -left) + max(0.0, right - crop.bucket.width)
    high = max(0.0, -top) + max(0.0, bottom - crop.bucket.height)
    return wide > _CUT * (right - left) or high > _CUT * (bottom - top)


def turned(face: Face) -> float | None:
    """How far a face is turned to the side: where the nose is between the eyes, along the line
    from eye to eye and in units of their distance; 0 from the front. None without landmarks."""
    if len(face.landmarks) < 3:
        return None
    (right_x, right_y), (left_x, left_y), (nose_x, nose_y) = face.landmarks[:3]
    across, down = left_x - right_x, left_y - right_y
    distance = math.hypot(across, down)
    if distance == 0:
        return None
    along = (nose_x - right_x) * across + (nose_y - right_y) * down
    return along / distance**2 - 0.5
