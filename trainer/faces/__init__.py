"""Finding faces in photos, and telling people apart by them.

Everything here needs OpenCV, which comes with the extra `face`; without it, and for drawings, there
is no finder, and whoever asks for one is told so in a sentence for the user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from trainer.errors import ConfigError
from trainer.faces.models import FaceModels, require_given
from trainer.registry import Entry, Registry
from trainer.types import Face

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

# The cosine from which SFace's vectors are of one person: OpenCV's tutorial "DNN-based Face
# Detection And Recognition", which gives an accuracy of 99.8 % for it (on pairs of LFW).
SAME_PERSON = 0.363
WIDTH = 128  # of its vectors


class FaceFinder(Protocol):
    """Finds faces; may be called from several threads at once."""

    @property
    def name(self) -> str:
        """Equal for finders that find the same: its name in `FINDERS`, and what runs it."""
        ...

    @property
    def certain(self) -> bool:
        """Whether a photo in which it finds no face can be said to show none."""
        ...

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        """The faces of an upright RGB picture in its own pixels, the largest first."""
        ...

    def embed(self, image: Image.Image, face: Face) -> NDArray[np.float64] | None:
        """Who a face found in this picture belongs to, as a unit vector [128].

        None where the finder cannot tell people apart.
        """
        ...


class FinderLoader(Protocol):
    """What an entry of `FINDERS` stands for."""

    def __call__(self, models: FaceModels) -> tuple[FaceFinder, str]:
        """Open the finder; the text says to the user what it is and what it cannot do.

        Raises:
            ConfigError: what it needs is not there.
            ModelError: a file is missing, damaged or something else than it should be.
        """
        ...


# The best first: `auto` takes the first that can be opened.
FINDERS = Registry(
    "face finder",
    {
        "yunet": Entry(
            "trainer.faces.yunet:open_yunet",
            "YuNet, a small network that finds turned and small faces, and SFace beside it",
            extra="face",
        ),
        "haar": Entry(
            "trainer.faces.haar:open_haar",
            "the basic detector that comes with OpenCV 4",
            extra="face",
        ),
    },
)


def open_finder(
    detector: str, detector_file: str, recognizer_file: str, *, download: bool, drawings: bool
) -> tuple[FaceFinder | None, str]:
    """The finder that was asked for, and a sentence that says to the user what it can see.

    Args:
        detector: a name of `FINDERS`, "auto" for the best that is there, or "none".
        detector_file, recognizer_file: YuNet's and SFace's .onnx files; "" takes the copies that
            were downloaded before.
        download: fetch files that are neither given nor there.
        drawings: the pictures are drawings, whose faces no detector finds.

    Raises:
        ConfigError: the finder asked for by name cannot be had, and why.
        ModelError: a file is missing, damaged or something else, or cannot be downloaded.
    """
    if detector == "none":
        return None, "Faces are not looked for: data.face_detector is none."
    if drawings:
        return None, "Faces are not looked for: no detector sees the faces of drawings."
    models = FaceModels(detector_file, recognizer_file, download)
    require_given(models)
    if detector != "auto":
        return _open(detector, models)
    missing = ""
    for name in FINDERS:
        try:
            return _open(name, models)
        except ConfigError as error:
            missing = f"{error.what} {error.fix}"
    return None, f"Faces are not looked for. {missing}"


def open_recognizer(detector_file: str, recognizer_file: str, *, download: bool) -> FaceFinder:
    """A finder that tells people apart: YuNet with SFace.

    Raises:
        ConfigError: OpenCV or one of the two files is not there.
        ModelError: as `open_finder`.
    """
    return _open("yunet", FaceModels(detector_file, recognizer_file, download, both=True))[0]


def same_person(one_D: NDArray[np.float64], other_D: NDArray[np.float64]) -> bool:
    """Whether two of SFace's unit vectors are of one person (`SAME_PERSON`)."""
    return float(one_D @ other_D) >= SAME_PERSON


def _open(name: str, models: FaceModels) -> tuple[FaceFinder, str]:
    load: FinderLoader = FINDERS.load(name)
    return load(models)
