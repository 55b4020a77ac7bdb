"""Faces: found where they are, by the finder that is there, and told apart."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tests import face_models
from trainer.data.buckets import BucketPlan, place_photos
from trainer.errors import ConfigError, ModelError
from trainer.faces import FINDERS, FaceFinder, open_finder, open_recognizer, same_person
from trainer.faces.models import SFACE, YUNET, Published
from trainer.types import Box, Bucketed, Captioned, Face, Photo, Size

BLUE, GREEN, RED = (0, 0, 255), (0, 255, 0), (255, 0, 0)
DETECTOR = face_models.detector()
RECOGNIZER = face_models.recognizer()


@pytest.fixture(autouse=True)
def _empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was downloaded on this machine is not used here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Paths of the two small networks; letters outside ASCII are no trouble."""
    detector, recognizer = tmp_path / "detector ä 顔.onnx", tmp_path / "recognizer ä 顔.onnx"
    detector.write_bytes(DETECTOR)
    recognizer.write_bytes(RECOGNIZER)
    return str(detector), str(recognizer)


@pytest.fixture
def yunet(files: tuple[str, str]) -> FaceFinder:
    return open_recognizer(*files, download=False)


@pytest.fixture(scope="module")
def haar() -> FaceFinder:
    finder, _ = open_finder("haar", "", "", download=False, drawings=False)
    assert finder
    return finder


def photograph(name: str) -> Image.Image:
    """A photograph that comes with scikit-image."""
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def marked(
    size: tuple[int, int], *marks: tuple[int, int, int, tuple[int, int, int]]
) -> Image.Image:
    """A black picture with squares: left, top, side and colour of each."""
    picture = Image.new("RGB", size)
    draw = ImageDraw.Draw(picture)
    for left, top, side, colour in marks:
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
    return picture


# The networks: places, order, landmarks.


def test_a_face_is_given_in_the_pixels_of_the_whole_picture(yunet: FaceFinder) -> None:
    """The picture is halved for the detector, whose cells of 32 px are 64 px here."""
    (face,) = yunet.find(marked((1280, 960), (512, 384, 64, BLUE)))
    assert face.score >= 0.9
    middle = (512 + 32, 384 + 32)
    assert np.allclose(
        (face.box.left, face.box.top, face.box.right, face.box.bottom),
        (middle[0] - 128, middle[1] - 160, middle[0] + 128, middle[1] + 160),
        atol=1,
    )
    expected = [(512 + 64 * x, 384 + 64 * y) for x, y in face_models.LANDMARKS]
    assert np.allclose(face.landmarks, expected, atol=0.1)


def test_the_largest_face_comes_first_and_none_reaches_outside(yunet: FaceFinder) -> None:
    picture = marked((640, 480), (320, 240, 8, RED), (0, 0, 32, BLUE), (480, 400, 16, GREEN))
    faces = yunet.find(picture)
    assert [(face.box.width, face.box.height) for face in faces] == [(80, 96), (64, 80), (32, 40)]
    assert (faces[0].box.left, faces[0].box.top) == (0, 0)


