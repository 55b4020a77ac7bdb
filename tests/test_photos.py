"""Photo folders as people have them: what is found, what is refused, and how each reads."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.hostile import (
    encoded,
    heic,
    picture,
    png_header,
)
from tests.strategies import gradient
from trainer.data import photos
from trainer.data.decode import Measured, measure
from trainer.data.photos import (
    PhotoProblem,
    PhotoScan,
    decode_upright,
    require_usable,
    scan_folder,
)
from trainer.errors import DataError
from trainer.types import Photo, Size

COPY_AGAIN = "Copy it again from where it came from, or remove it."


def only_problem(folder: Path, **options: float) -> PhotoProblem:
    scan = scan_folder(folder, **options)  # type: ignore[arg-type]
    assert scan.photos == ()
    assert len(scan.problems) == 1
    return scan.problems[0]


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
        ("a.HEIC", b"", "is empty (0 bytes)"),
        ("a.heic", b"\0\0\0\x18ftypisom\0\0\0\0isom" + bytes(99), "is not a picture"),
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


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (10001, 10000, "has 10001 x 10000 px; the limit is 100 megapixels"),
        (30000, 30000, "has 30000 x 30000 px; the limit is 100 megapixels"),
        (2**31 - 1, 2**31 - 1, "has 2147483647 x 2147483647 px; the limit is 100 megapixels"),
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
    assert problem.fix == "Save it at a smaller size, or raise data.maximum_megapixels."


def test_a_user_may_allow_more_pixels_than_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    gradient(100, 100).save(tmp_path / "a.png")
    assert len(scan_folder(tmp_path).photos) == 1
    assert decode_upright(tmp_path / "a.png").size == (100, 100)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"", "is not a picture, whatever its name says"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "is 4295 MB, far more than a picture of 100 megapixels can need"),
        (b"\0\0\0\x18ftypavif", "is 4295 MB, far more than a picture of 100 megapixels can need"),
        (b"\0\0\0\x18ftypheic", "is 4295 MB, far more than a picture of 100 megapixels can need"),
        (b"\x89PNG\r\n\x1a\n", "is damaged or incomplete"),
    ],
)
def test_a_huge_file_is_not_read(tmp_path: Path, start: bytes, reason: str) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(start)
        file.truncate(4 << 30)
    assert only_problem(tmp_path).reason == reason


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file kinds")
def test_links_and_pipes_are_refused_or_passed_over(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "same.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.png")
    scan = scan_folder(tmp_path, recursive=True)
    assert [photo.path.name for photo in scan.photos] == ["a.png", "same.png"]
    reasons = {problem.path.name: problem.reason for problem in scan.problems}
    assert reasons.pop("loop.png").startswith("cannot be read (")
    assert reasons == {
        "gone.png": "is a link to a file that is not there",
        "pipe.png": "is not a regular file",
    }
    assert scan.linked == (tmp_path / "up",)
    assert scan_folder(tmp_path).linked == ()  # sub-folders were not asked for


@pytest.mark.skipif(sys.platform == "win32", reason="Windows asks for a privilege to link")
def test_a_folder_that_leads_back_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Junctions of Windows and mounts look like folders; links made to look so stand for them."""
    (tmp_path / "inner").mkdir()
    gradient().save(tmp_path / "inner" / "a.png")
    (tmp_path / "inner" / "up").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setattr(os.path, "islink", lambda path: False)
    scan = scan_folder(tmp_path, recursive=True)
    assert [photo.path for photo in scan.photos] == [tmp_path / "inner" / "a.png"]


def test_a_locked_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient().save(tmp_path / "a.png")

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert only_problem(tmp_path).reason == "may not be read (permission denied)"


def test_a_photo_that_vanishes_after_decoding_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)

    def measure_and_delete(path: Path, *, maximum_megapixels: float) -> Measured:
        measured = measure(path, maximum_megapixels=maximum_megapixels)
        path.unlink()
        return measured

    monkeypatch.setattr(photos, "measure", measure_and_delete)
    assert only_problem(tmp_path).reason == "is gone"


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


# --- many at a time


def test_several_workers_find_the_same_as_one(tmp_path: Path) -> None:
    for number in range(12):
        picture(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number} bad.png").write_bytes(b"x" * number)
    seen: list[tuple[int, int]] = []
    one = scan_folder(tmp_path)
    four = scan_folder(tmp_path, workers=4, progress=lambda *at: seen.append(at))
    assert one == four
    assert [len(one.photos), len(one.problems)] == [12, 12]
    assert seen == [(done, 24) for done in range(1, 25)]


def test_an_interrupted_scan_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        gradient().save(tmp_path / f"{number}.png")
    read: list[Path] = []

    def slowly(path: Path, *, maximum_megapixels: float) -> Measured:
        read.append(path)
        time.sleep(0.01)
        return Measured(Size(48, 40))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(photos, "measure", slowly)
    with pytest.raises(KeyboardInterrupt):
        scan_folder(tmp_path, workers=2, progress=stop)
    at_once = len(read)
    assert at_once < 20
    time.sleep(0.05)
    assert len(read) == at_once


