"""Which score a run gets, and that it is known early when it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests import face_models
from trainer.config.settings import TrainConfig
from trainer.errors import ConfigError, DataError, ModelError
from trainer.faces import open_recognizer
from trainer.families import BaseFacts
from trainer.scoring.identity import IdentityScorer
from trainer.scoring.likeness import LikenessScorer
from trainer.scoring.style import StyleScorer
from trainer.training.scorer import FaceEmbedder, check_scorer, fit_scorer, scorer_name

RED, BLUE, YELLOW = (200, 20, 20), (20, 20, 200), (200, 200, 20)


@pytest.fixture(autouse=True)
def _empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was downloaded on this machine is not used here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def base(*, embedded: bool) -> BaseFacts:
    return BaseFacts(
        family="sd1",
        name="embedded" if embedded else "sd15",
        folder=Path("base"),
        resolution=64 if embedded else 512,
        bucket_step_px=16,
        width=768,
        pixels_per_latent=8,
        prediction="epsilon",
        fits_real=not embedded,
        embedded=embedded,
    )


def settings(kind: str, scorer: str, **data: Any) -> TrainConfig:
    preview = {"scorer": scorer, "scorer_folder": data.pop("folder", "")}
    return TrainConfig.model_validate({"run": {"kind": kind}, "preview": preview, "data": data})


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    """A CLIP of random weights, as transformers saves it."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    folder = tmp_path / "clip"
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def face_files(tmp_path: Path) -> dict[str, str]:
    detector, recognizer = tmp_path / "detector.onnx", tmp_path / "recognizer.onnx"
    detector.write_bytes(face_models.detector())
    recognizer.write_bytes(face_models.recognizer())
    return {"face_detector_file": str(detector), "face_recognizer_file": str(recognizer)}


def person(
    colour: tuple[int, int, int], *, face: bool = True, size: tuple[int, int] = (192, 256)
) -> Image.Image:
    """A picture of one colour; the detector sees a face in the blue square."""
    picture = Image.new("RGB", size, colour)
    if face:
        ImageDraw.Draw(picture).rectangle((64, 96, 95, 127), fill=(0, 0, 255))
    return picture


@pytest.mark.parametrize(
    ("kind", "scorer", "folder", "embedded", "name"),
    [
        ("face", "auto", "", True, "identity"),
        ("face", "auto", "clip", True, "identity"),
        ("face", "auto", "", False, "likeness"),
        ("face", "auto", "clip", False, "folder"),
        ("face", "own", "", True, "identity"),
        ("face", "plain", "clip", True, "likeness"),
        ("face", "plain", "", False, "likeness"),
        ("face", "folder", "clip", True, "folder"),
        ("face", "face", "", False, "face"),
        ("style", "auto", "clip", False, "style"),
        ("style", "own", "", True, "style"),
        ("style", "plain", "", False, "style"),
        ("style", "folder", "clip", True, "folder"),
    ],
)
def test_every_run_gets_the_score_it_asks_for(
    kind: str, scorer: str, folder: str, embedded: bool, name: str
) -> None:
    config = settings(kind, scorer, folder=folder)
    assert scorer_name(config, base(embedded=embedded)) == name


def test_what_can_be_had_passes_the_check(vision_folder: Path, face_files: dict[str, str]) -> None:
    real, embedded = base(embedded=False), base(embedded=True)
    check_scorer(settings("face", "auto"), embedded)
    check_scorer(settings("face", "auto"), real)
    check_scorer(settings("face", "own"), embedded)
    check_scorer(settings("style", "own"), real)
    check_scorer(settings("style", "folder", folder=str(vision_folder)), embedded)
    check_scorer(settings("face", "face", **face_files), real)


@pytest.mark.parametrize(
    ("kind", "scorer", "embedded", "words", "where"),
    [
        ("face", "own", False, "not what 'sd15' draws", "preview.scorer = own"),
        ("face", "face", True, "faces of drawings", "preview.scorer = face"),
        ("style", "face", False, "style is not measured by faces", "preview.scorer = face"),
        ("face", "folder", False, "no folder is named", "preview.scorer_folder"),
        ("face", "face", False, "YuNet's file is not there", "data.face_detector_file"),
    ],
)
def test_what_cannot_be_had_is_known_early(
    kind: str, scorer: str, embedded: bool, words: str, where: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_scorer(settings(kind, scorer), base(embedded=embedded))
    assert caught.value.where == where
    assert caught.value.fix


def test_a_run_without_samples_needs_no_score() -> None:
    config = TrainConfig.model_validate({"preview": {"scorer": "own", "every_steps": 0}})
    check_scorer(config, base(embedded=False))


def test_a_recognizer_that_is_missing_or_damaged_is_known_early(
    face_files: dict[str, str], tmp_path: Path
) -> None:
    real = base(embedded=False)
    alone = {"face_detector_file": face_files["face_detector_file"]}
    with pytest.raises(ConfigError, match="SFace's file is not there"):
        check_scorer(settings("face", "face", **alone), real)
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    damaged = {**alone, "face_recognizer_file": str(tmp_path / "bad.onnx")}
    with pytest.raises(ModelError, match="SFace's file cannot be used"):
        check_scorer(settings("face", "face", **damaged), real)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "*.safetensors"])
