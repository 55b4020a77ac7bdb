"""The pipeline from end to end, first half: from any folder to training pictures one can trust.

Hostile files, real photographs, random sizes: what `prepare` says, what a training is given, and
what the doctor's page shows of it.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from rich.console import Console

from tests.hostile import Expected, make_hostile
from tests.runs import Outcome, lora_of, metrics_of, state_of
from trainer.commands import decide
from trainer.commands.material import Material, gather
from trainer.data.decode import decode_upright, shown
from trainer.data.pixels import crop_image, load_picture, to_pil
from trainer.doctor.page import page_of
from trainer.doctor.words import plain
from trainer.types import Box, Bucketed, Size

Cli = Callable[..., Outcome]
Train = Callable[..., Outcome]
Hostile = tuple[Path, dict[str, Expected]]

LEVEL_LETTERS = 9  # of a line of `prepare`: the level, filled up, and two blanks
# Photos that can be read, and whose captions cannot.
WITHOUT_CAPTION = {"caption huge.jpg"}


def gathered(folder: Path, base: Path, *overrides: str) -> Material:
    """What `likeness train` would train on with these settings."""
    request = decide.Request(photos=folder, base=str(base), overrides=overrides)
    resolved, facts = decide.settings_of(request)
    return gather(folder, resolved, facts, Console(file=io.StringIO()), strict=True)


# --- a folder of everything that can be wrong


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("folders") / "hostile"
    return folder, make_hostile(folder)


def named(expected: dict[str, Expected]) -> dict[str, Expected]:
    """The files that are pictures or claim to be."""
    return {name: e for name, e in expected.items() if e.outcome in ("used", "problem")}


def unfit(expected: dict[str, Expected]) -> set[str]:
    """The files that cannot be trained on."""
    return {name for name, e in expected.items() if e.outcome == "problem"} | WITHOUT_CAPTION


def said_of(lines: list[str], name: str) -> str:
    """What the one line on a file says; fails unless there is exactly one."""
    start = f"{plain(name)}  "
    (line,) = [line for line in lines if line[LEVEL_LETTERS:].startswith(start)]
    return line


def test_prepare_says_one_line_of_every_file(
    hostile: Hostile, cli: Cli, base: Path, tmp_path: Path
) -> None:
    folder, expected = hostile
    before = state_of(folder)
    page = tmp_path / "page.html"
    outcome = cli("prepare", folder, "--base", base, "--page", page)
    assert outcome.code == 1
    assert "Traceback" not in outcome.out + outcome.err
    lines = outcome.out.splitlines()
    said = {name: said_of(lines, name) for name in named(expected)}
    assert len(set(said.values())) == len(said)
    assert lines[len(said)][LEVEL_LETTERS:].startswith("all photos  ")  # and of nothing else
    assert {name for name, line in said.items() if line.startswith("bad ")} == unfit(expected)
    for name, line in said.items():
        assert line.split()[0] in ("ok", "note", "warning", "bad")
        assert line.isprintable()
        assert expected[name].reason in line
        assert expected[name].notice in line
    assert lines[-1].startswith(f"{len(said)} photos: ")
    assert f"{len(unfit(expected))} that cannot be used." in lines[-1]
    assert page.stat().st_size > 50_000
    assert state_of(folder) == before


def test_a_training_takes_what_can_be_used(hostile: Hostile, train: Train, tmp_path: Path) -> None:
    folder, expected = hostile
    before = state_of(folder)
    outcome = train("data.skip_bad=true", folder=folder).done()
    assert "Traceback" not in outcome.out + outcome.err
    usable = len(named(expected)) - len(unfit(expected))
    assert f"Photos    {usable} in " in outcome.out
    assert f"{len(unfit(expected))} that cannot be used." in outcome.out
    output = tmp_path / "out"
    assert lora_of(output).name == "hostile.safetensors"
    assert [row["step"] for row in metrics_of(output)] == [1, 2, 3, 4]
    assert state_of(folder) == before


def test_a_training_refuses_the_rest_and_names_all_of_it(
    hostile: Hostile, train: Train, tmp_path: Path
) -> None:
    folder, expected = hostile
    before = state_of(folder)
    outcome = train(folder=folder)
    assert outcome.code == 1
    assert "Traceback" not in outcome.out + outcome.err
    bad, total = unfit(expected), len(named(expected))
    assert f"{len(bad)} of {total} photos cannot be used." in outcome.err
    assert f"train on the other {total - len(bad)}." in outcome.err
    for name in bad:
        start = f"  {shown(folder / name)} "
        (line,) = [line for line in outcome.err.splitlines() if line.startswith(start)]
        assert expected[name].reason in line
    assert not (tmp_path / "out").exists()
    assert state_of(folder) == before


def test_captions_that_are_not_used_do_not_hide_bad_photos(
    cli: Cli, base: Path, photos: Path, tmp_path: Path
) -> None:
    """And what is wrong in any of several sets is said at once."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(photos, folder)
        (folder / "empty.jpg").write_bytes(b"")
        (folder / "1.txt").write_bytes(b"no\0text")
    sets = f"--set=data.sets=[{{folder='{second.as_posix()}'}}]"
    words = ("--base", base, "--output", tmp_path / "out", "--set", "run.total_steps=1", sets)
    with_captions = cli("train", first, *words)
    without = cli("train", first, *words, "--set", "caption.use_sidecars=false")
    assert (with_captions.code, without.code) == (1, 1)
    assert "4 of 8 photos cannot be used." in with_captions.err
    assert "2 of 8 photos cannot be used." in without.err
    for folder in (first, second):
        caption = f"{shown(folder / '1.png')} has a caption that cannot be used: 1.txt is not"
        assert (caption in with_captions.err, caption in without.err) == (True, False)
        for outcome in (with_captions, without):
            assert f"{shown(folder / 'empty.jpg')} is empty (0 bytes)." in outcome.err


