"""Photo folders as people have them: what is found, what is refused, and how each reads."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from tests.strategies import gradient
from trainer.data.photos import (
    PhotoProblem,
    PhotoScan,
    decode_upright,
    require_usable,
    scan_folder,
)
from trainer.errors import DataError
from trainer.types import Photo, Size

ORIENTATION = 0x0112
# How a camera held in each way stores an upright picture (EXIF 2.3, tag 0x0112).
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
COPY_AGAIN = "Copy it again from where it came from, or remove it."


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def only_problem(folder: Path, **options: float) -> PhotoProblem:
    scan = scan_folder(folder, **options)  # type: ignore[arg-type]
    assert scan.photos == ()
    assert len(scan.problems) == 1
    return scan.problems[0]


def deviation(image: Image.Image, expected: Image.Image) -> float:
    difference = np.asarray(image).astype(float) - np.asarray(expected).astype(float)
    return float(np.abs(difference).max())


# --- what is found


def test_photos_come_in_natural_order_with_size_and_digest(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "a1.png", "B1.JPG", "a 02.png"):
        gradient().save(tmp_path / name)
    scan = scan_folder(tmp_path)
    assert [photo.path.name for photo in scan.photos] == [
        "2.png",
        "10.png",
        "a 02.png",
        "a1.png",
        "B1.JPG",
    ]
    assert scan.photos[0].size == Size(48, 40)
    assert len(scan.photos[0].digest) == 64
    assert scan.photos[0].digest != scan.photos[-1].digest


def test_what_operating_systems_leave_behind_is_skipped_and_counted(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / ".hidden.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "desktop.ini").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    gradient().save(tmp_path / "__MACOSX" / "b.png")
    (tmp_path / "a.txt").write_text("a caption", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no caption", encoding="utf-8")
    (tmp_path / "film.mp4").write_bytes(b"x")
    scan = scan_folder(tmp_path, recursive=True)
    assert [photo.path.name for photo in scan.photos] == ["a.png"]
    assert (scan.problems, scan.hidden, scan.other) == ((), 5, 2)


def test_sub_folders_are_read_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "day 2" / "best.jpg").mkdir(parents=True)
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / "day 2" / "b.png")
    gradient().save(tmp_path / "day 2" / "best.jpg" / "c.png")
    assert [photo.path.name for photo in scan_folder(tmp_path).photos] == ["a.png"]
    found = [photo.path.name for photo in scan_folder(tmp_path, recursive=True).photos]
    assert found == ["a.png", "b.png", "c.png"]


def test_equal_files_are_kept_and_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.jpg"):
        gradient().save(tmp_path / name)
    scan = scan_folder(tmp_path)
    assert len(scan.photos) == 3
    assert scan.duplicates == ((tmp_path / "a.png", tmp_path / "b.png"),)


@pytest.mark.parametrize(
    "name",
    [
        "\N{GRINNING FACE} \N{FAMILY}.png",
        "e\N{COMBINING ACUTE ACCENT}te.png",
        'it\'s 100% "mine" [1] {x}.png',
        "two\nlines.png",
        "a" * 200 + ".png",
        "9" * 200 + ".png",
        "no.suffix.in.the.middle.PNG",
    ],
)
def test_odd_names_are_no_obstacle(tmp_path: Path, name: str) -> None:
    if sys.platform == "win32" and not set(name).isdisjoint('\n"'):
        pytest.skip("Windows has no such names")
    gradient().save(tmp_path / name)
    (tmp_path / ("bad " + name[:150] + ".png")).write_bytes(b"")
    scan = scan_folder(tmp_path)
    assert [photo.path.name for photo in scan.photos] == [name]
    with pytest.raises(DataError) as caught:
        require_usable(scan, skip_bad=False)
    assert len(str(caught.value).splitlines()) == 3
    str(caught.value).encode("utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names in Unicode")
def test_a_name_that_is_no_text_can_be_shown(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        require_usable(scan_folder(tmp_path), skip_bad=True)
    assert "caf\ufffd.png is empty" in str(caught.value).encode("utf-8").decode("utf-8")


def test_real_photographs_are_found_whole(tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    shapes = {}
    for name in ("astronaut", "coffee", "chelsea"):
        pixels = getattr(data, name)()
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", quality=90)
        shapes[f"{name}.jpg"] = Size(pixels.shape[1], pixels.shape[0])
    scan = scan_folder(tmp_path)
    assert {photo.path.name: photo.size for photo in scan.photos} == shapes
    assert scan.problems == ()
    for photo in scan.photos:
        truth = Image.fromarray(getattr(data, photo.path.stem)())
        difference = np.asarray(decode_upright(photo.path)).astype(float) - np.asarray(truth)
        assert np.abs(difference).mean() < 4


# --- what is refused


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jpg", b"", "is empty (0 bytes)"),
        ("a.jpg", b"a shopping list, not a photo", "is not a picture, whatever its name says"),
        ("a.png", b"<!doctype html><title>404</title>", "is not a picture, whatever its name says"),
        ("a.jpg", b"\0\0\0\x18ftypheic" + bytes(99), "is a HEIC picture, which cannot be read"),
        ("a.HEIC", b"", "is a HEIC picture, which cannot be read"),
        ("a.gif", b"GIF89a", "is damaged or incomplete"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ""),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
    ],
)
def test_files_that_are_no_photos_are_named(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    gradient().save(tmp_path / "good.png")
    (tmp_path / name).write_bytes(content)
    scan = scan_folder(tmp_path)
    assert [photo.path.name for photo in scan.photos] == ["good.png"]
    if reason:
        (problem,) = scan.problems
        assert problem.path == tmp_path / name
        assert problem.reason.startswith(reason)
        assert problem.fix.endswith(".")
    else:
        assert (scan.problems, scan.other) == ((), 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_photo_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, kind: str) -> None:
    whole = encoded(gradient(), kind)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(whole)
    expected = decode_upright(path)
    for length in range(12, len(whole), len(whole) // 25 + 1):
        path.write_bytes(whole[:length])
        scan = scan_folder(tmp_path)
        if scan.photos:  # only the end of the container is missing, all pixels are there
            assert decode_upright(path).tobytes() == expected.tobytes()
            assert length > 0.9 * len(whole)
        else:
            assert scan.problems[0].reason == "is damaged or incomplete"
            with pytest.raises(DataError, match=path.name):
                decode_upright(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF"]))
    content = bytearray(encoded(gradient(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.jpg"  # the content decides, not the name
    path.write_bytes(content)
    scan = scan_folder(tmp_path, maximum_megapixels=1)
    assert len(scan.photos) + len(scan.problems) == 1
    if scan.photos:
        image = decode_upright(path)
        assert (scan.photos[0].size, image.mode) == (Size(image.width, image.height), "RGB")


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (1, 1, "is 1 x 1 px; the smallest usable side is 32 px"),
        (31, 64, "is 31 x 64 px; the smallest usable side is 32 px"),
        (1, 4000, "is 1 x 4000 px; the smallest usable side is 32 px"),
        (8192, 1, "is 8192 x 1 px; the smallest usable side is 32 px"),
        (40, 4000, "is 40 x 4000 px; nearly all of it would be cropped away"),
    ],
)
def test_useless_shapes_are_refused(tmp_path: Path, width: int, height: int, reason: str) -> None:
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    assert only_problem(tmp_path).reason == reason


def test_the_smallest_side_is_settable_and_inclusive(tmp_path: Path) -> None:
    Image.new("RGB", (64, 50)).save(tmp_path / "a.png")
    assert len(scan_folder(tmp_path, minimum_side_px=50).photos) == 1
    assert "side is 51 px" in only_problem(tmp_path, minimum_side_px=51).reason


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels to show for it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (10001, 10000, "has 10001 x 10000 px; the limit is 100 megapixels"),
        (30000, 30000, "has far too many pixels"),
        (2**31 - 1, 2**31 - 1, "has far too many pixels"),
    ],
)
def test_decompression_bombs_are_refused_from_their_header(
    tmp_path: Path, width: int, height: int, reason: str
) -> None:
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    assert only_problem(tmp_path).reason == reason


def test_the_pixel_limit_is_settable(tmp_path: Path) -> None:
    gradient(100, 100).save(tmp_path / "a.png")
    assert len(scan_folder(tmp_path, maximum_megapixels=0.01).photos) == 1
    problem = only_problem(tmp_path, maximum_megapixels=0.005)
    assert problem.reason == "has 100 x 100 px; the limit is 0.005 megapixels"


def test_a_huge_file_that_is_no_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(4 << 30)
    assert only_problem(tmp_path).reason == "is not a picture, whatever its name says"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file kinds")
def test_links_and_pipes_are_refused_or_passed_over(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "same.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    scan = scan_folder(tmp_path, recursive=True)
    assert [photo.path.name for photo in scan.photos] == ["a.png", "same.png"]
    reasons = {problem.path.name: problem.reason for problem in scan.problems}
    assert reasons.pop("loop.png").startswith("cannot be read (")
    assert reasons == {
        "gone.png": "is a link to a file that is not there",
        "pipe.png": "is not a regular file",
    }


def test_a_locked_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient().save(tmp_path / "a.png")

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert only_problem(tmp_path).reason == "may not be read (permission denied)"


def test_locked_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient().save(tmp_path / "a.png")
    (tmp_path / "inner").mkdir()
    scandir, locked = os.scandir, tmp_path / "inner"

    def refuse(path: os.PathLike[str]) -> object:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    scan = scan_folder(tmp_path, recursive=True)
    assert [photo.path.name for photo in scan.photos] == ["a.png"]
    assert scan.problems[0].path == tmp_path / "inner"
    assert scan.problems[0].reason == "is a folder that cannot be listed (Permission denied)"
    locked = tmp_path
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path)
    assert caught.value.what == f"The folder '{tmp_path}' cannot be listed (Permission denied)."


# --- the messages, word for word


def test_message_for_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "Anna").mkdir()
    (tmp_path / "ana.zip").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path / "ana")
    assert str(caught.value) == (
        f"There is no folder '{tmp_path / 'ana'}'.\n"
        f"  {tmp_path / 'ana'}\n"
        f"Did you mean '{tmp_path / 'Anna'}'?"
    )
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path / "x" / "y")
    assert caught.value.fix == "Check the path of the photo folder."


def test_message_for_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    with pytest.raises(DataError) as caught:
        scan_folder(path)
    assert str(caught.value) == (
        f"'{path}' is a file, not a folder.\n"
        f"  {path}\n"
        f"Give the folder that holds the photos: '{tmp_path}'."
    )


def test_message_for_a_folder_without_photos(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path)
    assert str(caught.value) == (
        f"There are no photos in '{tmp_path}': it is empty.\n"
        f"  {tmp_path}\n"
        "Put photos into it (jpg, jpeg, png, webp, bmp, tif, tiff, gif, avif)."
    )
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(DataError, match="it holds 1 other file\\."):
        scan_folder(tmp_path)
    (tmp_path / "b.pdf").write_bytes(b"x")
    (tmp_path / "inner").mkdir()
    with pytest.raises(DataError, match="it holds 2 other files\\."):
        scan_folder(tmp_path)


def test_message_for_photos_in_sub_folders_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        gradient().save(tmp_path / name / "a.png")
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path)
    assert str(caught.value) == (
        f"All photos (2) are in sub-folders of '{tmp_path}'.\n"
        f"  {tmp_path}\n"
        "Run with --set data.recursive=true, or give one of the sub-folders."
    )


def test_message_for_bad_photos_lists_each_and_offers_to_skip_them(tmp_path: Path) -> None:
    gradient().save(tmp_path / "good.png")
    (tmp_path / "IMG_10.heic").write_bytes(b"x")
    (tmp_path / "IMG_9.jpg").write_bytes(encoded(gradient(), "JPEG")[:500])
    scan = scan_folder(tmp_path)
    with pytest.raises(DataError) as caught:
        require_usable(scan, skip_bad=False)
    assert str(caught.value) == (
        "Photo folder problem: 2 of 3 photos cannot be used.\n"
        f"  {tmp_path / 'IMG_9.jpg'} is damaged or incomplete. {COPY_AGAIN}\n"
        f"  {tmp_path / 'IMG_10.heic'} is a HEIC picture, which cannot be read. "
        "Convert it to JPEG or PNG.\n"
        "Fix these, or run with --set data.skip_bad=true to train on the other 1."
    )
    assert require_usable(scan, skip_bad=True) == scan.photos


def test_bad_photos_alone_cannot_be_skipped() -> None:
    problem = PhotoProblem(Path("a.jpg"), "is empty (0 bytes)", COPY_AGAIN)
    with pytest.raises(DataError) as caught:
        require_usable(PhotoScan((), (problem,), 0, 0), skip_bad=True)
    assert str(caught.value) == (
        "Photo folder problem: 1 of 1 photos cannot be used.\n"
        f"  a.jpg is empty (0 bytes). {COPY_AGAIN}\n"
        "Fix these."
    )


def test_good_photos_alone_are_returned_either_way() -> None:
    photos = (Photo(Path("a.png"), Size(64, 64), "0" * 64),)
    for skip_bad in (True, False):
        assert require_usable(PhotoScan(photos, (), 0, 0), skip_bad=skip_bad) == photos


def test_message_for_a_picture_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        decode_upright(path)
    assert str(caught.value) == f"a.jpg is empty (0 bytes).\n  {path}\n{COPY_AGAIN}"
    with pytest.raises(DataError, match=r"b\.jpg is gone\."):
        decode_upright(tmp_path / "b.jpg")


# --- decoding


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
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert profile.count(b"rXYZ") == profile.count(b"bXYZ") == 1
    swapped = profile.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")
    red, green, blue = gradient().split()
    for icc, expected in ((profile, gradient()), (swapped, Image.merge("RGB", (blue, green, red)))):
        gradient().save(tmp_path / "a.png", icc_profile=icc)
        assert deviation(decode_upright(tmp_path / "a.png"), expected) <= 3


def test_a_profile_of_another_colour_space_is_ignored_or_fits(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("L", "CMYK"):
        image = gradient().convert(mode)
        image.save(tmp_path / "plain.tif")
        image.save(tmp_path / "tagged.tif", icc_profile=srgb)
        plain = decode_upright(tmp_path / "plain.tif")
        assert deviation(decode_upright(tmp_path / "tagged.tif"), plain) <= 2


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, green, blue = np.asarray(decode_upright(tmp_path / name))[0, 0].tolist()
        assert (red > 240, green < 15, blue < 15) == (True, True, True)
    assert len(scan_folder(tmp_path).photos) == 3
