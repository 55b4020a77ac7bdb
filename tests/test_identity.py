"""The identity score tells one avatar from all others, whatever it wears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
)

from pretraining import identity as training
from pretraining.identity_evaluation import (
    held_out_looks,
    held_out_pairs,
    pictures_of,
    separation,
    soft,
    unseen_of,
)
from pretraining.looks import HELD_OUT_HAIR_STYLE, HELD_OUT_MARK, HELD_OUT_SKIN, sample_identity
from pretraining.sample_sets import ZIA, other_avatars, true_pictures
from pretraining.score_training import ScoreRecipe, export_net
from pretraining.training import generator
from trainer.errors import ModelError
from trainer.scoring.avatar_net import FOLDER
from trainer.scoring.embedders import AvatarEmbedder, FolderEmbedder
from trainer.scoring.identity import IdentityScorer

DATASETS = Path(__file__).parent.parent / "datasets"


@pytest.fixture(scope="module")
def embedder() -> AvatarEmbedder:
    return AvatarEmbedder.load()


@pytest.fixture(scope="module")
def strangers() -> list[Image.Image]:
    return other_avatars(120, seed=22)


@pytest.fixture(scope="module")
def zia_scorer() -> IdentityScorer:
    files = sorted(path for path in (DATASETS / "zia").iterdir() if path.suffix != ".txt")
    photos = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in files]
    return IdentityScorer.fit(photos, other_avatars(60, seed=21))


def test_unseen_pictures_of_zia_stand_apart_from_other_avatars(
    zia_scorer: IdentityScorer, strangers: list[Image.Image]
) -> None:
    true = true_pictures(60, seed=23)
    for same, other in ((true, strangers), (soft(true), soft(strangers))):
        result = separation(zia_scorer.score(same), zia_scorer.score(other))
        assert result.auc >= 0.99
        assert result.same.mean() == pytest.approx(1.0, abs=0.15)
        assert result.other.mean() == pytest.approx(0.0, abs=0.15)


@pytest.mark.parametrize(
    ("changes", "at_most"),
    [({"skin": "green"}, 0.85), ({"hair_style": "curly", "hair_colour": "black"}, 0.85)],
)
def test_who_shares_one_look_with_zia_scores_lower(
    zia_scorer: IdentityScorer, changes: dict[str, str], at_most: float
) -> None:
    near = zia_scorer.score(pictures_of(replace(ZIA, **changes), 30, seed=24))
    assert np.mean(near) < at_most


def test_held_out_avatars_are_told_apart(embedder: AvatarEmbedder) -> None:
    assert held_out_pairs(embedder, 40, seed=31, softened=False).auc >= 0.97


@pytest.mark.parametrize("number", range(3))
def test_looks_that_were_never_trained_on(embedder: AvatarEmbedder, number: int) -> None:
    assert unseen_of(embedder, held_out_looks(32)[number], seed=33 + number).auc >= 0.97


def test_training_never_shows_the_held_out_looks() -> None:
    avatars = [training.avatar(number) for number in range(400)]
    for look in ("skin", "hair_style", "mark"):
        shown = {getattr(avatar, look) for avatar in avatars}
        assert not shown & {HELD_OUT_SKIN, HELD_OUT_HAIR_STYLE, HELD_OUT_MARK}
    assert all(one != other for one, other in zip(avatars[::2], avatars[1::2], strict=True))


def test_vectors_have_length_one_and_ignore_mirroring(embedder: AvatarEmbedder) -> None:
    images = true_pictures(3, seed=25)
    vectors = embedder.embed(images)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
    mirrored = embedder.embed([ImageOps.mirror(image) for image in images])
    assert mirrored == pytest.approx(vectors, abs=1e-5)
    assert embedder.embed([]).shape == (0, vectors.shape[1])


def test_the_weights_are_small() -> None:
    assert (FOLDER / "identity.safetensors").stat().st_size <= 3 * 1024**2


def test_threads_are_left_as_they_were(embedder: AvatarEmbedder) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        embedder.embed(true_pictures(1, seed=26))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_missing_and_damaged_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weights of the identity net are missing") as caught:
        AvatarEmbedder.load(tmp_path)
    assert "python -m pretraining.identity" in str(caught.value)
    shutil.copy(FOLDER / "identity.json", tmp_path / "identity.json")
    with pytest.raises(ModelError, match="missing"):
        AvatarEmbedder.load(tmp_path)
    shutil.copy(FOLDER / "identity.safetensors", tmp_path / "identity.safetensors")
    facts = json.loads((tmp_path / "identity.json").read_text(encoding="utf-8"))
    facts["net"]["hidden"] += 1
    (tmp_path / "identity.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        AvatarEmbedder.load(tmp_path)


class _Constant:
    """An embedder for which all pictures are alike, or cancel each other out."""

    def __init__(self, vectors: list[list[float]]) -> None:
        self.vectors = vectors

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        return np.array([self.vectors[i % len(self.vectors)] for i in range(len(images))])


@pytest.mark.parametrize("vectors", [[[1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
def test_an_embedder_that_sees_nothing_gives_finite_scores(vectors: list[list[float]]) -> None:
    images = [Image.new("RGB", (8, 8))] * 4
    scorer = IdentityScorer.fit(images, images, _Constant(vectors))
    assert np.isfinite(scorer.score(images)).all()


def _folder(tmp_path: Path, kind: str) -> Path:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 20}  # fmt: skip
    models = {
        "clip": lambda: CLIPModel(
            CLIPConfig(
                text_config=text,
                vision_config=vision,
                projection_dim=12,
            )
        ),
        "clip vision": lambda: CLIPVisionModel(CLIPVisionConfig(**vision)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**vision)),
        "text": lambda: CLIPTextModel(CLIPTextConfig(**text)),
    }
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = BitImageProcessor(**sizes) if kind == "dinov2" else CLIPImageProcessor(**sizes)
    models[kind]().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("kind", "width"), [("clip", 12), ("clip vision", 16), ("dinov2", 16)])
def test_a_vision_model_of_a_folder_takes_the_place_of_ours(
    tmp_path: Path, kind: str, width: int, strangers: list[Image.Image]
) -> None:
    embedder = FolderEmbedder.load(_folder(tmp_path, kind))
    vectors = embedder.embed([strangers[0], strangers[0].resize((50, 80)), strangers[1]])
    assert vectors.shape == (3, width)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
    assert not np.allclose(vectors[0], vectors[2])
    assert embedder.embed([]).shape[0] == 0
    scorer = IdentityScorer.fit(true_pictures(4, seed=27), strangers[:6], embedder)
    assert np.mean(scorer.photos_scores) <= 1.0 + 1e-6
    assert len(scorer.score(strangers[6:8])) == 2


def test_a_folder_without_a_vision_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vision model cannot be loaded"):
        FolderEmbedder.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no vision model but a CLIPTextModel"):
        FolderEmbedder.load(_folder(tmp_path, "text"))


def test_recolouring_keeps_grey_and_changes_colours() -> None:
    grey = torch.linspace(-1, 1, 7).expand(1, 3, 1, 7)
    assert torch.allclose(training.recoloured(grey, generator(1)), grey, atol=1e-5)
    red = torch.tensor([0.8, -0.5, -0.4])[None, :, None, None].expand(2, 3, 2, 2)
    turned = training.recoloured(red, generator(1))
    assert (turned - red).abs().max() > 0.2
    assert torch.equal(turned[0], turned[1])


def test_training_resumes_and_exports(tmp_path: Path) -> None:
    """A stopped training goes on as if it had not stopped, and its export can be loaded."""
    recipe = replace(
        ScoreRecipe(), widths=(4, 4, 4, 4), hidden=8, identity_avatars=8, identity_batch=8,
        identity_odd_avatars=4,
        identity_steps=2, save_every_steps=1,
    )  # fmt: skip
    straight = training.train_identity(recipe, tmp_path).state_dict()
    (tmp_path / training.STATE).unlink()
    training.train_identity(replace(recipe, identity_steps=1), tmp_path)
    resumed = training.train_identity(recipe, tmp_path)
    for key, value in resumed.state_dict().items():
        assert np.allclose(value.numpy(), straight[key].numpy(), atol=1e-6), key
    export_net(resumed, recipe, {}, tmp_path / "assets", "identity")
    images = pictures_of(sample_identity(5), 2, seed=1)
    assert AvatarEmbedder.load(tmp_path / "assets").embed(images).shape == (2, 64)