# --- real photographs

TWO_SIZES = ("data.resolution=[256, 512]", "data.bucket_step_px=64")
# How far the detector's box may lie beside the face as a person sees it, in pixels of the photo.
FACE = Box(176, 67, 271, 162)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-image's bundled photographs, and one of them as a folder may hold it once more."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    astronaut = Image.fromarray(data.astronaut())
    lying = Image.Exif()
    lying[0x0112] = 6  # the camera was held upright, the pixels lie on their side
    turned = astronaut.transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "sideways.jpg", exif=lying.tobytes(), quality=90)
    astronaut.filter(ImageFilter.GaussianBlur(6)).save(folder / "blurred.png")
    astronaut.resize((120, 120)).save(folder / "tiny.png")
    ImageEnhance.Brightness(astronaut).enhance(0.15).save(folder / "dark.png")
    shutil.copy(folder / "astronaut.png", folder / "copy.png")
    ImageOps.mirror(astronaut).save(folder / "mirrored.png")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide and a high photograph, each with a face where the middle crop cuts it."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("wide")
    astronaut = Image.fromarray(data.astronaut())
    astronaut.crop((160, 0, 512, 180)).resize((1056, 540)).save(folder / "wide.png")
    astronaut.crop((60, 40, 380, 512)).resize((960, 1416)).save(folder / "high.jpg", quality=92)
    return folder


def findings_of(photo: dict[str, Any]) -> dict[str, str]:
    return {finding["code"]: finding["what"] for finding in photo["findings"]}