def test_decoding_in_threads_leaves_the_warnings_as_they_are(tmp_path: Path) -> None:
    """Only Pillow's are muted: whoever decodes in threads must still hear of other things."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\xff\xff"
    for number in range(8):
        gradient().save(tmp_path / f"{number}.jpg", exif=exif)
    assert len(scan_folder(tmp_path, workers=4).photos) == 8
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


# --- masks


def test_masks_beside_photos_are_found(tmp_path: Path) -> None:
    half = Image.new("L", (96, 80))
    half.paste(255, (0, 0, 48, 80))
    half.save(tmp_path / "a-MASK.Png")
    for name in ("a.png", "A.webp", "b.jpg", "unmasked.png"):
        picture(1).save(tmp_path / name)
    half.resize((48, 40)).save(tmp_path / "b-mask.tif")
    found = {photo.path.name: photo for photo in scan_folder(tmp_path).photos}
    assert set(found) == {"a.png", "A.webp", "b.jpg", "unmasked.png"}
    assert found["a.png"].mask == found["A.webp"].mask == tmp_path / "a-MASK.Png"
    assert found["b.jpg"].mask == tmp_path / "b-mask.tif"
    assert (found["unmasked.png"].mask, found["unmasked.png"].mask_digest) == (None, "")
    digest = hashlib.sha256((tmp_path / "b-mask.tif").read_bytes()).hexdigest()
    assert found["b.jpg"].mask_digest == digest
    assert all(photo.notices == () for photo in found.values())


def test_masks_are_no_photos_even_where_they_are_not_wanted(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "a-mask.png").write_bytes(b"not even readable")
    (scan,) = (scan_folder(tmp_path, masks=False),)
    assert [(photo.path.name, photo.mask, photo.notices) for photo in scan.photos] == [
        ("a.png", None, ())
    ]
    assert (scan.problems, scan.other) == ((), 0)


def test_accents_of_a_mask_may_be_written_otherwise(tmp_path: Path) -> None:
    white = Image.new("RGB", (48, 40), "white")
    white.save(tmp_path / unicodedata.normalize("NFC", "\u00e9t\u00e9.jpg"))
    white.save(tmp_path / unicodedata.normalize("NFD", "\u00e9t\u00e9-mask.png"))
    (photo,) = scan_folder(tmp_path).photos
    assert photo.mask is not None


def test_a_mask_that_several_photos_share_is_one_problem(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        gradient().save(tmp_path / name)
    (tmp_path / "a-mask.png").write_bytes(b"")
    scan = scan_folder(tmp_path)
    assert [(p.path.name, p.reason) for p in scan.problems] == [
        ("a-mask.png", "is empty (0 bytes)")
    ]
    notice = "has a mask that cannot be used (a-mask.png); all of it is trained"
    assert [photo.notices for photo in scan.photos] == [(notice,), (notice,)]


def test_messages_for_masks_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("black", "wide", "two"):
        gradient().save(tmp_path / f"{name}.png")
        Image.new("L", (48, 40), 1 if name == "black" else 255).save(tmp_path / f"{name}-mask.png")
    Image.new("L", (40, 48), 255).save(tmp_path / "wide-mask.png")
    Image.new("L", (48, 40), 255).save(tmp_path / "two-mask.bmp")
    Image.new("L", (48, 40), 255).save(tmp_path / "gas-mask.png")
    lines = {p.path.name: f"{p.reason}. {p.fix}" for p in scan_folder(tmp_path).problems}
    assert lines == {
        "black-mask.png": "is a mask that is black all over: nothing of its photo would be "
        "trained. Paint white what is to be trained, or remove the mask.",
        "gas-mask.png": "is a mask by its name, but there is no photo 'gas'. "
        "Rename it if it is a photo itself (not to end in '-mask'), or remove it.",
        "two-mask.png": "is a second mask of two.png, beside two-mask.bmp. "
        "Rename it if it is a photo itself (not to end in '-mask'), or remove it.",
        "wide-mask.png": "is a mask of 40 x 48 px, another shape than its photo's 48 x 40 px. "
        "Save the mask at the size of its photo.",
    }


def test_the_pixel_limit_holds_for_masks_too(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    (tmp_path / "a-mask.png").write_bytes(png_header(48000, 40000))
    (problem,) = scan_folder(tmp_path).problems
    assert problem.reason == "has 48000 x 40000 px; the limit is 100 megapixels"


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
        "Put photos into it "
        "(jpg, jpeg, jfif, png, webp, bmp, tif, tiff, gif, avif, heic, heif, hif)."
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


def test_message_for_bad_photos_lists_each_and_offers_to_skip_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "IMG_10.heic").write_bytes(heic(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    gradient().save(tmp_path / "good.png")
    (tmp_path / "IMG_9.jpg").write_bytes(encoded(gradient(), "JPEG")[:500])
    scan = scan_folder(tmp_path)
    with pytest.raises(DataError) as caught:
        require_usable(scan, skip_bad=False)
    assert str(caught.value) == (
        "Photo folder problem: 2 of 3 photos cannot be used.\n"
        f"  {tmp_path / 'IMG_9.jpg'} is damaged or incomplete. {COPY_AGAIN}\n"
        f"  {tmp_path / 'IMG_10.heic'} is a HEIC picture, which cannot be read yet. "
        'Install the reader with: pip install "likeness[heic]" (or convert it to JPEG or PNG).\n'
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
