"""Pictures as they are written in the world, and what is seen of each."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from tests.hostile import (
    HAS_HEIC,
    ORIENTATION,
    STORED_AS,
    cmyk_profile,
    encoded,
    heic,
    moving,
    picture,
    srgb_profile,
)
from tests.strategies import gradient
from trainer.data.decode import (
    PictureError,
    decode_upright,
    decode_with_alpha,
    measure,
    read_mask,
)
from trainer.data.photos import scan_folder
from trainer.types import Size


def deviation(image: Image.Image, expected: Image.Image) -> float:
    difference = np.asarray(image).astype(float) - np.asarray(expected).astype(float)
    return float(np.abs(difference).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_gives_the_same_upright_picture(
    tmp_path: Path, orientation: int, kind: str
) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    upright = gradient()
    how = STORED_AS[orientation]
    stored = upright if how is None else upright.transpose(how)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(stored, kind, exif=exif.tobytes()))
    assert deviation(decode_upright(path), upright) <= 12
    assert scan_folder(tmp_path).photos[0].size == Size(48, 40)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\xff"])
def test_nonsense_in_the_metadata_is_ignored(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(gradient(), "JPEG", exif=exif, icc_profile=b"no profile"))
    assert deviation(decode_upright(path), gradient()) <= 12
    assert len(scan_folder(tmp_path).photos) == 1


def test_an_unknown_orientation_counts_as_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(gradient(), "JPEG", exif=exif.tobytes()))
    assert decode_upright(path).size == (48, 40)


def test_hidden_pixels_stay_hidden(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[..., 0] = 255  # red everywhere,
    pixels[:20, :, 3] = 255  # but to be seen in the upper half only,
    pixels[20:, :20, 3] = 128  # and half of it in a corner
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    on_white = np.asarray(decode_upright(path))
    assert on_white[0, 0].tolist() == [255, 0, 0]
    assert on_white[39, 39].tolist() == [255, 255, 255]
    assert on_white[39, 0].tolist() == [255, 127, 127]
    on_green = np.asarray(decode_upright(path, background=(0, 200, 0)))
    assert on_green[39, 39].tolist() == [0, 200, 0]
    assert on_green[39, 0].tolist() == [128, 100, 0]


def test_a_transparent_palette_colour_shows_the_background(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([250, 0, 0, 0, 0, 250])
    image.paste(1, (0, 0, 20, 40))
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name, transparency=0)
        decoded = decode_upright(tmp_path / name)
        assert decoded.getpixel((5, 5)) == (0, 0, 250)
        assert decoded.getpixel((35, 5)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        decoded = np.asarray(decode_upright(tmp_path / name))
        assert np.abs(decoded[..., 1] - ramp / 257).max() <= 0.5


@pytest.mark.parametrize("scale", [1.0, 3e38, 1e-30])
def test_floating_point_pictures_are_scaled_from_darkest_to_brightest(
    tmp_path: Path, scale: float
) -> None:
    ramp = np.linspace(-1, 1, 64 * 64).reshape(64, 64) * scale
    ramp[0, 1], ramp[0, 2], ramp[0, 3] = np.nan, np.inf, -np.inf
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "a.tif")
    decoded = np.asarray(decode_upright(tmp_path / "a.tif"))[..., 0]
    assert decoded[0, :4].tolist() == [0, 0, 255, 0]
    assert (decoded[-1, -1], abs(int(decoded[32, 0]) - 128) <= 1) == (255, True)


def test_a_constant_floating_point_picture_does_not_divide_by_zero(tmp_path: Path) -> None:
    for value in (0.5, np.nan):
        Image.fromarray(np.full((40, 40), value, np.float32)).save(tmp_path / "a.tif")
        assert decode_upright(tmp_path / "a.tif").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA", "RGBX", "YCbCr", "LAB"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(gradient(), srgb, lab, outputMode="LAB")
        assert converted is not None
    else:
        converted = gradient().convert(mode)
    converted.save(tmp_path / "a.tif")
    decoded = decode_upright(tmp_path / "a.tif")
    assert (decoded.mode, decoded.size) == ("RGB", (48, 40))
    if mode in ("CMYK", "RGBA", "RGBX", "YCbCr", "LAB"):
        assert deviation(decoded, gradient()) <= (16 if mode == "LAB" else 3)
    assert len(scan_folder(tmp_path).photos) == 1


def test_an_embedded_profile_is_applied(tmp_path: Path) -> None:
    """A profile whose red and blue are swapped must swap them back."""
    profile = srgb_profile()
    assert profile.count(b"rXYZ") == profile.count(b"bXYZ") == 1
    swapped = profile.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")
    red, green, blue = gradient().split()
    for icc, expected in ((profile, gradient()), (swapped, Image.merge("RGB", (blue, green, red)))):
        gradient().save(tmp_path / "a.png", icc_profile=icc)
        assert deviation(decode_upright(tmp_path / "a.png"), expected) <= 3


def test_a_profile_of_another_colour_space_is_ignored_or_fits(tmp_path: Path) -> None:
    srgb = srgb_profile()
    for mode in ("L", "CMYK"):
        image = gradient().convert(mode)
        image.save(tmp_path / "plain.tif")
        image.save(tmp_path / "tagged.tif", icc_profile=srgb)
        plain = decode_upright(tmp_path / "plain.tif")
        assert deviation(decode_upright(tmp_path / "tagged.tif"), plain) <= 2


def test_a_cmyk_profile_is_applied(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (40, 40))
    ink.paste((0, 0, 0, 255), (0, 0, 20, 40))
    ink.paste((255, 0, 0, 0), (0, 0, 10, 40))
    ink.save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    decoded = np.asarray(decode_upright(tmp_path / "a.tif")).astype(int)
    assert decoded[0, 15].max() <= 3
    assert decoded[0, 30].min() >= 252
    assert np.ptp(decoded[0, 5]) <= 3  # in this profile every ink is grey
    assert 120 < decoded[0, 5, 0] < 200
    assert scan_folder(tmp_path).photos[0].notices == ()


def test_what_is_unusual_is_said(tmp_path: Path) -> None:
    notices = {
        "a.gif": (moving(1, "GIF"), "is an animation; its first picture is used"),
        "b.tif": (moving(2, "TIFF"), "has several pages; its first one is used"),
        "c.png": (encoded(picture(3), "JPEG"), "is a JPEG picture, whatever its name says"),
        "d.jpg": (
            encoded(picture(4), "JPEG", icc_profile=b"no profile"),
            "has a colour profile that is broken or of another kind; it is read without",
        ),
    }
    for name, (content, _) in notices.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e.jpg").write_bytes(moving(5, "MPO"))  # as phones write every photo
    found = {photo.path.name: photo.notices for photo in scan_folder(tmp_path).photos}
    assert found == {name: (notice,) for name, (_, notice) in notices.items()} | {"e.jpg": ()}


@pytest.mark.skipif(not HAS_HEIC, reason="needs the extra heic")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_photos_are_read_upright(tmp_path: Path, orientation: int) -> None:
    """The encoder turns the picture by its own means, from the orientation it is given."""
    path = tmp_path / "a.heic"
    path.write_bytes(heic(1, orientation))
    expected = picture(1)
    how = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    undone = STORED_AS[how]
    upright = expected if undone is None else expected.transpose(undone)
    assert deviation(decode_upright(path), upright) <= 16
    (photo,) = scan_folder(tmp_path).photos
    assert (photo.size, photo.notices) == (Size(upright.width, upright.height), ())


def test_heic_photos_without_their_reader_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(heic(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (problem,) = scan_folder(tmp_path).problems
    assert problem.reason == "is a HEIC picture, which cannot be read yet"
    assert problem.fix.startswith('Install the reader with: pip install "likeness[heic]"')


def test_a_format_that_pillow_was_built_without_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient().save(tmp_path / "a.webp")
    Image.init()
    opener = Image.OPEN["WEBP"][0]
    monkeypatch.setitem(Image.OPEN, "WEBP", (opener, lambda start: "no WEBP support"))
    reason = "is a picture of the kind WEBP, which this installation cannot read"
    assert [problem.reason for problem in scan_folder(tmp_path).problems] == [reason]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_picture_of_which_nothing_can_be_seen_is_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    picture = Image.new("LA" if mode == "LA" else "RGBA", (40, 30))
    picture.convert(mode).save(path, transparency=0 if mode == "P" else None)
    with pytest.raises(PictureError, match="is transparent all over"):
        measure(path, maximum_megapixels=1)
    picture.putpixel((3, 3), (200, 255) if mode == "LA" else (200, 0, 0, 255))
    picture.save(path)
    assert measure(path, maximum_megapixels=1).size == Size(40, 30)


def test_transparency_is_given_beside_the_picture(tmp_path: Path) -> None:
    opacity = Image.linear_gradient("L").resize((48, 40))
    clear = gradient().convert("RGBA")
    clear.putalpha(opacity)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    clear.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif.tobytes())
    image, alpha = decode_with_alpha(tmp_path / "a.png", background=(9, 8, 7))
    assert alpha is not None
    assert (image.mode, alpha.mode) == ("RGB", "L")
    assert alpha.tobytes() == opacity.tobytes()
    assert image.tobytes() == decode_upright(tmp_path / "a.png", background=(9, 8, 7)).tobytes()
    for opaque in (gradient(), gradient().convert("RGBA")):
        opaque.save(tmp_path / "a.png")
        image, alpha = decode_with_alpha(tmp_path / "a.png")
        assert (image.tobytes(), alpha) == (gradient().tobytes(), None)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_smaller_version_is_large_enough(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = gradient(640, 480)
    how = STORED_AS[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = upright if how is None else upright.transpose(how)
    path = tmp_path / "a"
    path.write_bytes(encoded(stored, kind, exif=exif.tobytes()))
    for wanted in (Size(100, 100), Size(320, 10), Size(60, 300), Size(600, 470), Size(999, 999)):
        small = decode_upright(path, at_least=wanted)
        assert small.width >= min(640, wanted.width)
        assert small.height >= min(480, wanted.height)
        assert abs(small.width * 480 - small.height * 640) <= 640
        assert deviation(small, upright.resize(small.size, Image.Resampling.BOX)) <= 12
    assert decode_upright(path, at_least=Size(100, 100)).width < 300
    assert decode_upright(path, at_least=Size(999, 10)).size == (640, 480)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, green, blue = np.asarray(decode_upright(tmp_path / name))[0, 0].tolist()
        assert (red > 240, green < 15, blue < 15) == (True, True, True)
    assert len(scan_folder(tmp_path).photos) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_upright_and_as_large_as_its_photo(tmp_path: Path, orientation: int) -> None:
    mask = Image.new("L", (30, 20))
    mask.paste(255, (0, 0, 10, 10))
    how = STORED_AS[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = mask if how is None else mask.transpose(how)
    stored.save(tmp_path / "a-mask.png", exif=exif.tobytes())
    read = read_mask(tmp_path / "a-mask.png", Size(60, 40))
    assert (read.mode, read.size) == ("L", (60, 40))
    values = np.asarray(read)
    assert (values[:18, :18].min(), values[:, 22:].max(), values[22:].max()) == (255, 0, 0)


def test_every_way_of_painting_a_mask_means_the_same(tmp_path: Path) -> None:
    half = Image.new("L", (48, 40))
    half.paste(255, (0, 0, 24, 40))
    clear = Image.new("RGBA", (48, 40), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 24, 40))
    deep = Image.fromarray(np.asarray(half).astype(np.uint16) * 257)
    painted = [half, half.convert("1"), half.convert("RGB"), half.convert("P"), clear, deep]
    for image in painted:
        image.save(tmp_path / "a-mask.png", icc_profile=b"no profile")
        assert read_mask(tmp_path / "a-mask.png", Size(48, 40)).tobytes() == half.tobytes()
