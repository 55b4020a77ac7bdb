"""YuNet, which finds faces, and SFace, which tells people apart, as OpenCV runs them.

YuNet: Wu, Peng, Yu, "YuNet: A Tiny Millisecond-level Face Detector" (2023). SFace: Zhong et al.,
arXiv 2205.12010. Both are published in OpenCV's model zoo.
"""

from __future__ import annotations

import hashlib
import threading

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.faces import WIDTH
from trainer.faces.models import (
    SFACE,
    YUNET,
    FaceModels,
    ModelFile,
    missing_model,
    read_model,
    unusable_model,
)
from trainer.faces.pictures import box_within, largest_first, resized
from trainer.types import Face

# YuNet was trained on faces of 10 to 300 px (its page in the model zoo). At the first size these
# are 2 to 47 % of the longest side, at the second, tried where nothing was found, up to 94 %.
SIDES_PX = (640, 320)
# OpenCV's own values: the least score of a face, and the overlap at which two finds are one face.
SCORE, OVERLAP = 0.9, 0.3
LANDMARKS = 5
ALIGNED_PX = 112  # the side of the picture that SFace sees
# Faces are reduced to this before they are cut out: OpenCV's warping would skip pixels otherwise.
FACE_PX = 128


class _Detector(threading.local):
    """A detector for each thread: OpenCV's must not be called by two at once."""

    def __init__(self, content: bytes) -> None:
        self.net = cv2.FaceDetectorYN.create(
            "onnx", _buffer(content), _buffer(b""), (ALIGNED_PX, ALIGNED_PX), SCORE, OVERLAP
        )

    def rows(self, bgr: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Left, top, width, height, five landmarks and the score of each face: [N, 15]."""
        self.net.setInputSize((bgr.shape[1], bgr.shape[0]))
        rows = self.net.detect(bgr)[1]
        return np.empty((0, 15), np.float32) if rows is None else np.asarray(rows, np.float32)


class YuNetFinder:
    """Finds faces with their landmarks; tells people apart where it has SFace.

    Args:
        detector: content of YuNet's file. recognizer: content of SFace's file, or None.

    Raises:
        cv2.error: OpenCV cannot read one of them.
    """

    certain = True

    def __init__(self, detector: bytes, recognizer: bytes | None = None) -> None:
        self.name = f"yunet {hashlib.sha256(detector).hexdigest()} OpenCV {cv2.__version__}"
        self._detector = _Detector(detector)
        # One for all threads, as it is large: 37 MB.
        self._lock = threading.Lock()
        self._recognizer = (
            cv2.FaceRecognizerSF.create("onnx", _buffer(recognizer), _buffer(b""))
            if recognizer is not None
            else None
        )

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        """The faces of an upright RGB picture in its own pixels, the largest first."""
        longest, small = max(image.size), image
        for side in dict.fromkeys(min(side, longest) for side in SIDES_PX):
            small = resized(small, side)
            if faces := self._find_in(small, image):
                return faces
        return ()

    def _find_in(self, small: Image.Image, image: Image.Image) -> tuple[Face, ...]:
        """The faces of a picture, found in a smaller copy of it."""
        rows = self._detector.rows(_bgr(small))
        scale = np.array([image.width / small.width, image.height / small.height])
        faces = []
        for row in rows[np.isfinite(rows).all(axis=1)].astype(np.float64):
            points = row[:14].reshape(7, 2) * scale
            (left, top), (width, height) = points[:2]
            faces.append(
                Face(
                    box_within(left, top, left + width, top + height, image),
                    float(row[14]),
                    tuple((float(x), float(y)) for x, y in points[2:]),
                )
            )
        return largest_first(faces)

    def embed(self, image: Image.Image, face: Face) -> NDArray[np.float64] | None:
        """Who a face belongs to, as a unit vector [128]; None without SFace or landmarks."""
        if self._recognizer is None or len(face.landmarks) != LANDMARKS:
            return None
        region, row = _region(image, face)
        with self._lock:
            aligned = self._recognizer.alignCrop(_bgr(region), row)
            vector_D = self._recognizer.feature(aligned)[0].astype(np.float64)
        length = float(np.linalg.norm(vector_D))
        return vector_D / length if length > 0 else None


def open_yunet(models: FaceModels) -> tuple[YuNetFinder, str]:
    """YuNet, with SFace where there is one, and what they cannot do.

    Raises:
        ConfigError: YuNet's file is not there, or SFace's where it is needed.
        ModelError: a file is missing, damaged or something else, or cannot be downloaded.
    """
    detector = read_model(YUNET, models.detector, download=models.download)
    if detector is None:
        raise missing_model(YUNET)
    recognizer = read_model(SFACE, models.recognizer, download=models.download)
    if recognizer is None and models.both:
        raise missing_model(SFACE)
    _try_detector(detector)
    if recognizer is None:
        return YuNetFinder(detector.content), (
            "Faces are found by YuNet. To tell people apart as well, it needs SFace's file "
            "(data.face_recognizer_file, or data.face_download=true)."
        )
    _try_recognizer(recognizer)
    finder = YuNetFinder(detector.content, recognizer.content)
    return finder, "Faces are found by YuNet and told apart by SFace."


def _try_detector(file: ModelFile) -> None:
    """Look at an empty picture, so that a wrong file is known before the first photo.

    Raises:
        ModelError: OpenCV cannot run it, or it is no YuNet.
    """
    try:
        _Detector(file.content).rows(np.zeros((64, 64, 3), np.uint8))
    except cv2.error as error:
        raise unusable_model(YUNET, file, error.err) from error


def _try_recognizer(file: ModelFile) -> None:
    try:
        net = cv2.FaceRecognizerSF.create("onnx", _buffer(file.content), _buffer(b""))
        shape = net.feature(np.zeros((ALIGNED_PX, ALIGNED_PX, 3), np.uint8)).shape
    except cv2.error as error:
        raise unusable_model(SFACE, file, error.err) from error
    if shape != (1, WIDTH):
        raise unusable_model(SFACE, file, f"it answers with {shape}, not (1, {WIDTH})")


def _region(image: Image.Image, face: Face) -> tuple[Image.Image, NDArray[np.float32]]:
    """The face with as much again around it, reduced, and its row of numbers there: [15]."""
    box = face.box
    around = box_within(
        box.left - box.width / 2,
        box.top - box.height / 2,
        box.right + box.width / 2,
        box.bottom + box.height / 2,
        image,
    )
    scale = min(1.0, FACE_PX / max(box.width, box.height))
    size = (max(1, round(around.width * scale)), max(1, round(around.height * scale)))
    region = image.resize(
        size,
        Image.Resampling.BICUBIC,
        (around.left, around.top, around.right, around.bottom),
        reducing_gap=2.0,
    )
    factor = np.array([size[0] / around.width, size[1] / around.height])
    points = np.array([(box.left, box.top), (box.right, box.bottom), *face.landmarks])
    points = (points - (around.left, around.top)) * factor
    points[1] -= points[0]
    return region, np.append(points.ravel(), face.score).astype(np.float32)


def _bgr(image: Image.Image) -> NDArray[np.uint8]:
    """OpenCV's order of the colours."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _buffer(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)
