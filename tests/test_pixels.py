"""From a placed photo to a tensor and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.strategies import captioned, gradient
from trainer.data.buckets import assign, make_buckets
from trainer.data.pixels import load_pixels, to_pil
from trainer.errors import DataError
from trainer.types import Bucketed, Size


def placed(path: Path, bucket: Size, resized: Size, left: int = 0, top: int = 0) -> Bucketed:
    with Image.open(path) as image:
        size = Size(*image.size)
    return Bucketed(captioned(path, size), bucket, resized, left, top)


def test_without_a_resize_every_pixel_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    pixels = load_pixels(placed(path, Size(32, 24), Size(48, 40), left=5, top=7))
    assert (pixels.shape, pixels.dtype) == ((3, 24, 32), torch.float32)
    assert pixels.is_contiguous()
    expected = noise[7:31, 5:37].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(pixels.numpy() - expected).max() < 1e-6
    assert np.array_equal(np.asarray(to_pil(pixels)), noise[7:31, 5:37])


def test_the_range_is_minus_one_to_one_and_back() -> None:
    values = torch.arange(256, dtype=torch.float32).div(127.5).sub(1)
    pixels = values.reshape(1, 16, 16).expand(3, 16, 16)
    back = np.asarray(to_pil(pixels))
    assert back[..., 2].reshape(-1).tolist() == list(range(256))
    assert (values[0].item(), values[-1].item()) == (-1.0, 1.0)
    beyond = to_pil(torch.tensor([-7.0, 0.0, 7.0], dtype=torch.bfloat16).reshape(3, 1, 1))
    assert beyond.getpixel((0, 0)) == (0, 128, 255)


def test_flip_mirrors_the_crop(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    place = placed(path, Size(32, 32), Size(48, 40), left=3, top=2)
    assert torch.equal(load_pixels(place, flip=True), load_pixels(place).flip(-1))


def test_fine_patterns_are_averaged_not_aliased(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).convert("RGB").save(path)
    pixels = load_pixels(placed(path, Size(32, 32), Size(32, 32)))
    assert pixels[:, 4:-4, 4:-4].abs().max() < 0.05


def test_the_background_reaches_transparent_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(path)
    place = placed(path, Size(32, 32), Size(32, 32))
    assert load_pixels(place).min() == 1.0
    assert load_pixels(place, background=(255, 0, 255))[:, 0, 0].tolist() == [1.0, -1.0, 1.0]


def test_a_photo_that_changed_size_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    place = placed(path, Size(32, 32), Size(48, 40))
    gradient(90, 80).save(path)
    with pytest.raises(DataError) as caught:
        load_pixels(place)
    assert str(caught.value) == (
        "a.png changed while it was in use: 48x40 px became 90x80.\n"
        f"  {path}\n"
        "Leave the photos as they are and start again."
    )
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png is gone"):
        load_pixels(place)


def test_real_photographs_keep_their_look(tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    buckets = make_buckets(64, step_px=16)
    expected = {"astronaut": Size(64, 64), "coffee": Size(80, 48), "chelsea": Size(80, 48)}
    for name, bucket in expected.items():
        truth = getattr(data, name)()
        Image.fromarray(truth).save(tmp_path / f"{name}.jpg", quality=95)
        size = Size(truth.shape[1], truth.shape[0])
        place = assign(size, buckets)
        assert place.bucket == bucket
        pixels = load_pixels(Bucketed(captioned(tmp_path / f"{name}.jpg", size), *place))
        assert pixels.shape == (3, bucket.height, bucket.width)
        # The mean colour of the part of the original that the crop covers.
        scale = size.width / place.resized.width
        top, left = round(place.top * scale), round(place.left * scale)
        height, width = round(bucket.height * scale), round(bucket.width * scale)
        part = truth[top : top + height, left : left + width].mean(axis=(0, 1)) / 127.5 - 1
        assert np.abs(pixels.mean(dim=(1, 2)).numpy() - part).max() < 0.02
