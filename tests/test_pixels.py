"""From a placed photo to a tensor and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.strategies import captioned, gradient
from trainer.data.buckets import assign, make_buckets
from trainer.data.decode import WHITE, PictureError, decode_upright
from trainer.data.masks import face_weights
from trainer.data.pixels import crop_image, load_picture, to_pil
from trainer.errors import DataError
from trainer.types import Box, Bucketed, Face, Size, Variant


def placed(path: Path, bucket: Size, resized: Size, left: int = 0, top: int = 0) -> Bucketed:
    with Image.open(path) as image:
        size = Size(*image.size)
    return Bucketed(captioned(path, size), bucket, resized, left, top)


def pixels_of(bucketed: Bucketed, background: tuple[int, int, int] = WHITE) -> torch.Tensor:
    return load_picture(bucketed, background=background).pixels_CHW


def test_without_a_resize_every_pixel_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    pixels = pixels_of(placed(path, Size(32, 24), Size(48, 40), left=5, top=7))
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
    mirrored = replace(place, variant=Variant(flip=True))
    assert torch.equal(pixels_of(mirrored), pixels_of(place).flip(-1))


def test_fine_patterns_are_averaged_not_aliased(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).convert("RGB").save(path)
    pixels = pixels_of(placed(path, Size(32, 32), Size(32, 32)))
    assert pixels[:, 4:-4, 4:-4].abs().max() < 0.05


def test_the_background_reaches_transparent_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(path)
    place = placed(path, Size(32, 32), Size(32, 32))
    assert pixels_of(place).min() == 1.0
    assert pixels_of(place, background=(255, 0, 255))[:, 0, 0].tolist() == [1.0, -1.0, 1.0]


def test_a_photo_that_changed_size_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    place = placed(path, Size(32, 32), Size(48, 40))
    gradient(90, 80).save(path)
    with pytest.raises(DataError) as caught:
        pixels_of(place)
    assert str(caught.value) == (
        "a.png changed while it was in use: 48x40 px became 90x80.\n"
        f"  {path}\n"
        "Leave the photos as they are and start again."
    )
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png is gone"):
        pixels_of(place)


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
        pixels = pixels_of(Bucketed(captioned(tmp_path / f"{name}.jpg", size), *place))
        assert pixels.shape == (3, bucket.height, bucket.width)
        # The mean colour of the part of the original that the crop covers.
        scale = size.width / place.resized.width
        top, left = round(place.top * scale), round(place.left * scale)
        height, width = round(bucket.height * scale), round(bucket.width * scale)
        part = truth[top : top + height, left : left + width].mean(axis=(0, 1)) / 127.5 - 1
        assert np.abs(pixels.mean(dim=(1, 2)).numpy() - part).max() < 0.02


def mean_colour(place: Bucketed, variant: Variant) -> torch.Tensor:
    """Of a version, 0..255, [3]."""
    return (pixels_of(replace(place, variant=variant)).mean(dim=(1, 2)) + 1) * 127.5


def test_colours_of_a_version_change_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    place = placed(path, Size(32, 32), Size(48, 40), left=3, top=2)
    plain, darker = (mean_colour(place, Variant(1, brightness=b)) for b in (1.0, 0.8))
    assert torch.allclose(darker, plain * 0.8, atol=0.6)
    grey = mean_colour(place, Variant(1, saturation=0.0))
    assert grey.max() - grey.min() < 0.1
    less = pixels_of(replace(place, variant=Variant(number=1, contrast=0.5)))
    assert less.std() == pytest.approx(float(pixels_of(place).std()) / 2, rel=0.1)
    assert torch.equal(pixels_of(replace(place, variant=Variant(number=1))), pixels_of(place))


def test_what_is_shown_is_what_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient(90, 80).save(path)
    place = placed(path, Size(32, 32), Size(45, 40), left=5, top=3)
    for variant in (Variant(), Variant(2, True, 0.9, 1.2, 0.7)):
        place = replace(place, variant=variant)
        shown = crop_image(place, decode_upright(path))
        picture = load_picture(place)
        assert np.array_equal(np.asarray(to_pil(picture.pixels_CHW)), np.asarray(shown))
        assert picture.weights_HW is None


def half_white(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """White on the left, black on the right."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def with_mask(path: Path, mask: Image.Image, *, left: int = 0, top: int = 0) -> Bucketed:
    """32 x 32 of a photo of 64 x 48 that is trained at its own size."""
    gradient(64, 48).save(path)
    beside = path.with_name(f"{path.stem}-mask.png")
    mask.save(beside)
    place = placed(path, Size(32, 32), Size(64, 48), left=left, top=top)
    photo = replace(place.captioned.photo, mask=beside, mask_digest="1")
    return replace(place, captioned=replace(place.captioned, photo=photo))