def test_where_nothing_is_found_a_smaller_picture_is_tried(
    yunet: FaceFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YuNet misses faces of more than about 300 px."""
    sides = []

    class Shortsighted:
        def rows(self, bgr: NDArray[np.uint8]) -> NDArray[np.float32]:
            sides.append(bgr.shape[1])
            row = [10, 20, 200, 210, *range(10), 0.95]
            return np.array([row] if bgr.shape[1] <= 320 else [], np.float32).reshape(-1, 15)

    monkeypatch.setattr(yunet, "_detector", Shortsighted())
    (face,) = yunet.find(Image.new("RGB", (1280, 960)))
    assert face.box == Box(40, 80, 840, 920)
    assert sides == [640, 320]
    assert yunet.find(Image.new("RGB", (320, 240)))
    assert sides == [640, 320, 320]


def test_numbers_that_are_none_are_no_faces(
    yunet: FaceFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def rows(self, bgr: NDArray[np.uint8]) -> NDArray[np.float32]:
            return np.full((2, 15), [[np.nan], [np.inf]], np.float32)

    monkeypatch.setattr(yunet, "_detector", Broken())
    assert yunet.find(Image.new("RGB", (64, 64))) == ()


def test_pictures_of_any_shape_are_looked_at(yunet: FaceFinder, haar: FaceFinder) -> None:
    for size in ((1, 1), (31, 700), (3000, 2), (641, 479)):
        for finder in (yunet, haar):
            assert finder.find(Image.new("RGB", size, "grey")) == ()


def test_several_threads_find_what_one_finds(yunet: FaceFinder) -> None:
    pictures = [
        marked((300 + 8 * n, 320), (32 * n, 64, 32, BLUE), (160, 160, 16, GREEN)) for n in range(8)
    ]
    alone = [yunet.find(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(yunet.find, pictures * 3)) == alone * 3
    assert all(len(faces) == 2 for faces in alone)


# Who is who.


def person(upper: tuple[int, int, int], lower: tuple[int, int, int], side: int) -> Image.Image:
    """A square picture of two halves."""
    picture = Image.new("RGB", (side, side), lower)
    ImageDraw.Draw(picture).rectangle((0, 0, side, side // 2 - 1), fill=upper)
    return picture


def face_of(picture: Image.Image) -> Face:
    """A face in the middle of a picture, a third as wide; landmarks as SFace expects them."""
    side, third = picture.width, picture.width // 3
    places = ((0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.33, 0.8), (0.67, 0.8))
    return Face(
        Box(third, third, side - third, side - third),
        1.0,
        tuple((third + third * x, third + third * y) for x, y in places),
    )


def test_one_person_is_one_person_at_any_size(yunet: FaceFinder) -> None:
    vectors = []
    for side in (150, 600, 2400):
        picture = person((200, 20, 20), (20, 20, 200), side)
        vector = yunet.embed(picture, face_of(picture))
        assert vector is not None
        assert vector.shape == (128,)
        assert vector.dtype == np.float64
        assert np.linalg.norm(vector) == pytest.approx(1)
        vectors.append(vector)
    assert min(vectors[0] @ other for other in vectors) > 0.99
    stranger = person((20, 200, 20), (200, 200, 20), 600)
    other = yunet.embed(stranger, face_of(stranger))
    assert other is not None
    assert same_person(vectors[0], vectors[1])
    assert not same_person(vectors[0], other)


def test_a_turned_face_is_turned_back_by_its_landmarks(yunet: FaceFinder) -> None:
    picture = person((200, 20, 20), (20, 20, 200), 600)
    face = face_of(picture)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    landmarks = tuple((y, 600 - x) for x, y in face.landmarks)
    upright = yunet.embed(picture, face)
    as_turned = yunet.embed(turned, replace(face, landmarks=landmarks))
    unturned = yunet.embed(turned, face)
    assert upright is not None
    assert as_turned is not None
    assert unturned is not None
    assert upright @ as_turned > 0.99
    assert upright @ unturned < 0.9


def test_a_face_cut_out_is_seen_as_in_the_whole_picture(yunet: FaceFinder) -> None:
    """OpenCV itself, given the whole picture, is the measure."""
    picture = person((200, 20, 20), (20, 20, 200), 330)
    face = face_of(picture)
    points = [float(number) for point in face.landmarks for number in point]
    row = np.array([face.box.left, face.box.top, 110, 110, *points, 1], np.float32)
    bgr = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
    buffer = np.frombuffer(RECOGNIZER, np.uint8)
    net = cv2.FaceRecognizerSF.create("onnx", buffer, np.empty(0, np.uint8))
    expected = net.feature(net.alignCrop(bgr, row))[0]
    vector = yunet.embed(picture, face)
    assert vector is not None
    assert vector @ (expected / np.linalg.norm(expected)) > 0.999


def test_without_landmarks_or_recognizer_nobody_is_told_apart(
    yunet: FaceFinder, haar: FaceFinder, files: tuple[str, str]
) -> None:
    picture = person(RED, BLUE, 300)
    assert yunet.embed(picture, replace(face_of(picture), landmarks=())) is None
    assert haar.embed(picture, face_of(picture)) is None
    alone, says = open_finder("yunet", files[0], "", download=False, drawings=False)
    assert alone
    assert alone.embed(picture, face_of(picture)) is None
    assert "data.face_recognizer_file" in says


# The basic detector, on photographs.


@pytest.mark.parametrize("side", [1024, 512, 256, 128, 64])
def test_the_basic_detector_finds_the_astronaut(haar: FaceFinder, side: int) -> None:
    faces = haar.find(photograph("astronaut").resize((side, side)))
    box = faces[0].box
    assert len(faces) == 1
    # Eyes, nose and mouth, read off the photograph of 512 px.
    for x, y in ((208, 106), (241, 103), (228, 125), (224, 141)):
        assert box.left < x * side / 512 < box.right
        assert box.top < y * side / 512 < box.bottom
    assert box.width < 0.25 * side
    assert faces[0].landmarks == ()


@pytest.mark.parametrize("name", ["coffee", "chelsea", "rocket"])
def test_the_basic_detector_finds_nobody_where_nobody_is(haar: FaceFinder, name: str) -> None:
    assert haar.find(photograph(name)) == ()


def test_the_basic_detector_finds_two_people(haar: FaceFinder) -> None:
    one = photograph("astronaut").crop((100, 0, 400, 300))
    both = Image.new("RGB", (700, 300), "grey")
    both.paste(one, (0, 0))
    both.paste(one.resize((200, 200)), (450, 50))
    first, second = haar.find(both)
    assert first.box.right < 350 < second.box.left
    assert first.box.width > second.box.width


@pytest.mark.parametrize("crop", [(165, 0, 512, 200), (90, 40, 400, 512)])
def test_the_astronauts_face_lies_inside_the_crop(
    haar: FaceFinder, crop: tuple[int, int, int, int]
) -> None:
    """Crops in the middle would cut it in both pictures."""
    picture = photograph("astronaut").crop(crop)
    photo = Photo(Path("astronaut.png"), Size(*picture.size), "0" * 64)
    captioned = [Captioned(photo, ("ohwx person",), "template")]
    (face,) = haar.find(picture)

    def whole(face_crop: bool) -> list[bool]:
        plan = BucketPlan((64, 128, 192), step_px=16, max_aspect=1.25, face_crop=face_crop)
        return [
            holds(placed, face.box)
            for placed in place_photos(captioned, plan, {photo.digest: (face,)})
        ]

    assert whole(True) == [True] * 3
    assert whole(False) == [False] * 3


def holds(placed: Bucketed, box: Box) -> bool:
    """Whether a box of the photo lies inside the crop."""
    size = placed.captioned.photo.size
    across, down = placed.resized.width / size.width, placed.resized.height / size.height
    return (
        placed.left <= box.left * across
        and box.right * across <= placed.left + placed.bucket.width
        and placed.top <= box.top * down
        and box.bottom * down <= placed.top + placed.bucket.height
    )


def test_the_basic_detector_serves_several_threads(haar: FaceFinder) -> None:
    pictures = [photograph("astronaut").resize((side, side)) for side in (96, 128, 160, 192)]
    alone = [haar.find(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(haar.find, pictures * 3)) == alone * 3


# Which finder is opened, and what is said.


def test_auto_takes_the_best_that_is_there(files: tuple[str, str]) -> None:
    finder, says = open_finder("auto", *files, download=False, drawings=False)
    assert finder
    assert (finder.name.split()[0], finder.certain) == ("yunet", True)
    assert says == "Faces are found by YuNet and told apart by SFace."
    basic, says = open_finder("auto", "", "", download=False, drawings=False)
    assert basic
    assert (basic.name.split()[0], basic.certain) == ("haar", False)
    assert "basic detector" in says
    assert "data.face_download=true" in says


def test_drawings_and_none_have_no_finder(files: tuple[str, str]) -> None:
    finder, says = open_finder("auto", *files, download=False, drawings=True)
    assert finder is None
    assert "drawings" in says
    finder, says = open_finder("none", *files, download=False, drawings=False)
    assert finder is None
    assert "data.face_detector is none" in says


def test_unknown_and_missing_finders_are_explained(files: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="no face finder named 'yunte'. Did you mean 'yunet'"):
        open_finder("yunte", "", "", download=False, drawings=False)
    with pytest.raises(ConfigError, match="YuNet's file is not there") as caught:
        open_finder("yunet", "", "", download=False, drawings=False)
    assert "data.face_download=true" in caught.value.fix
    with pytest.raises(ConfigError, match="SFace's file is not there"):
        open_recognizer(files[0], "", download=False)


def test_without_opencv_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FINDERS:
        monkeypatch.delitem(sys.modules, f"trainer.faces.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    finder, says = open_finder("auto", "", "", download=False, drawings=False)
    assert finder is None
    assert 'pip install "likeness[face]"' in says
    with pytest.raises(ConfigError, match="not installed") as caught:
        open_finder("haar", "", "", download=False, drawings=False)
    assert 'pip install "likeness[face]"' in caught.value.fix


def test_an_opencv_without_the_basic_detector_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("cv2.CascadeClassifier")
    finder, says = open_finder("auto", "", "", download=False, drawings=False)
    assert finder is None
    assert "comes without the basic detector" in says
    with pytest.raises(ConfigError, match="comes without the basic detector"):
        open_finder("haar", "", "", download=False, drawings=False)


# Files: given, downloaded, damaged.


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), (b"", "cannot be used"), (b"no network" * 50, "cannot be used"),
     (RECOGNIZER, "cannot be used")],
)  # fmt: skip
def test_a_given_detector_that_is_none_is_refused(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "mine.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=f"YuNet's file {reason}") as caught:
        open_finder("auto", str(path), "", download=False, drawings=False)
    assert caught.value.where == str(path)
    assert "data.face_detector_file" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"no network" * 50, DETECTOR, face_models.recognizer(64)])
def test_a_given_recognizer_that_is_none_is_refused(
    files: tuple[str, str], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "mine.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="SFace's file cannot be used") as caught:
        open_finder("auto", files[0], str(path), download=False, drawings=False)
    assert caught.value.where == str(path)


class Hub:
    """Stands for the hub: hands out files, and remembers what was asked of it.

    cached: content of the copies that are there already. served: what a download brings; an
    exception is raised.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cached: dict[str, bytes] = {}
        self.served: dict[str, bytes | Exception] = {}
        self.downloads: list[str] = []

    def __call__(
        self, repo_id: str, filename: str, *, local_files_only: bool, force_download: bool
    ) -> str:
        assert {YUNET.repository: YUNET.file, SFACE.repository: SFACE.file}[repo_id] == filename
        if filename not in self.cached or force_download:
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
            self.downloads.append(filename)
            content = self.served[filename]
            if isinstance(content, Exception):
                raise content
            self.cached[filename] = content
        path = self.folder / filename
        path.write_bytes(self.cached[filename])
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub on which the small networks are published."""

    def publish(published: Published, name: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setattr(f"trainer.faces.yunet.{name}", replace(published, sha256=digest))

    publish(YUNET, "YUNET", DETECTOR)
    publish(SFACE, "SFACE", RECOGNIZER)
    hub = Hub(tmp_path)
    hub.served = {YUNET.file: DETECTOR, SFACE.file: RECOGNIZER}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return hub


def opened(*, download: bool) -> str | None:
    finder, _ = open_finder("auto", "", "", download=download, drawings=False)
    return finder.name.split()[0] if finder else None


def test_nothing_is_downloaded_unless_it_is_allowed(hub: Hub) -> None:
    assert opened(download=False) == "haar"
    assert hub.downloads == []
    assert opened(download=True) == "yunet"
    assert hub.downloads == [YUNET.file, SFACE.file]
    assert opened(download=True) == opened(download=False) == "yunet"
    assert hub.downloads == [YUNET.file, SFACE.file]


def test_another_network_goes_by_another_name(tmp_path: Path) -> None:
    """What was found is kept by the finder's name."""
    other = tmp_path / "other.onnx"
    names = set()
    for content in (DETECTOR, DETECTOR + b"\xa0\x06\x01"):  # a field that nobody reads
        other.write_bytes(content)
        finder, _ = open_finder("yunet", str(other), "", download=False, drawings=False)
        assert finder
        names.add(finder.name)
    assert len(names) == 2


def test_a_damaged_copy_is_never_opened(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cached[YUNET.file] = DETECTOR[:-1] + b"?"
    with monkeypatch.context() as closed:
        closed.delattr("cv2.FaceDetectorYN")
        with pytest.raises(ModelError, match="checksum is wrong") as caught:
            opened(download=False)
    assert caught.value.where.endswith(YUNET.file)
    assert opened(download=True) == "yunet"
    assert hub.downloads[0] == YUNET.file


def test_a_download_of_another_file_is_refused(hub: Hub) -> None:
    hub.served[SFACE.file] = b"another"
    with pytest.raises(ModelError, match="SFace's file is damaged or another one"):
        opened(download=True)


def connection_lost() -> Exception:
    """The error of the hub's HTTP library, whichever that is."""
    library = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    return library("the connection was lost")


@pytest.mark.parametrize(
    "problem",
    [lambda: LocalEntryNotFoundError("offline"), lambda: OSError(28, "disk full"), connection_lost],
)
def test_a_failed_download_says_what_to_do(hub: Hub, problem: Callable[[], Exception]) -> None:
    hub.served[YUNET.file] = problem()
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        opened(download=True)
    assert YUNET.file in caught.value.where
    assert "data.face_detector_file=PATH/" in caught.value.fix


def test_the_hubs_own_cache_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as huggingface_hub does it, and read by it."""
    monkeypatch.setattr(
        "trainer.faces.yunet.YUNET",
        replace(YUNET, sha256=hashlib.sha256(DETECTOR).hexdigest()),
    )
    repository = tmp_path / "hub" / f"models--{YUNET.repository.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / YUNET.file).write_bytes(DETECTOR)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    assert opened(download=False) == "yunet"
