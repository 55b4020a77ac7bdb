"""A folder of everything that can go wrong: one line for each file, and nothing is changed."""

from __future__ import annotations

import contextlib
import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from tests.hostile import (
    HAS_HEIC,
    Expected,
    encoded,
    heic,
    make_hostile,
    moving,
    picture,
    srgb_profile,
)
from trainer.data.decode import PictureError, decode_upright, decode_with_alpha, measure, read_mask
from trainer.data.photos import PhotoScan, scan_folder
from trainer.types import Size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    place = tmp_path_factory.mktemp("hostile")
    return place, make_hostile(place)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file, and where every link leads."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = ""
        found[path.relative_to(folder).as_posix()] = (content, state.st_mtime_ns)
    return found


def lines(scan: PhotoScan, folder: Path) -> list[tuple[str, str, str]]:
    """(name, outcome, what is said) of every file that the scan names."""
    said = [(photo.path, "used", "; ".join(photo.notices)) for photo in scan.photos]
    said += [(problem.path, "problem", problem.reason) for problem in scan.problems]
    return [(path.relative_to(folder).as_posix(), outcome, words) for path, outcome, words in said]


def test_there_are_many_kinds(folder: tuple[Path, dict[str, Expected]]) -> None:
    place, expected = folder
    assert len(expected) > 100
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()}
    assert files | {"link to folder.png", "more/up"} >= set(expected) >= files


@pytest.mark.parametrize("recursive", [False, True])
def test_every_file_is_named_once_and_as_it_should_be(
    folder: tuple[Path, dict[str, Expected]], recursive: bool
) -> None:
    place, expected = folder
    before = contents(place)
    scan = scan_folder(place, recursive=recursive, workers=2)
    said = lines(scan, place)
    assert len({name for name, _, _ in said}) == len(said)
    below = "used" if recursive else "passed over"
    wanted = {name: {"below": below}.get(e.outcome, e.outcome) for name, e in expected.items()}
    outcomes = dict.fromkeys(expected, "passed over") | {name: how for name, how, _ in said}
    assert outcomes == wanted
    for name, outcome, words in said:
        assert "\n" not in words
        part = expected[name].reason if outcome == "problem" else expected[name].notice
        assert part in words, name
        assert outcome == "problem" or bool(part) == bool(words), (name, words)
    assert contents(place) == before


def test_every_photo_found_can_be_decoded_to_the_size_found(
    folder: tuple[Path, dict[str, Expected]],
) -> None:
    place, expected = folder
    for photo in scan_folder(place).photos:
        image = decode_upright(photo.path)
        assert (image.mode, image.size) == ("RGB", (photo.size.width, photo.size.height))
        assert np.ptp(np.asarray(image)) > 0
        assert (photo.mask.name if photo.mask else "") == expected[photo.path.name].mask
        if photo.mask:
            assert read_mask(photo.mask, photo.size).size == image.size


@pytest.mark.slow
def test_the_folder_is_the_same_every_time(
    folder: tuple[Path, dict[str, Expected]], tmp_path: Path
) -> None:
    place, expected = folder
    assert make_hostile(tmp_path) == expected
    first, second = contents(place), contents(tmp_path)
    assert {name: of[0] for name, of in first.items()} == {n: of[0] for n, of in second.items()}


@cache
def small_files() -> dict[str, bytes]:
    """A small file of every format and of every way of writing it that has code of its own."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = {"exif": exif.tobytes(), "icc_profile": srgb_profile()}
    image = picture(1, 48, 40)
    noise = np.random.default_rng(1).uniform(0, 1, (40, 48))
    files = {
        f"{kind} whole": encoded(image, kind, **whole) for kind in ("JPEG", "PNG", "WEBP", "TIFF")
    }
    files |= {f"{kind} plain": encoded(image, kind) for kind in ("BMP", "GIF")}
    files |= {kind: moving(1, kind) for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO")}
    files |= {
        "JPEG progressive": encoded(image, "JPEG", progressive=True),
        "JPEG cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "PNG palette": encoded(image.quantize(9), "PNG", transparency=b"\0\x80"),
        "PNG sixteen bits": encoded(Image.fromarray((noise * 65535).astype(np.uint16)), "PNG"),
        "WEBP lossless": encoded(image.convert("RGBA"), "WEBP", lossless=True),
        "TIFF float": encoded(Image.fromarray(noise.astype(np.float32)), "TIFF"),
        "TIFF deflate": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
    }
    if features.check("avif"):
        files["AVIF"] = encoded(image, "AVIF", exif=exif.tobytes())
    if HAS_HEIC:
        files["HEIC"] = heic(1, orientation=6)
    return files


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A small file, cut at random, with some of its bytes changed; more often near its start."""
    content = bytearray(draw(st.sampled_from(sorted(small_files().items())))[1])
    for _ in range(draw(st.integers(0, 8))):
        last = min(len(content) - 1, draw(st.sampled_from([40, 400, 40_000])))
        content[draw(st.integers(0, last))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content) - 1)) :]
    return bytes(content)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=damaged_files())
def test_damage_is_a_picture_error_or_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    """And whatever the scan lets through can be decoded later, in the midst of training."""
    path = tmp_path / "a.jpg"  # the content decides, not the name
    path.write_bytes(content)
    with contextlib.suppress(PictureError):
        read_mask(path, Size(48, 40), maximum_megapixels=1)
    try:
        found = measure(path, maximum_megapixels=1).size
    except PictureError:
        return
    image, alpha = decode_with_alpha(path)
    assert (image.mode, image.size) == ("RGB", (found.width, found.height))
    assert alpha is None or alpha.size == image.size
    decode_upright(path, at_least=Size(20, 20))
    capfd.readouterr()  # libtiff writes what it thinks of a file to the standard error itself