def test_a_mask_is_cut_like_its_photo(tmp_path: Path) -> None:
    place = with_mask(tmp_path / "a.png", half_white(), left=20, top=5)
    weights = load_picture(place).weights_HW
    assert weights is not None
    assert (weights.shape, weights.dtype) == ((32, 32), torch.float32)
    assert torch.equal(weights[:, :12], torch.ones(32, 12))
    assert torch.equal(weights[:, 12:], torch.zeros(32, 20))
    mirrored = load_picture(replace(place, variant=Variant(flip=True))).weights_HW
    assert mirrored is not None
    assert torch.equal(mirrored, weights.flip(-1))


def test_a_resized_mask_is_averaged(tmp_path: Path) -> None:
    stripes = np.zeros((48, 64), dtype=np.uint8)
    stripes[::2] = 255
    place = with_mask(tmp_path / "a.png", Image.fromarray(stripes))
    weights = load_picture(replace(place, bucket=Size(32, 24), resized=Size(32, 24))).weights_HW
    assert weights is not None
    assert torch.allclose(weights, torch.full((24, 32), 0.5), atol=0.01)


def test_transparency_shows_the_background_and_may_be_left_out_of_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = gradient(64, 48)
    picture.putalpha(half_white())
    picture.save(path)
    place = placed(path, Size(32, 32), Size(64, 48), left=20, top=5)
    plain = load_picture(place, background=(255, 0, 0))
    masked = load_picture(place, background=(255, 0, 0), transparency="mask")
    assert plain.weights_HW is None
    assert torch.equal(plain.pixels_CHW, masked.pixels_CHW)
    assert plain.pixels_CHW[:, 0, -1].tolist() == [1.0, -1.0, -1.0]
    assert masked.weights_HW is not None
    assert masked.weights_HW[3].tolist() == [1.0] * 12 + [0.0] * 20
    gradient(64, 48).save(path)
    assert load_picture(place, transparency="mask").weights_HW is None


def test_faces_masks_and_transparency_are_multiplied(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    grey = Image.new("L", (64, 48), 51)  # 0.2
    place = with_mask(path, grey, left=20, top=5)
    picture = gradient(64, 48)
    picture.putalpha(half_white())
    picture.save(path)
    place = replace(place, faces=(Face(Box(24, 10, 44, 30), 1.0),))
    for flip in (False, True):
        version = replace(place, variant=Variant(flip=flip))
        weights = load_picture(version, transparency="mask", face_weight=3.0).weights_HW
        assert weights is not None
        weights = weights.flip(-1) if flip else weights
        assert torch.allclose(weights[:, :12], 0.2 * face_weights(place, 3.0)[:, :12])
        assert weights[:, 12:].max() == 0
    weights = load_picture(place).weights_HW
    assert weights is not None
    assert torch.allclose(weights, torch.full((32, 32), 0.2))


def test_face_weight_without_faces_asks_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    place = placed(path, Size(32, 32), Size(48, 40))
    assert load_picture(place, face_weight=3.0).weights_HW is None
    face = replace(place, faces=(Face(Box(5, 5, 20, 20), 1.0),))
    assert load_picture(face).weights_HW is None
    weights = load_picture(face, face_weight=3.0).weights_HW
    assert weights is not None
    assert (weights.min().item(), weights.max().item()) == (1.0, 3.0)


def test_a_photo_of_which_nothing_would_be_trained_is_named(tmp_path: Path) -> None:
    path = tmp_path / "anna.png"
    place = with_mask(path, half_white(), left=32)
    with pytest.raises(PictureError) as caught:
        load_picture(place)
    assert str(caught.value) == (
        "anna.png has a mask, anna-mask.png, that is black in all that is trained of it, so "
        "nothing could be learned.\n"
        f"  {path}\n"
        "Make visible what is to be learned (white in a mask), or remove the photo."
    )
    picture = gradient(64, 48)
    picture.putalpha(half_white())
    picture.save(path)
    clear = placed(path, Size(32, 32), Size(64, 48), left=32)
    assert load_picture(clear).weights_HW is None
    with pytest.raises(PictureError, match="is transparent in all that is trained of it"):
        load_picture(clear, transparency="mask")
    # Each leaves something, the two together nothing.
    other = with_mask(path, half_white().transpose(Image.Transpose.FLIP_LEFT_RIGHT), left=16)
    picture.save(path)
    with pytest.raises(PictureError, match="is transparent in all that is trained of it"):
        load_picture(other, transparency="mask")


def test_a_photo_that_changed_size_is_named_with_its_weights_too(tmp_path: Path) -> None:
    place = with_mask(tmp_path / "a.png", half_white())
    gradient(90, 80).save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="64x48 px became 90x80"):
        load_picture(place, transparency="mask")
