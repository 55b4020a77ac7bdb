"""Which score a run gets: what its settings say, checked early, and opened when samples are drawn.

kind    preview.scorer        likeness or style is
face    own                   the place among pictures seen by our net, which knows our drawings
face    plain                 the place among pictures compared without a network
face    face                  the likeness of faces, by SFace
style   auto, own, plain      the look, without a network
both    folder                closeness for a CLIP or DINOv2 model
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.config.settings import TrainConfig
from trainer.errors import ConfigError, DataError
from trainer.faces import WIDTH, FaceFinder, open_recognizer
from trainer.families import BaseFacts
from trainer.scoring import SCORERS, Scorer
from trainer.scoring.embedders import FolderEmbedder
from trainer.scoring.identity import IdentityScorer


class FaceEmbedder:
    """Pictures as the vector of their largest face.

    A picture without a face gets zeros: the closeness of 0 to everybody, which is what SFace gives
    two strangers on average. So a sample without a face scores as another person does.
    """

    def __init__(self, finder: FaceFinder) -> None:
        self._finder = finder

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Unit vectors, or zeros: [N, 128]."""
        vectors_ND = np.zeros((len(images), WIDTH))
        for number, image in enumerate(images):
            vector_D = self._embed(image)
            if vector_D is not None:
                vectors_ND[number] = vector_D
        return vectors_ND

    def sees(self, image: Image.Image) -> bool:
        """Whether it finds a face in a picture."""
        return self._embed(image) is not None

    def _embed(self, image: Image.Image) -> NDArray[np.float64] | None:
        faces = self._finder.find(image)
        return self._finder.embed(image, faces[0]) if faces else None


def scorer_name(config: TrainConfig, facts: BaseFacts) -> str:
    """A name of `SCORERS`, or "folder" or "face" for an identity score with another embedder."""
    asked = config.preview.scorer
    if asked in ("folder", "face"):
        return asked
    if config.run.kind == "style":
        return "style"
    if asked == "auto":
        if facts.embedded:
            return "identity"
        return "folder" if config.preview.scorer_folder else "likeness"
    return "identity" if asked == "own" else "likeness"


def check_scorer(config: TrainConfig, facts: BaseFacts) -> None:
    """See that the score can be had, before a base is loaded or an older run is replaced.

    Raises:
        ConfigError: the score does not fit the run, or something it needs is not there.
        ModelError: one of the files for faces is damaged or cannot be downloaded.
    """
    if not config.preview.every_steps:
        return
    name = scorer_name(config, facts)
    if name == "identity" and not facts.embedded:
        raise ConfigError(
            f"Our own net knows the embedded base's drawings only, not what '{facts.name}' draws.",
            where="preview.scorer = own",
            fix="Set preview.scorer to plain, face or folder.",
        )
    if name == "folder":
        _check_folder(config.preview.scorer_folder)
    if name == "face":
        _check_faces(config, facts)


def fit_scorer(
    config: TrainConfig,
    facts: BaseFacts,
    photos: Sequence[Image.Image],
    others: Sequence[Image.Image],
) -> Scorer:
    """The score of a run, fitted.

    Args:
        photos, others: upright RGB pictures of any size, as `Scorer.fit` takes them.

    Raises:
        ConfigError, ModelError: what the score needs is missing or damaged.
        DataError: likeness of faces was asked for and no photo shows one.
    """
    name = scorer_name(config, facts)
    if name == "folder":
        folder = Path(config.preview.scorer_folder).expanduser()
        return IdentityScorer.fit(photos, others, FolderEmbedder.load(folder))
    if name == "face":
        return IdentityScorer.fit(photos, others, _face_embedder(config, photos))
    fitted: Scorer = SCORERS.load(name).fit(photos, others)
    return fitted


def _face_embedder(config: TrainConfig, photos: Sequence[Image.Image]) -> FaceEmbedder:
    faces = FaceEmbedder(_recognizer(config))
    if not any(faces.sees(photo) for photo in photos):
        raise DataError(
            "YuNet finds no face in any of the photos as they are trained, so likeness cannot be "
            "measured by faces.",
            where="preview.scorer = face",
            fix="Set preview.scorer to plain or folder, or train on photos with larger faces.",
        )
    return faces


def _recognizer(config: TrainConfig) -> FaceFinder:
    data = config.data
    return open_recognizer(
        data.face_detector_file, data.face_recognizer_file, download=data.face_download
    )


def _check_faces(config: TrainConfig, facts: BaseFacts) -> None:
    if config.run.kind == "style":
        raise ConfigError(
            "A style is not measured by faces.",
            where="preview.scorer = face",
            fix="Set preview.scorer to auto, or to folder with a CLIP or DINOv2 model.",
        )
    if facts.embedded:
        raise ConfigError(
            "The embedded base draws avatars, and no detector sees the faces of drawings.",
            where="preview.scorer = face",
            fix="Leave preview.scorer at auto.",
        )
    _recognizer(config)


def _check_folder(name: str) -> None:
    fix = (
        "Give a folder with config.json, preprocessor_config.json and model.safetensors, as CLIP "
        "and DINOv2 are published."
    )
    if not name:
        raise ConfigError(
            "preview.scorer is folder, but no folder is named.",
            where="preview.scorer_folder",
            fix=fix,
        )
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            "The folder of the model that likeness is measured by is not there.",
            where=f"preview.scorer_folder = {folder}",
            fix=fix,
        )
    missing = [
        pattern
        for pattern in ("config.json", "preprocessor_config.json", "*.safetensors")
        if not any(folder.glob(pattern))
    ]
    if missing:
        raise ConfigError(
            f"The folder holds no vision model: it has no {', no '.join(missing)}.",
            where=f"preview.scorer_folder = {folder}",
            fix=fix,
        )