def test_the_verdicts_on_real_photographs(photographs: Path, cli: Cli, base: Path) -> None:
    pytest.importorskip("cv2")
    words = [f"--set={word}" for word in TWO_SIZES]
    outcome = cli("prepare", photographs, "--base", base, "--json", *words).done()
    read = json.loads(outcome.out)
    photos = {Path(photo["path"]).name: photo for photo in read["photos"]}
    found = {name: findings_of(photo) for name, photo in photos.items()}
    assert found["astronaut.png"] == {}
    same = "shows the same as astronaut.png"
    assert found["sideways.jpg"] == {"duplicate": same}
    assert found["copy.png"] == {"duplicate": "is the same file as astronaut.png"}
    assert found["mirrored.png"] == {
        "duplicate": "shows the same as the mirror image of astronaut.png"
    }
    assert found["blurred.png"] == {"blurred": "has a blurred face", "duplicate": same}
    assert found["dark.png"].keys() == {"underexposed", "duplicate"}
    assert found["tiny.png"].keys() == {"small", "duplicate"}
    assert "it will be trained at 64x64" in found["tiny.png"]["small"]
    for name in ("coffee.png", "chelsea.png", "rocket.png"):
        # Of what it may have missed, the basic detector says no more than that.
        assert found[name]["no_face"] == "no face found (basic detector)"
        assert photos[name]["level"] == "note"
    assert {photos[name]["level"] for name in ("blurred.png", "dark.png", "copy.png")} == {
        "warning"
    }
    assert "OpenCV's basic detector" in read["faces_by"]
    # The one that lies on its side was turned before anything was looked for in it.
    for name in ("astronaut.png", "sideways.jpg", "dark.png"):
        (face,) = photos[name]["facts"]["faces"]
        wanted = (FACE.left, FACE.top, FACE.right, FACE.bottom)
        assert np.abs(np.array(face["box"]) - wanted).max() <= 8
    assert photos["sideways.jpg"]["size"] == [512, 512]


@pytest.mark.parametrize(
    "further",
    [(), ("data.max_aspect=1",), ("data.variants=6", "data.zoom=0.4", "data.shift=1")],
    ids=["plain", "square", "variants"],
)
def test_the_face_is_whole_in_every_training_picture(
    further: tuple[str, ...], photographs: Path, wide: Path, base: Path
) -> None:
    pytest.importorskip("cv2")
    for folder in (photographs, wide):
        material = gathered(folder, base, *TWO_SIZES, *further)
        pictures = [p for p in material.pictures_of("subject") if p.faces]
        assert {p.captioned.photo.path.name for p in pictures} >= (
            {"wide.png", "high.jpg"} if folder == wide else {"astronaut.png", "sideways.jpg"}
        )
        assert all(face_inside(picture) for picture in pictures)
        if "data.max_aspect=1" in further:
            assert all(p.bucket.width == p.bucket.height for p in pictures)


def face_inside(picture: Bucketed) -> bool:
    """Whether the largest face is inside the crop, to a pixel."""
    size, box = picture.captioned.photo.size, picture.faces[0].box
    across, down = picture.resized.width / size.width, picture.resized.height / size.height
    return (
        box.left * across >= picture.left - 1
        and box.right * across <= picture.left + picture.bucket.width + 1
        and box.top * down >= picture.top - 1
        and box.bottom * down <= picture.top + picture.bucket.height + 1
    )


def test_without_looking_for_faces_the_middle_crop_cuts_them(wide: Path, base: Path) -> None:
    """The test above would fail if crops did not follow the faces."""
    pytest.importorskip("cv2")
    square = (*TWO_SIZES, "data.max_aspect=1")
    kept = gathered(wide, base, *square).pictures_of("subject")
    plain_crops = gathered(wide, base, *square, "data.face_crop=false").pictures_of("subject")
    assert all(face_inside(picture) for picture in kept)
    assert not any(face_inside(picture) for picture in plain_crops)


# --- the contact sheet


