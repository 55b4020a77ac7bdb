"""The doctor: measuring photos, keeping what was measured, and judging it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter, ImageOps

from trainer.data.buckets import BucketPlan, place_photos
from trainer.data.captions import caption_photos, orphan_sidecars
from trainer.data.photos import PhotoScan, scan_folder
from trainer.doctor.checkup import CheckedSet, Checkup, diagnose
from trainer.doctor.examine import Examination, examine
from trainer.doctor.facts import FactStore, measure_photo
from trainer.doctor.findings import Diagnosis, PhotoFacts, PhotoVerdict
from trainer.doctor.sidecars import read_sidecars
from trainer.types import Box, Captioned, Face, Photo, Size

SQUARE = Size(512, 512)
ASTRONAUT = Box(170, 60, 280, 190)


@dataclass(frozen=True)
class Eyes:
    """A face finder that sees what it is told to, in pixels of the picture it is given."""

    faces: tuple[Face, ...] = ()
    name: str = "eyes"
    certain: bool = True

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        return self.faces

    def embed(self, image: Image.Image, face: Face) -> None:
        return None


def facts_of(digest: str, **changes: Any) -> PhotoFacts:
    """A sharp, well-lit photo like no other."""
    random = np.random.default_rng(int(digest, 16))
    plain = PhotoFacts(
        digest=digest,
        sharpness=900.0,
        reblur=0.3,
        dark=0.05,
        bright=0.05,
        mean=120.0,
        hash=int(random.integers(0, 2**63)),
        mirrored_hash=int(random.integers(0, 2**63)),
        background=(float(random.integers(256)), float(random.integers(256)), 0.0),
        faces=None,
        thumbnail=random.integers(0, 256, 768, dtype=np.uint8).tobytes(),
    )
    return replace(plain, **changes)


def face_at(left: int, top: int, side: int, turn: float = 0.0) -> Face:
    """A square face whose nose is `turn` eye distances to the side of the middle."""
    eye_y, middle = top + 0.4 * side, left + side / 2
    eyes = ((middle - 0.2 * side, eye_y), (middle + 0.2 * side, eye_y))
    nose = (middle + turn * 0.4 * side, top + 0.6 * side)
    return Face(Box(left, top, left + side, top + side), 0.9, (*eyes, nose))


def photo(number: int, size: Size = SQUARE, **changes: Any) -> Photo:
    return Photo(Path("set") / f"{number}.jpg", size, f"{number:064x}", **changes)


def checkup_of(
    photos: Sequence[Photo],
    facts: dict[str, PhotoFacts] | None = None,
    texts: Sequence[str] = (),
    plan: BucketPlan | None = None,
    repeats: int = 1,
    **changes: Any,
) -> Checkup:
    """A checkup of photos that need no files."""
    facts = facts or {p.digest: facts_of(p.digest) for p in photos}
    captioned = tuple(
        Captioned(p, (texts[i] if texts else f"ohwx person, number {i}",), "sidecar")
        for i, p in enumerate(photos)
    )
    faces = {digest: fact.faces or () for digest, fact in facts.items()}
    plan = plan or BucketPlan((512,), 64, face_crop=False)
    one = CheckedSet(
        name="anna",
        folder=Path("set"),
        role="subject",
        trigger="ohwx",
        scan=PhotoScan(tuple(photos), (), 0, 0),
        captioned=captioned,
        crops=place_photos(captioned, plan, faces, repeats=repeats),
    )
    given: dict[str, Any] = {
        "folder": Path("set"),
        "kind": "face",
        "sets": (one,),
        "facts": facts,
        "resolutions": plan.resolutions,
        "batch_size": 4,
        "total_steps": 400,
        "faces_certain": True,
    }
    return Checkup(**given | changes)


def findings_of(verdict: PhotoVerdict) -> dict[str, tuple[str, str]]:
    return {finding.code: (finding.level, finding.what) for finding in verdict.findings}


def whole_of(diagnosis: Diagnosis) -> dict[str, tuple[str, str]]:
    return {finding.code: (finding.level, finding.what) for finding in diagnosis.whole}


def judged(one: Photo, facts: PhotoFacts, **changes: Any) -> dict[str, tuple[str, str]]:
    """The findings on one photo."""
    return findings_of(diagnose(checkup_of([one], {one.digest: facts}, **changes)).photos[0])


def folder_checkup(folder: Path, examination: Examination, **changes: Any) -> Checkup:
    """A checkup of a real folder, as the commands make it."""
    scan = scan_folder(folder)
    sidecars = read_sidecars(scan.photos)
    usable = [p for p in scan.photos if p.path not in sidecars or not sidecars[p.path].problem]
    captioned = caption_photos(usable, trigger="ohwx", class_noun="person")
    one = CheckedSet(
        name=folder.name,
        folder=folder,
        role="subject",
        trigger="ohwx",
        scan=scan,
        captioned=captioned,
        crops=place_photos(captioned, BucketPlan((64,), 16), {}),
        sidecars=sidecars,
        orphans=orphan_sidecars(folder, scan.photos),
    )
    given: dict[str, Any] = {
        "folder": folder,
        "kind": "face",
        "sets": (one,),
        "facts": examination.facts,
        "lost": examination.problems,
        "resolutions": (64,),
        "batch_size": 1,
        "total_steps": 400,
    }
    return Checkup(**given | changes)


def save_noise(path: Path, seed: int, side: int = 96) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST).save(path)


# Measuring and keeping


def test_the_face_is_what_is_measured_where_there_is_one() -> None:
    image = Image.fromarray(skimage.data.astronaut())
    box = (ASTRONAUT.left, ASTRONAUT.top, ASTRONAUT.right, ASTRONAUT.bottom)
    image.paste(image.crop(box).filter(ImageFilter.GaussianBlur(4)).point(lambda v: v // 8), box)
    without = measure_photo(image, "d", None)
    with_face = measure_photo(image, "d", (Face(ASTRONAUT, 1.0),))
    assert with_face.sharpness < 50 < without.sharpness
    assert with_face.mean < 35 < without.mean
    assert (without.faces, with_face.hash) == (None, without.hash)
    twice = Box(*(2 * edge for edge in (ASTRONAUT.left, ASTRONAUT.top, *box[2:])))
    reduced = measure_photo(image, "d", (Face(twice, 1.0),), Size(1024, 1024))
    assert (reduced.sharpness, reduced.mean) == (with_face.sharpness, with_face.mean)


def test_facts_are_kept_by_content_and_detector(tmp_path: Path) -> None:
    facts = facts_of("ab" * 32, faces=(face_at(3, 4, 50, 0.25),))
    FactStore(tmp_path).put(facts, "eyes")
    again = FactStore(tmp_path)
    assert again.get(facts.digest, "eyes") == facts
    assert again.get(facts.digest, "other") is None
    assert again.get("cd" * 32, "eyes") is None
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert kept.suffix == ".json"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"mean": 120.0', '"mean": 121.0'),
        lambda text: text.replace('"mean": 120.0', '"mean": NaN'),
        lambda text: text.replace('"mean": 120.0', '"mean": "120"'),
        lambda text: text.replace('"faces": null', '"faces": [{"box": [1, 2]}]'),
        lambda text: text.replace('"thumbnail": "', '"thumbnail": "00'),
        lambda text: text.replace('"digest": "ab', '"digest": "cd'),
        lambda text: text.replace('"hash": ', '"hash": 9999999999999999999999'),
    ],
)
def test_damaged_facts_are_not_believed(tmp_path: Path, damage: Any) -> None:
    facts = facts_of("ab" * 32)
    store = FactStore(tmp_path)
    store.put(facts, "eyes")
    (kept,) = tmp_path.rglob("*.json")
    before = kept.read_text(encoding="utf-8")
    kept.write_text(damage(before), encoding="utf-8")
    assert kept.read_text(encoding="utf-8") != before
    assert store.get(facts.digest, "eyes") is None
    store.put(facts, "eyes")
    assert store.get(facts.digest, "eyes") == facts


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    store = FactStore(blocked)
    store.put(facts_of("ab" * 32), "eyes")
    assert store.get("ab" * 32, "eyes") == facts_of("ab" * 32)
    assert "cannot be written" in store.notice
    assert FactStore(None).get("ab" * 32, "eyes") is None


def test_each_content_is_measured_once(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        save_noise(photos / f"{number}.png", number)
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    scan = scan_folder(photos)
    told: list[tuple[int, int]] = []
    finder = Eyes((face_at(10, 10, 40),))

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    first = examine(scan.photos, finder, FactStore(tmp_path / "kept"), workers=3, progress=progress)
    assert told[-1] == (6, 6)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert set(first.facts) == {p.digest for p in scan.photos}
    assert first.problems == ()
    for path in photos.iterdir():  # from here on only what was kept can answer
        path.unlink()
    again = examine(scan.photos, finder, FactStore(tmp_path / "kept"), workers=1)
    assert again == first
    others = replace(finder, name="others")
    assert examine(scan.photos, others, FactStore(tmp_path / "kept"), workers=2).facts == {}


def test_no_more_pictures_are_held_than_there_are_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        save_noise(tmp_path / f"{number}.png", number, side=40)
    lock, held, most = threading.Lock(), 0, 0

    class Watching(Eyes):
        def find(self, image: Image.Image) -> tuple[Face, ...]:
            nonlocal held, most
            with lock:
                held += 1
                most = max(most, held)
            threading.Event().wait(0.01)
            with lock:
                held -= 1
            return ()

    found = examine(scan_folder(tmp_path).photos, Watching(), FactStore(None), workers=3)
    assert len(found.facts) == 12
    assert 1 <= most <= 3


def test_faces_are_kept_in_pixels_of_the_whole_photo(tmp_path: Path) -> None:
    """A JPEG is looked at reduced; what is found must fit the photo all the same."""
    image = Image.fromarray(skimage.data.astronaut()).resize((4096, 4096))
    image.save(tmp_path / "large.jpg", quality=60)

    class Reduced(Eyes):
        def find(self, image: Image.Image) -> tuple[Face, ...]:
            assert 1024 <= image.width < 4096
            middle = image.width // 2
            return (Face(Box(0, 0, middle, middle), 0.9, ((float(middle), 1.0),)),)

    found = examine(scan_folder(tmp_path).photos, Reduced(), FactStore(None), workers=1)
    (facts,) = found.facts.values()
    assert facts.faces is not None
    assert facts.faces[0].box == Box(0, 0, 2048, 2048)
    assert facts.faces[0].landmarks[0][0] == 2048


def test_a_photo_that_vanished_since_the_scan_is_a_finding(tmp_path: Path) -> None:
    for number in range(3):
        save_noise(tmp_path / f"{number}.png", number)
    scan = scan_folder(tmp_path)
    (tmp_path / "1.png").unlink()
    found = examine(scan.photos, None, FactStore(None), workers=2)
    assert [problem.path.name for problem in found.problems] == ["1.png"]
    save_noise(tmp_path / "1.png", 1)  # the scan of the checkup must list it still
    verdict = diagnose(folder_checkup(tmp_path, found)).photos[1]
    assert (verdict.level, verdict.findings[0].what) == ("bad", "is gone")
    # Where an equal file is still there, that one is measured.
    (tmp_path / "2 copy.png").write_bytes((tmp_path / "2.png").read_bytes())
    scan = scan_folder(tmp_path)
    (tmp_path / "2.png").unlink()
    found = examine(scan.photos, None, FactStore(None), workers=1)
    assert len(found.facts) == 3
    assert [problem.path.name for problem in found.problems] == ["2.png"]


# Each photo


def test_a_good_photo_gets_no_finding() -> None:
    facts = facts_of(photo(1).digest, faces=(face_at(150, 100, 200),))
    verdict = diagnose(checkup_of([photo(1)], {facts.digest: facts})).photos[0]
    assert (verdict.level, verdict.findings, verdict.facts) == ("ok", (), facts)
    assert [crop.bucket for crop in verdict.crops] == [Size(512, 512)]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"sharpness": 20.0, "reblur": 0.7}, "blurred", "is blurred"),
        ({"dark": 0.8, "bright": 0.0, "mean": 14.0}, "underexposed", "is underexposed"),
        ({"dark": 0.0, "bright": 0.8, "mean": 240.0}, "overexposed", "is overexposed"),
    ],
)
def test_blur_and_exposure(changes: dict[str, float], code: str, words: str) -> None:
    one = photo(1)
    facts = facts_of(one.digest, **changes)
    level, what = judged(one, facts)[code]
    assert level == "warning"
    assert what.startswith(words)
    face = replace(facts, faces=(face_at(150, 100, 200),))
    assert "face" in judged(one, face)[code][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"sharpness": 20.0, "reblur": 0.3},  # bare walls
        {"sharpness": 90.0, "reblur": 0.7},  # noise
        {"dark": 0.8, "bright": 0.1, "mean": 30.0},  # a lit face before black
        {"dark": 0.1, "bright": 0.8, "mean": 225.0},  # a drawing on paper
    ],
)
def test_one_sign_alone_is_no_warning(changes: dict[str, float]) -> None:
    found = judged(photo(1), facts_of(photo(1).digest, **changes), kind="style")
    assert not {"blurred", "underexposed", "overexposed"} & set(found)


def test_small_photos() -> None:
    small = photo(1, Size(400, 400))
    facts = facts_of(small.digest)
    assert judged(small, facts)["small"] == (
        "note",
        "has 400x400 px, too few for 512: it will be trained at 384x384",
    )
    tiny = photo(1, Size(200, 200))
    assert judged(tiny, facts)["small"][0] == "warning"
    enlarging = BucketPlan((512,), 64, enlarge=True)
    level, what = judged(tiny, facts, plan=enlarging)["enlarged"]
    assert level == "warning"
    assert "enlarged 2.6 times to train at 512x512" in what
    assert judged(small, facts, plan=enlarging)["enlarged"][0] == "note"
    for plan in (BucketPlan((512,), 64), enlarging):
        assert not {"small", "enlarged"} & set(judged(photo(1), facts, plan=plan))
    both = BucketPlan((256, 512), 64)
    assert "384x384" in judged(small, facts, plan=both)["small"][1]


def test_copies_name_the_other_photo() -> None:
    first, second, third, fourth = (photo(n) for n in range(4))
    fourth = replace(fourth, digest=first.digest)
    one = facts_of(first.digest)
    pixels = np.frombuffer(one.thumbnail, np.uint8).reshape(16, 16, 3)
    near = facts_of(second.digest, hash=one.hash ^ 0b11111, thumbnail=one.thumbnail)
    mirror = facts_of(third.digest, hash=one.mirrored_hash, thumbnail=pixels[:, ::-1].tobytes())
    facts = {fact.digest: fact for fact in (one, near, mirror)}
    verdicts = diagnose(checkup_of([first, second, third, fourth], facts, kind="style")).photos
    assert findings_of(verdicts[0]) == {}
    assert findings_of(verdicts[1])["near_duplicate"] == (
        "warning",
        "shows nearly the same as 0.jpg",
    )
    assert "the mirror image of 0.jpg" in findings_of(verdicts[2])["duplicate"][1]
    assert findings_of(verdicts[3])["duplicate"] == ("warning", "is the same file as 0.jpg")
    facts[second.digest] = replace(near, hash=one.hash ^ (2**13 - 1))
    verdict = diagnose(checkup_of([first, second], facts, kind="style")).photos[1]
    assert findings_of(verdict)["similar"][0] == "note"


@pytest.mark.parametrize(
    ("faces", "code"),
    [
        ((), "no_face"),
        ((face_at(100, 100, 200), face_at(350, 100, 100)), "several_faces"),
        ((face_at(200, 200, 40),), "small_face"),
        ((face_at(0, 100, 200),), "cut_by_frame"),
        ((face_at(150, 312, 200),), "cut_by_frame"),
    ],
)
def test_faces(faces: tuple[Face, ...], code: str) -> None:
    one = photo(1)
    facts = facts_of(one.digest, faces=faces)
    assert [(c, level) for c, (level, _) in judged(one, facts).items()] == [(code, "warning")]
    level, what = judged(one, facts, faces_certain=False)[code]
    assert level == "note"
    assert what.endswith("(basic detector)")
    assert judged(one, facts, kind="style") == {}
    assert judged(one, replace(facts, faces=None)) == {}


def test_a_person_far_behind_is_no_second_face() -> None:
    facts = facts_of(photo(1).digest, faces=(face_at(100, 100, 200), face_at(400, 100, 30)))
    assert judged(photo(1), facts) == {}


def test_a_face_cut_by_the_crop() -> None:
    wide = photo(1, Size(3000, 1000))
    facts = facts_of(wide.digest, faces=(face_at(300, 300, 400),))
    level, what = judged(wide, facts)["cut_by_crop"]
    assert (level, what) == ("warning", "has a face that is cut when cropped to 640x384")
    kept = BucketPlan((512,), 64, face_crop=True)
    assert "cut_by_crop" not in judged(wide, facts, plan=kept)


def test_long_captions() -> None:
    facts = facts_of(photo(1).digest)

    def found(words: int, longest: int) -> tuple[str, str] | None:
        return judged(
            photo(1),
            facts,
            texts=["ohwx " * words],
            count_tokens=lambda text: len(text.split()),
            longest_tokens=longest,
        ).get("long_caption")

    assert found(75, 75) is None
    assert found(76, 75) == (
        "warning",
        "has a caption of 76 tokens, of which the first 75 are read",
    )
    assert found(160, 225) == ("note", "has a caption of 160 tokens, read in 3 parts")
    assert (found(226, 225) or ("",))[0] == "warning"


def test_notices_are_passed_on() -> None:
    one = photo(1, notices=("is an animation; its first picture is used",))
    found = judged(one, facts_of(one.digest))
    assert found["notice"] == ("note", "is an animation; its first picture is used")


def test_caption_files(tmp_path: Path) -> None:
    texts = {
        "0": b"ohwx person, smiling",
        "1": b"",
        "2": b"a person without the word",
        "3": b"\x89PNG\0\0\0\x0d",
        "4": b"x" * 1_000_001,
        "5": "{trigger} in Köln".encode("utf-16"),
        "lonely": b"whose?",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    for number in range(7):
        save_noise(tmp_path / f"{number}.png", number)
    found = examine(scan_folder(tmp_path).photos, None, FactStore(None), workers=1)
    diagnosis = diagnose(folder_checkup(tmp_path, found))
    verdicts = [findings_of(verdict) for verdict in diagnosis.photos]
    assert verdicts[0] == verdicts[5] == {}
    assert verdicts[1]["empty_caption"] == (
        "warning",
        "has an empty caption file, 1.txt; 'ohwx person' is used",
    )
    assert verdicts[2]["no_trigger"][0] == "note"
    assert verdicts[3]["bad_caption"] == (
        "bad",
        "has a caption that cannot be used: 3.txt is not plain text",
    )
    assert "larger than" in verdicts[4]["bad_caption"][1]
    assert verdicts[6]["no_caption"][0] == "note"
    assert "lonely.txt" in whole_of(diagnosis)["orphan_caption"][1]
    assert [verdict.captioned is None for verdict in diagnosis.photos] == [
        number in (3, 4) for number in range(7)
    ]


def test_every_picture_gets_one_verdict_in_natural_order(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "broken 3.png", "1.png", "empty.jpg", "ä 1.png", "tiny.png"]
    for number, name in enumerate(names):
        save_noise(tmp_path / Path(name).with_suffix(".png"), number)
    (tmp_path / "broken 3.png").write_bytes(b"\x89PNG no more")
    (tmp_path / "empty.png").rename(tmp_path / "empty.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "tiny.png")
    found = examine(scan_folder(tmp_path).photos, None, FactStore(None), workers=2)
    checkup = folder_checkup(tmp_path, found)
    diagnosis = diagnose(checkup)
    assert [verdict.path.name for verdict in diagnosis.photos] == [
        *("1.png", "2.png", "10.png", "broken 3.png", "empty.jpg", "tiny.png", "ä 1.png")
    ]
    assert diagnosis.count("bad") == 3
    assert {v.path.name for v in diagnosis.photos if v.photo is None} == {
        *("broken 3.png", "empty.jpg", "tiny.png")
    }
    assert diagnose(checkup) == diagnosis


def test_every_warning_says_what_to_do(tmp_path: Path) -> None:
    image = Image.fromarray(skimage.data.astronaut())
    image.save(tmp_path / "a.png")
    ImageOps.mirror(image).save(tmp_path / "b.jpg")
    image.filter(ImageFilter.GaussianBlur(6)).resize((40, 40)).resize((90, 90)).save(
        tmp_path / "c.png"
    )
    image.point(lambda value: value // 20).save(tmp_path / "d.png")
    (tmp_path / "e.png").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"")
    finder = Eyes((face_at(0, 10, 20), face_at(40, 10, 20)))
    found = examine(scan_folder(tmp_path).photos, finder, FactStore(None), workers=1)
    diagnosis = diagnose(folder_checkup(tmp_path, found, faces_certain=True, total_steps=5000))
    every = [*diagnosis.whole, *(f for verdict in diagnosis.photos for f in verdict.findings)]
    assert len({finding.code for finding in every}) >= 9
    for finding in every:
        assert finding.level == "note" or finding.fix.endswith(".")
        assert "\n" not in finding.what + finding.fix
    for verdict in diagnosis.photos:
        assert not any(finding.what.endswith(".") for finding in verdict.findings)
    assert all(finding.what.endswith(".") for finding in diagnosis.whole)


# All together


@pytest.mark.parametrize(
    ("kind", "count", "level"),
    [
        ("face", 4, "warning"),
        ("face", 5, "note"),
        ("face", 9, "note"),
        ("face", 10, None),
        ("style", 9, "warning"),
        ("style", 10, None),
    ],
)
def test_too_few_photos(kind: str, count: int, level: str | None) -> None:
    diagnosis = diagnose(checkup_of([photo(n) for n in range(count)], kind=kind))
    assert whole_of(diagnosis).get("few_photos", (None,))[0] == level


def test_a_folder_without_a_usable_photo(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    diagnosis = diagnose(folder_checkup(tmp_path, Examination({}, ())))
    assert whole_of(diagnosis)["no_photos"][0] == "bad"
    assert (diagnosis.buckets, diagnosis.steps) == ((), ())


def alike_set(**changes: Any) -> list[dict[str, PhotoFacts]]:
    """Six photos whose facts all have `changes`; and the same with one that differs in them."""
    photos = [photo(n) for n in range(6)]
    same = {p.digest: facts_of(p.digest, **changes) for p in photos}
    other = same | {photos[2].digest: facts_of(photos[2].digest)}
    return [same, other]


def test_one_background() -> None:
    same, other = alike_set(background=(200.0, 100.0, 50.0))
    photos = [photo(n) for n in range(6)]
    assert whole_of(diagnose(checkup_of(photos, same)))["one_background"][0] == "warning"
    assert "one_background" not in whole_of(diagnose(checkup_of(photos, other)))
    assert "one_background" not in whole_of(diagnose(checkup_of(photos, same, kind="style")))


def test_one_pose_and_one_distance() -> None:
    photos = [photo(n) for n in range(6)]

    def found(sides: Sequence[int], turns: Sequence[float], tilt: float = 0.0) -> set[str]:
        faces = [face_at(60, 60, side, turn) for side, turn in zip(sides, turns, strict=True)]
        faces = [replace(face, landmarks=tilted(face.landmarks, tilt)) for face in faces]
        facts = {
            p.digest: facts_of(p.digest, faces=(f,)) for p, f in zip(photos, faces, strict=True)
        }
        return {"one_pose", "one_distance"} & set(whole_of(diagnose(checkup_of(photos, facts))))

    turned = [-0.3, 0.0, 0.3, 0.1, -0.1, 0.0]
    assert found([100, 150, 200, 250, 300, 350], turned) == set()
    assert found([100, 150, 200, 250, 300, 350], [0.2] * 6) == {"one_pose"}
    assert found([100, 150, 200, 250, 300, 350], [0.2] * 6, tilt=0.6) == {"one_pose"}
    assert found([350] * 6, turned) == {"one_distance"}
    assert found([100] * 6, turned) == {"one_distance"}


def tilted(
    points: tuple[tuple[float, float], ...], angle: float
) -> tuple[tuple[float, float], ...]:
    cos, sin = math.cos(angle), math.sin(angle)
    return tuple((x * cos - y * sin, x * sin + y * cos) for x, y in points)


def test_captions_all_the_same() -> None:
    photos = [photo(n) for n in range(6)]
    for kind, level in (("face", "note"), ("style", "warning")):
        diagnosis = diagnose(checkup_of(photos, texts=["ohwx person"] * 6, kind=kind))
        assert whole_of(diagnosis)["same_captions"] == (
            level,
            "All photos have the same caption: 'ohwx person'.",
        )
    assert "same_captions" not in whole_of(diagnose(checkup_of(photos)))


def test_a_trigger_that_no_caption_names_is_said_once(tmp_path: Path) -> None:
    for number in range(3):
        save_noise(tmp_path / f"{number}.png", number)
        (tmp_path / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
    found = examine(scan_folder(tmp_path).photos, None, FactStore(None), workers=1)
    diagnosis = diagnose(folder_checkup(tmp_path, found))
    assert all(verdict.findings == () for verdict in diagnosis.photos)
    assert whole_of(diagnosis)["no_trigger"][0] == "note"


def test_photos_without_captions_are_counted_where_they_are_the_most(tmp_path: Path) -> None:
    for number in range(4):
        save_noise(tmp_path / f"{number}.png", number)
    (tmp_path / "0.txt").write_text("ohwx person, smiling", encoding="utf-8")
    found = examine(scan_folder(tmp_path).photos, None, FactStore(None), workers=1)
    diagnosis = diagnose(folder_checkup(tmp_path, found))
    assert all(verdict.findings == () for verdict in diagnosis.photos)
    assert whole_of(diagnosis)["no_captions"][1].startswith("3 of 4 photos have no caption")


def test_a_photo_without_a_caption_is_named_where_most_have_one(tmp_path: Path) -> None:
    for number in range(4):
        save_noise(tmp_path / f"{number}.png", number)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"ohwx person {number}", encoding="utf-8")
    found = examine(scan_folder(tmp_path).photos, None, FactStore(None), workers=1)
    diagnosis = diagnose(folder_checkup(tmp_path, found))
    codes = [[finding.code for finding in verdict.findings] for verdict in diagnosis.photos]
    assert codes == [[], [], [], ["no_caption"]]


def test_a_set_is_not_looked_through_anew_for_each_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    get = CheckedSet.written.fget  # type: ignore[attr-defined]

    def looked(checked: CheckedSet) -> object:
        looks.append(1)
        return get(checked)

    monkeypatch.setattr(CheckedSet, "written", property(looked))
    counts = []
    for number in (20, 40):
        looks.clear()
        diagnose(checkup_of([photo(n) for n in range(number)]))
        counts.append(len(looks))
    assert counts[0] == counts[1] > 0


def test_photos_in_sub_folders_are_not_left_out_in_silence(tmp_path: Path) -> None:
    save_noise(tmp_path / "1.png", 1)
    (tmp_path / "notes").mkdir()
    for number, name in enumerate(("10_ohwx man", "old")):
        (tmp_path / name / "deep").mkdir(parents=True)
        save_noise(tmp_path / name / "deep" / "a.png", 10 + number)
    found = examine(scan_folder(tmp_path).photos, None, FactStore(None), workers=1)
    checkup = folder_checkup(tmp_path, found)
    level, what = whole_of(diagnose(checkup))["unused_folders"]
    assert level == "warning"
    assert what.startswith("Pictures in sub-folders are not used: 10_ohwx man/deep, old/deep.")
    further = replace(checkup.sets[0], scan=scan_folder(tmp_path / "old" / "deep"))
    both = replace(checkup, sets=(*checkup.sets, further))
    assert whole_of(diagnose(both))["unused_folders"][1].startswith(
        "Pictures in sub-folders are not used: 10_ohwx man/deep."
    )
    recursive = replace(checkup.sets[0], scan=scan_folder(tmp_path, recursive=True))
    assert "unused_folders" not in whole_of(diagnose(replace(checkup, sets=(recursive,))))


# Steps and sizes


def test_photos_too_small_for_all_sizes_are_counted_as_they_are_trained() -> None:
    both = BucketPlan((256, 512), 64)
    photos = [photo(1), replace(photo(2), size=Size(200, 200))]
    (sentence, *_) = diagnose(checkup_of(photos, plan=both)).steps
    assert sentence.startswith("2 photos at 1 to 2 sizes = 3 pictures a round (epoch)")


def test_steps_are_spelled_out() -> None:
    photos = [photo(n) for n in range(14)]
    checkup = checkup_of(photos, repeats=10)
    assert diagnose(checkup).steps == (
        "14 photos x 10 repeats = 140 pictures a round (epoch), in 35 batches of 4.",
        "400 steps = 11.4 epochs: each photo is seen about 114 times.",
    )
    both = BucketPlan((256, 512), 64)
    doubled = checkup_of(photos, plan=both, accumulate_steps=2, total_steps=1400)
    assert diagnose(doubled).steps == (
        "14 photos x 2 sizes = 28 pictures a round (epoch), in 8 batches of up to 4.",
        "1,400 steps of 2 batches each = 350 epochs: each photo is seen about 700 times.",
    )


def test_several_sets_are_counted_apart() -> None:
    checkup = checkup_of([photo(n) for n in range(10)], repeats=3)
    (first,) = checkup.sets
    (second,) = checkup_of([photo(n) for n in range(20, 26)]).sets
    third = replace(second, name="people", role="class")
    diagnosis = diagnose(replace(checkup, sets=(first, replace(second, name="bea"), third)))
    assert diagnosis.steps == (
        "anna: 10 photos x 3 repeats = 30 pictures; bea: 6 photos; together 36 pictures a round "
        "(epoch), in 9 batches of 4.",
        "400 steps = 44.4 epochs: each photo is seen, of anna about 133 times, of bea about 44 "
        "times.",
        "6 photos of the class, from people, are trained on beside.",
    )
    assert len(diagnosis.photos) == 22


def test_photos_seen_too_often_or_hardly() -> None:
    photos = [photo(n) for n in range(12)]

    def advice(steps: int) -> dict[str, str]:
        whole = diagnose(checkup_of(photos, total_steps=steps)).whole
        return {f.code: f.fix for f in whole if f.code.startswith("seen")}

    assert advice(300) == {}
    assert advice(3000) == {"seen_often": "Add photos, or set run.total_steps to about 300."}
    assert advice(30) == {"seen_rarely": "Set run.total_steps to about 300."}


def test_training_sizes() -> None:
    photos = [
        *(photo(n) for n in range(5)),
        photo(5, Size(1000, 600)),
        photo(6, Size(100, 100)),
    ]
    plan = BucketPlan((512,), 64, enlarge=True)
    checkup = checkup_of(photos, plan=plan, repeats=2)
    (one,) = checkup.sets
    rows = {row.size: row for row in diagnose(checkup).buckets}
    square = rows[Size(512, 512)]
    assert (square.photos, square.batches, square.short, square.enlarged) == (12, 3, 0, 1)
    assert square.cropped == 0
    wide = rows[Size(640, 384)]
    assert (wide.photos, wide.batches, wide.short, wide.enlarged) == (2, 1, 2, 0)
    (crop,) = (crop for crop in one.crops if crop.bucket == wide.size)
    assert wide.cropped == pytest.approx(1 - crop.bucket.area / crop.resized.area)
    assert sum(row.photos for row in rows.values()) == 14


def test_a_lot_of_photos_is_judged_quickly_and_named_right() -> None:
    photos = [photo(n) for n in range(1200)]
    facts = {p.digest: facts_of(p.digest) for p in photos}
    twin = replace(facts[photos[17].digest], digest=photos[1100].digest)
    facts[twin.digest] = twin
    diagnosis = diagnose(checkup_of(photos, facts))
    assert [v.path.name for v in diagnosis.photos if v.findings] == ["1100.jpg"]
    assert findings_of(diagnosis.photos[1100])["duplicate"][1] == "shows the same as 17.jpg"
