"""Weights of pixels and latents: which parts of a picture count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.strategies import captioned, unhurried
from trainer.data.masks import face_weights, is_black, latent_weights, mask_weights
from trainer.types import Box, Bucketed, Face, Size


def crop(*boxes: Box, left: int = 0, top: int = 0) -> Bucketed:
    """128 x 128 of a photo of 400 x 300 that is resized to 200 x 150."""
    item = captioned(Path("a.jpg"), Size(400, 300))
    faces = tuple(Face(box, 1.0) for box in boxes)
    return Bucketed(item, Size(128, 128), Size(200, 150), left, top, faces=faces)


def test_a_mask_is_white_for_one_and_black_for_none() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    weights = mask_weights(Image.fromarray(values))
    assert (weights.shape, weights.dtype) == ((8, 32), torch.float32)
    assert torch.allclose(weights.flatten() * 255, torch.arange(256.0))


def test_black_is_black_whatever_compression_left_in_it() -> None:
    assert is_black(torch.zeros(8, 8))
    assert is_black(mask_weights(Image.new("L", (8, 8), 4)))
    weights = torch.zeros(8, 8)
    weights[3, 3] = 0.02
    assert not is_black(weights)


def test_the_face_counts_more_and_fades_into_the_rest() -> None:
    # In the crop the face is from (40, 20) to (80, 80).
    weights = face_weights(crop(Box(100, 60, 180, 180), left=10, top=10), 4.0)
    assert (weights.shape, weights.dtype) == ((128, 128), torch.float32)
    assert weights[50, 60] == weights[22, 60] == weights[78, 60] == weights[50, 42] == 4.0
    assert weights[50, 100] == weights[5, 60] == weights[19, 39] == weights[80, 80] == 1.0
    edge = weights[50, 80:90]
    assert 1.0 < edge[3] < 4.0
    assert (edge.diff() <= 0).all()
    assert weights.diff(dim=1).abs().max() < 0.6  # no hard edge
    assert torch.allclose(weights[20:80, 40:80], weights[20:80, 40:80].flip(0).flip(1), atol=1e-5)


def test_without_faces_all_counts_alike() -> None:
    assert torch.equal(face_weights(crop(), 4.0), torch.ones(128, 128))
    outside = crop(Box(350, 250, 400, 300))
    assert torch.equal(face_weights(outside, 4.0), torch.ones(128, 128))


def test_overlapping_faces_count_once() -> None:
    one, two = Box(100, 60, 180, 180), Box(120, 60, 200, 180)
    both = face_weights(crop(one, two), 3.0)
    assert both.max() == 3.0
    expected = torch.maximum(face_weights(crop(one), 3.0), face_weights(crop(two), 3.0))
    assert torch.equal(both, expected)


def test_latents_take_the_mean_of_their_area() -> None:
    weights = torch.zeros(16, 24)
    weights[:8, :8] = 1.0
    weights[8:12, 16:] = 0.5
    latents = latent_weights(weights, 2, 3)
    assert torch.allclose(latents, torch.tensor([[1, 0, 0], [0, 0, 0.25]]) * 6 / 1.25)


@unhurried
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 2**32),
    st.floats(1e-3, 100),
)
def test_latent_weights_have_a_mean_of_one(
    height: int, width: int, factor: int, seed: int, scale: float
) -> None:
    shape = (height * factor, width * factor)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * scale
    latents = latent_weights(weights, height, width)
    assert (latents.shape, latents.dtype) == ((height, width), torch.float32)
    assert latents.mean() == pytest.approx(1.0, abs=1e-5)
    assert latents.min() >= 0
    assert torch.allclose(latents, latent_weights(weights * 3, height, width), rtol=1e-4)


def test_alike_stays_alike() -> None:
    assert torch.allclose(latent_weights(torch.full((16, 16), 0.2), 2, 2), torch.ones(2, 2))


def test_nothing_to_be_trained_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing to be trained"):
        latent_weights(torch.zeros(16, 16), 2, 2)