def test_the_page_shows_what_is_trained(photographs: Path, wide: Path, base: Path) -> None:
    pytest.importorskip("cv2")
    for folder in (photographs, wide):
        words = (*TWO_SIZES, "data.max_aspect=1", "data.flip=true")
        material = gathered(folder, base, *words)
        pictures = [p for p in material.pictures_of("subject") if not p.variant.flip]
        trained: dict[tuple[str, Size], Image.Image] = {}
        for picture in pictures:
            pixels = to_pil(load_picture(picture).pixels_CHW)
            photo = decode_upright(picture.captioned.photo.path)
            assert crop_image(picture, photo).tobytes() == pixels.tobytes()
            trained[picture.captioned.photo.path.name, picture.bucket] = pixels
        page = page_of(material.diagnosis)
        assert {tile.name for tile in page.sheet} == {name for name, _ in trained}
        for tile in page.sheet:
            assert difference(tile.picture, trained[tile.name, tile.size]) < 5
        for card in page.cards:
            assert card.size is not None
            assert 1 <= len(card.crops) <= 2
            assert all(0 <= c.left < c.right <= card.size.width for c in card.crops)
            assert all(0 <= c.top < c.bottom <= card.size.height for c in card.crops)
    # Not the crop that would be trained without looking for faces.
    middle = page_of(gathered(wide, base, *words, "data.face_crop=false").diagnosis)
    for tile in middle.sheet:
        assert difference(tile.picture, trained[tile.name, tile.size]) > 10


def difference(address: str, image: Image.Image) -> float:
    """Mean difference (of 255) between a thumbnail of the page and a picture, of 24 x 24 patches
    each: what JPEG changes in single pixels is no difference."""
    data = base64.b64decode(address.partition(",")[2])
    with Image.open(io.BytesIO(data)) as thumbnail:
        patches = [
            np.asarray(each.convert("RGB").resize((24, 24), Image.Resampling.BOX), float)
            for each in (thumbnail, image)
        ]
    return float(np.abs(patches[0] - patches[1]).mean())


# --- any sizes

SIDES = st.integers(32, 320)
SIZES = st.tuples(SIDES, SIDES).filter(lambda size: max(size) <= 10 * min(size))


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=5),
    resolutions=st.lists(st.sampled_from([32, 48, 64, 128]), min_size=1, max_size=3, unique=True),
    aspect=st.sampled_from([1.0, 2.0, 4.0]),
    enlarge=st.booleans(),
)
def test_every_photo_is_in_one_bucket_at_each_resolution(
    base: Path,
    tmp_path: Path,
    sizes: list[tuple[int, int]],
    resolutions: list[int],
    aspect: float,
    enlarge: bool,
) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 90, 90)).save(tmp_path / f"{number}.png")
    words = (f"data.resolution={resolutions}", f"data.max_aspect={aspect}", "data.batch_size=3")
    switches = (f"data.enlarge={str(enlarge).lower()}", "data.face_detector=none")
    material = gathered(tmp_path, base, *words, *switches)
    pictures = material.pictures_of("subject")
    by_photo: dict[str, list[Bucketed]] = {}
    for picture in pictures:
        by_photo.setdefault(picture.captioned.photo.path.name, []).append(picture)
        bucket, resized = picture.bucket, picture.resized
        assert 0 <= picture.left <= resized.width - bucket.width
        assert 0 <= picture.top <= resized.height - bucket.height
        assert max(bucket.width, bucket.height) <= aspect * min(bucket.width, bucket.height)
        photo = picture.captioned.photo.size
        assert enlarge or (resized.width <= photo.width and resized.height <= photo.height)
    assert by_photo.keys() == {f"{number}.png" for number in range(len(sizes))}
    for placed in by_photo.values():
        # At each resolution once; at one for all that a photo is too small for.
        assert len({picture.group for picture in placed}) == len(placed) <= len(resolutions)
        assert len({(p.bucket, p.resized, p.left, p.top) for p in placed}) == len(placed)
        if placed[0].captioned.photo.size.area >= (2 * max(resolutions)) ** 2:
            assert len(placed) == len(resolutions)
        for picture, resolution in zip(placed, sorted(resolutions), strict=False):
            assert picture.bucket.area <= resolution**2
    rows = material.diagnosis.buckets
    assert sum(row.photos for row in rows) == len(pictures)
    assert all(row.batches * 3 - row.short == row.photos for row in rows)
