"""OpenCV's basic detector: a cascade of light and dark rectangles (Viola and Jones, CVPR 2001).

It comes with OpenCV 4 and needs no download. It finds faces that look into the camera and misses
many others, so that finding none says little: messages may only say "no face found (basic
detector)". Pictures are not tried in other orientations, as every second picture without a face has
something in it that looks like one when turned.
"""

from __future__ import annotations

import threading
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.errors import ConfigError
from trainer.faces.models import FaceModels
from trainer.faces.pictures import box_within, largest_first, resized
from trainer.types import Face

CASCADE = "haarcascade_frontalface_default.xml"
# Small pictures are enlarged and large ones reduced: outside of these, faces are missed.
SMALLEST_PX, LARGEST_PX = 256, 1024
# Of the longest side. Smaller ones are mostly no faces, and no use for training if they are.
SMALLEST_FACE = 1 / 16
WINDOW_PX = 24  # the side of the smallest face that the cascade knows
# How many overlapping finds make a face; with 3, there are false ones in sharp photographs.
NEIGHBOURS = 5
# The cascade says yes or no only.
SCORE = 0.5


class _Cascade(threading.local):
    """A classifier for each thread: OpenCV's must not be called by two at once."""

    def __init__(self, xml: str) -> None:
        storage = cv2.FileStorage(xml, cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
        self.classifier = cv2.CascadeClassifier()
        self.classifier.read(storage.getFirstTopLevelNode())


class HaarFinder:
    """Finds faces without landmarks, and tells nobody apart.

    Args:
        xml: content of the cascade's file.
    """

    name = f"haar OpenCV {cv2.__version__}"
    certain = False

    def __init__(self, xml: str) -> None:
        self._cascade = _Cascade(xml)

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        """The faces of an upright RGB picture in its own pixels, the largest first."""
        small = resized(image.convert("L"), min(max(*image.size, SMALLEST_PX), LARGEST_PX))
        grey = cv2.equalizeHist(np.asarray(small))
        side = max(WINDOW_PX, round(max(small.size) * SMALLEST_FACE))
        found = self._cascade.classifier.detectMultiScale(
            grey, scaleFactor=1.1, minNeighbors=NEIGHBOURS, minSize=(side, side)
        )
        across, down = image.width / small.width, image.height / small.height
        return largest_first(
            Face(
                box_within(
                    left * across,
                    top * down,
                    (left + width) * across,
                    (top + height) * down,
                    image,
                ),
                SCORE,
            )
            for left, top, width, height in found
        )

    def embed(self, image: Image.Image, face: Face) -> NDArray[np.float64] | None:
        """None: without landmarks nobody can be told apart."""
        return None


def open_haar(models: FaceModels) -> tuple[HaarFinder, str]:
    """The detector, and what it cannot do.

    Raises:
        ConfigError: this OpenCV comes without it.
    """
    path = Path(cv2.__file__).parent / "data" / CASCADE
    if not hasattr(cv2, "CascadeClassifier") or not path.is_file():
        raise ConfigError(
            f"OpenCV {cv2.__version__} comes without the basic detector of faces.",
            where="data.face_detector",
            fix='Install OpenCV 4 with: pip install "likeness[face]" (or set '
            "data.face_download=true, which gets a better detector).",
        )
    return HaarFinder(path.read_text(encoding="utf-8")), (
        "Faces are looked for by OpenCV's basic detector: it misses faces that are turned or "
        "tilted and cannot tell people apart. data.face_download=true gets a better one."
    )
