"""Measures an embedding on avatars that it was not trained on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretraining.avatars import draw_avatar
from pretraining.looks import Identity, sample_context, sample_identity
from pretraining.sample_sets import ZIA, face_set, other_avatars, render, true_pictures
from pretraining.score_training import load_base_vae, soft_copies
from trainer.scoring.embedders import Embedder
from trainer.scoring.identity import IdentityScorer

# Far from the seeds of the training avatars.
_HELD_OUT_SEED = 900_000_000
# Avatars that share all but one look with the face set's.
NEAR_ZIA = {
    "green skin": {"skin": "green"},
    "blue skin": {"skin": "blue"},
    "short hair": {"hair_style": "short"},
    "long hair": {"hair_style": "long"},
    "a pink mohawk": {"hair_colour": "pink"},
    "bald": {"hair_style": "bald"},
    "black curls": {"hair_style": "curly", "hair_colour": "black"},
    "a white bun": {"hair_style": "bun", "hair_colour": "white"},
    "the missing star": {"mark": "none"},
    "sunglasses": {"glasses": "sunglasses"},
    "small eyes": {"eyes": "small"},
    "square face": {"face": "square"},
}


@dataclass(frozen=True, slots=True)
class Separation:
    """How far two sets of scores lie apart; `auc` is the area under the ROC curve."""

    auc: float
    same: NDArray[np.float64]
    other: NDArray[np.float64]

    def __str__(self) -> str:
        parts = []
        for name, scores in (("same", self.same), ("other", self.other)):
            low, high = np.quantile(scores, (0.05, 0.95))
            parts.append(f"{name} {scores.mean():.2f} ({low:.2f} to {high:.2f})")
        return f"ROC AUC {self.auc:.4f}; {', '.join(parts)}"


def separation(same: Sequence[float], other: Sequence[float]) -> Separation:
    """The chance that a score of the first kind is above one of the second, ties counting half."""
    first, second = np.asarray(same, np.float64), np.sort(np.asarray(other, np.float64))
    below = np.searchsorted(second, first, "left") + np.searchsorted(second, first, "right")
    return Separation(float(below.mean() / (2 * len(second))), first, second)


def pictures_of(identity: Identity, count: int, seed: int) -> list[Image.Image]:
    """One avatar in contexts that follow from the seed."""
    rng = random.Random(f"pictures of {seed}")
    return [draw_avatar(identity, sample_context(rng.randrange(10**9))) for _ in range(count)]


def soft(images: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures through the embedded base's autoencoder, with some noise on the latents."""
    stacked = np.stack([np.asarray(image) for image in images])
    return [Image.fromarray(copy) for copy in soft_copies(stacked, load_base_vae(), 3, 0.2)]


def held_out_pairs(embedder: Embedder, avatars: int, seed: int, softened: bool) -> Separation:
    """Cosines of two pictures of one avatar, and of pictures of two avatars."""
    views = 4
    images = [
        image
        for number in range(avatars)
        for image in pictures_of(
            sample_identity(_HELD_OUT_SEED + seed * 10_000 + number), views, seed * 10_000 + number
        )
    ]
    vectors = embedder.embed(soft(images) if softened else images)
    cosine = vectors @ vectors.T
    who = np.arange(len(images)) // views
    upper = np.triu(np.ones_like(cosine, dtype=bool), 1)
    same = who[:, None] == who[None, :]
    return separation(cosine[upper & same].tolist(), cosine[upper & ~same].tolist())


def unseen_of(
    embedder: Embedder, identity: Identity, seed: int, softened: bool = False
) -> Separation:
    """Scores, calibrated on 14 pictures of an avatar, of others of it and of other avatars."""
    scorer = IdentityScorer.fit(
        pictures_of(identity, 14, 10 * seed), other_avatars(100, 10 * seed + 1), embedder
    )
    same, other = pictures_of(identity, 60, 10 * seed + 2), other_avatars(200, 10 * seed + 3)
    if softened:
        same, other = soft(same), soft(other)
    return separation(scorer.score(same), scorer.score(other))


def held_out_looks(seed: int) -> list[Identity]:
    """Avatars with looks that training never shows."""
    first, second, third = (sample_identity(_HELD_OUT_SEED + 77 * seed + k) for k in range(3))
    return [
        replace(first, skin="teal"),
        replace(second, hair_style="mohawk"),
        replace(third, skin="teal", hair_style="mohawk", mark="star"),
    ]


def evaluate(embedder: Embedder, seed: int) -> None:
    """Print all measurements."""
    for softened in (False, True):
        kind = "softened" if softened else "drawings"
        pairs = held_out_pairs(embedder, 200, seed, softened)
        print(f"pairs of pictures of 200 held-out avatars, {kind}: {pairs}")
    photos = [render(sample) for sample in face_set()]
    scorer = IdentityScorer.fit(photos, other_avatars(100, seed), embedder)
    true, others = true_pictures(200, seed), other_avatars(300, seed + 1)
    print(f"zia, drawings: {separation(scorer.score(true), scorer.score(others))}")
    print(f"zia, softened: {separation(scorer.score(soft(true)), scorer.score(soft(others)))}")
    for name, changes in NEAR_ZIA.items():
        near = scorer.score(pictures_of(replace(ZIA, **changes), 60, seed))
        print(f"  zia, but for {name}: {separation(scorer.score(true), near)}")
    for number, identity in enumerate(held_out_looks(seed)):
        result = unseen_of(embedder, identity, seed + number)
        print(f"{identity.skin} skin, {identity.hair_style}, {identity.mark}: {result}")
    aucs = [
        unseen_of(embedder, sample_identity(_HELD_OUT_SEED + 500 + k), seed + 10 + k).auc
        for k in range(10)
    ]
    print(f"10 held-out avatars, 14 photos each: ROC AUC {min(aucs):.4f} to {max(aucs):.4f}")