def test_a_folder_without_a_model_is_known_early(vision_folder: Path, missing: str) -> None:
    config = settings("face", "auto", folder=str(vision_folder))
    check_scorer(config, base(embedded=False))
    for path in vision_folder.glob(missing):
        path.unlink()
    with pytest.raises(ConfigError, match="has no") as caught:
        check_scorer(config, base(embedded=False))
    assert missing in caught.value.what
    gone = settings("face", "auto", folder=str(vision_folder / "gone"))
    with pytest.raises(ConfigError, match="is not there"):
        check_scorer(gone, base(embedded=False))


@pytest.mark.parametrize(
    ("kind", "scorer", "embedded", "kept"),
    [
        ("face", "plain", False, LikenessScorer),
        ("face", "own", True, IdentityScorer),
        ("style", "auto", False, StyleScorer),
        ("style", "folder", False, IdentityScorer),
        ("face", "folder", True, IdentityScorer),
    ],
)
def test_scores_take_pictures_of_any_size(
    kind: str, scorer: str, embedded: bool, kept: type, vision_folder: Path
) -> None:
    photos = [person(RED), person(RED, size=(128, 160)), person((190, 30, 30))]
    others = [person(BLUE), person(YELLOW, size=(300, 200)), person((90, 90, 90))]
    config = settings(kind, scorer, folder=str(vision_folder))
    fitted = fit_scorer(config, base(embedded=embedded), photos, others)
    assert type(fitted) is kept
    near, far = fitted.score([photos[0].resize((384, 512)), person(BLUE)])
    assert np.mean(fitted.others_scores) == pytest.approx(0, abs=1e-9)
    assert near > far


def test_the_folders_model_is_the_one_that_scores(vision_folder: Path, tmp_path: Path) -> None:
    """Other weights give other scores."""
    photos, others = [person(RED), person((190, 30, 30))], [person(BLUE), person(YELLOW)]
    config = settings("face", "folder", folder=str(vision_folder))

    def score() -> float:
        return fit_scorer(config, base(embedded=True), photos, others).score([person((90, 9, 9))])[
            0
        ]

    before = score()
    torch.manual_seed(1)
    model = CLIPVisionModel(CLIPVisionConfig.from_pretrained(vision_folder))
    model.save_pretrained(vision_folder)
    assert score() != pytest.approx(before)


def test_likeness_of_faces(face_files: dict[str, str]) -> None:
    """The subject is near 1, others near 0, and a picture without a face counts as another."""
    config = settings("face", "face", **face_files)
    photos = [person(RED), person(RED, size=(256, 256)), person((190, 30, 30))]
    others = [person((20, 200, 20)), person((30, 190, 20)), person((20, 200, 20), face=False)]
    fitted = fit_scorer(config, base(embedded=False), photos, others)
    same, other, faceless = fitted.score(
        [person((200, 25, 20)), person((25, 195, 20)), person(RED, face=False)]
    )
    assert same == pytest.approx(1, abs=0.1)
    assert other < 0.5
    assert faceless < 0.5


def test_a_picture_without_a_face_has_no_vector(face_files: dict[str, str]) -> None:
    finder = open_recognizer(*face_files.values(), download=False)
    embedder = FaceEmbedder(finder)
    vectors = embedder.embed([person(RED), person(RED, face=False)])
    assert vectors.shape == (2, 128)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0])
    assert embedder.embed([]).shape == (0, 128)


def test_the_largest_face_is_who_is_shown(face_files: dict[str, str]) -> None:
    """Beside the subject, a second and smaller face does not count."""
    embedder = FaceEmbedder(open_recognizer(*face_files.values(), download=False))
    alone = person(RED, size=(512, 256))
    beside = alone.copy()
    draw = ImageDraw.Draw(beside)
    draw.rectangle((256, 0, 511, 255), fill=YELLOW)
    draw.rectangle((384, 128, 399, 143), fill=(0, 255, 0))
    one, both = embedder.embed([alone, beside])
    assert one @ both == pytest.approx(1, abs=1e-3)


def test_photos_without_faces_are_no_measure_of_faces(face_files: dict[str, str]) -> None:
    config = settings("face", "face", **face_files)
    photos = [person(RED, face=False)] * 2
    with pytest.raises(DataError, match="no face in any of the photos"):
        fit_scorer(config, base(embedded=False), photos, [person(BLUE), person(YELLOW)])
