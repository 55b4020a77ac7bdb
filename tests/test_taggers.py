"""Taggers: models whose answer is known by construction, which tags are written, what is not."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console

from tests.runs import Outcome
from tests.strategies import unhurried
from trainer.captioners import CAPTIONERS, CaptionerOptions
from trainer.captioners.tagger import Tagger, load_captioner, prepare
from trainer.captioners.tags import (
    CHARACTER,
    GENERAL,
    RATING,
    Tag,
    TagChoice,
    choose_tags,
    excluded,
    read_tags,
    spoken,
)
from trainer.commands.bases import base_facts
from trainer.commands.describe import describer_of
from trainer.config.photo_settings import CaptionSettings
from trainer.config.settings import TrainConfig
from trainer.errors import ConfigError, ModelError
from trainer.types import Photo, Size

Cli = Callable[..., Outcome]
SIDE = 32
RED, WHITE = (255, 0, 0), (255, 255, 255)

# The model's outputs: the means of blue, green and red, the first channel's first pixel, each from
# 0 to 1, then figures that are always the same.
COMPUTED = (("blue", GENERAL), ("green_grass", GENERAL), ("red", GENERAL), ("corner", GENERAL))
CONSTANT = {
    ("general", RATING): 0.6,
    ("explicit", RATING): 0.3,
    ("hatsune_miku_(vocaloid)", CHARACTER): 0.9,
    ("somebody", CHARACTER): 0.8,
    ("^_^", GENERAL): 0.36,
    ("long_hair", GENERAL): 0.34,
}
PHOTO = Photo(Path("a.png"), Size(1, 1), "0" * 64)


def save_tagger(
    folder: Path,
    *,
    shape: Sequence[int | str] = ("batch", SIDE, SIDE, 3),
    factor: float = 1 / 255,
    tags: Sequence[tuple[str, int]] = (*COMPUTED, *CONSTANT),
) -> Path:
    """A tagger in the layout of the public ones."""

    def constant(name: str, values: Sequence[float] | Sequence[int]) -> onnx.TensorProto:
        kind = np.int64 if isinstance(values[0], int) else np.float32
        return numpy_helper.from_array(np.array(values, kind), name)

    node = helper.make_node
    nodes = [
        node("ReduceMean", ["pixels", "height_width"], ["means"], keepdims=0),
        node("Slice", ["pixels", "zeros", "ones", "axes"], ["first"]),
        node("Reshape", ["first", "one_by_one"], ["corner"]),
        node("Concat", ["means", "corner"], ["values"], axis=1),
        node("Mul", ["values", "factor"], ["shares"]),
        node("Concat", ["shares", "known"], ["probabilities"], axis=1),
    ]
    known = numpy_helper.from_array(np.array([[*CONSTANT.values()]], np.float32), "known")
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", None])],
        [
            constant("height_width", [1, 2]),
            constant("zeros", [0, 0, 0]),
            constant("ones", [1, 1, 1]),
            constant("axes", [1, 2, 3]),
            constant("one_by_one", [1, 1]),
            constant("factor", [factor]),
            known,
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("tag_id", "name", "category", "count"))
        writer.writerows((number, *tag, 100) for number, tag in enumerate(tags))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tagger; never written to."""
    return save_tagger(tmp_path_factory.mktemp("taggers") / "tiny")


def tags_of(tagger: Tagger, image: Image.Image, kind: str = "style") -> str:
    return tagger.caption(PHOTO, lambda: image, kind)


def load(folder: Path, **options: object) -> Tagger:
    return load_captioner(CaptionerOptions(str(folder), **options))  # type: ignore[arg-type]


# -- the picture


def test_colours_go_in_as_blue_green_red_and_the_square_is_filled_with_white(folder: Path) -> None:
    """A red picture twice as high as wide has white beside it: half of blue and green."""
    tagger = load(folder, threshold=0.45)
    tall = Image.new("RGB", (40, 80), RED)
    assert tags_of(tagger, tall, "face") == "red, corner, blue, green grass"
    assert tags_of(tagger, Image.new("RGB", (40, 40), RED), "face") == "red"
    assert tags_of(tagger, Image.new("RGB", (7, 7), (0, 0, 255)), "face") == "blue, corner"


@given(width=st.integers(1, 90), height=st.integers(1, 90), red=st.integers(0, 255))
@unhurried
def test_any_picture_stands_in_the_middle_of_a_white_square(
    width: int, height: int, red: int
) -> None:
    pixels = prepare(Image.new("RGB", (width, height), (red, 20, 0)), SIDE)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels.dtype == np.float32
    wide, high = (max(1, round(SIDE * side / max(width, height))) for side in (width, height))
    left, top = (SIDE - wide) // 2, (SIDE - high) // 2
    expected = np.full((SIDE, SIDE, 3), 255, np.float32)
    expected[top : top + high, left : left + wide] = (0, 20, red)
    assert np.array_equal(pixels, expected)


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = Image.effect_noise((SIDE, SIDE), 90).convert("RGB")
    assert np.array_equal(prepare(image, SIDE)[:, :, ::-1], np.asarray(image))


# -- the tags


def test_a_face_goes_without_names_of_characters_unless_asked(folder: Path) -> None:
    black = Image.new("RGB", (8, 8))
    assert tags_of(load(folder), black, "face") == "^_^"
    assert tags_of(load(folder), black, "style") == "hatsune miku (vocaloid), ^_^"
    asked = load(folder, character_threshold=0.8)
    for kind in ("face", "style"):
        assert tags_of(asked, black, kind) == "hatsune miku (vocaloid), somebody, ^_^"


def test_thresholds_exclusions_and_ratings_are_followed(folder: Path) -> None:
    black = Image.new("RGB", (8, 8))
    assert tags_of(load(folder, threshold=0.34), black, "face") == "^_^, long hair"
    assert tags_of(load(folder, threshold=0.341), black, "face") == "^_^"
    assert tags_of(load(folder, threshold=0.9), black, "face") == ""
    assert tags_of(load(folder, rating=True), black, "face") == "^_^, general"
    unwanted = load(folder, threshold=0.3, rating=True, exclude=(" Long_Hair", "GENERAL", ""))
    assert tags_of(unwanted, black, "face") == "^_^, explicit"


NAMES = st.sampled_from(["a", "b", "long hair", "c (d)", "^_^"])
TAGS = st.lists(
    st.tuples(
        st.builds(Tag, NAMES, st.sampled_from([GENERAL, CHARACTER, RATING, 1, 3])),
        st.floats(0, 1, width=32),
    ),
    max_size=20,
)


@given(TAGS, st.floats(0.01, 1), st.floats(0.01, 1), st.sets(NAMES), st.booleans())
def test_what_is_written_is_probable_wanted_and_written_once(
    tags: list[tuple[Tag, float]],
    general: float,
    character: float,
    exclude: set[str],
    rating: bool,
) -> None:
    choice = TagChoice(general, character, excluded(exclude), rating)
    text = choose_tags([tag for tag, _ in tags], [value for _, value in tags], choice)
    limits = {GENERAL: general, CHARACTER: character}
    for category in (GENERAL, CHARACTER):
        expected = {
            tag.name
            for tag, value in tags
            if tag.category == category and value >= limits[category]
        } - exclude
        assert expected <= set(text.split(", "))
    ratings = {tag.name for tag, _ in tags if tag.category == RATING} - exclude
    known = {tag.name for tag, value in tags if value >= limits.get(tag.category, 2)} - exclude
    written = text.split(", ") if text else []
    assert set(written) <= known | (ratings if rating else set())
    if not rating:
        assert len(written) <= 2 * len(set(written))
        assert bool(written) == bool(known)


def test_underscores_become_blanks_except_in_faces() -> None:
    assert [spoken(name) for name in ("long_hair", "^_^", "|_|", " a__b ", "0_0", "o_o_o")] == [
        *("long hair", "^_^", "|_|", "a b", "0_0", "o o o"),
    ]


# -- the command


def test_tags_are_written_beside_the_photos(cli: Cli, folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "anna"
    photos.mkdir()
    Image.new("RGB", (40, 80), RED).save(photos / "a.png")
    Image.new("RGB", (40, 40), (0, 0, 0)).save(photos / "b.png")
    chosen = ("caption", photos, "--captioner", "tagger", "--model", folder)
    cli(*chosen, "--threshold", "0.45", "--exclude", "Corner, green_grass").done()
    assert (photos / "a.txt").read_text(encoding="utf-8") == "red, blue\n"
    assert not (photos / "b.txt").exists()
    cli(*chosen, "--character-threshold", "0.85", "--rating").done()
    written = (photos / "b.txt").read_text(encoding="utf-8")
    assert written == "hatsune miku (vocaloid), ^_^, general\n"


def test_a_run_describes_its_photos_with_the_tagger_in_the_folder(
    folder: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 80), RED).save(tmp_path / "a.png")
    facts = replace(base_facts("embedded"), embedded=False)
    for name in ("auto", "tagger"):
        settings = CaptionSettings(captioner=name, captioner_folder=str(folder))
        describe = describer_of(TrainConfig(caption=settings), facts, Console(quiet=True))
        assert describe
        text = describe(Photo(tmp_path / "a.png", Size(40, 80), "0" * 64))
        assert text == "red, corner, blue, green grass, ^_^"


# -- what is refused


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"tag_id,name,category,count\n",
        b"tag_id,tag,category\n1,a,0\n",
        b"tag_id,name,category\n1,,0\n",
        b"tag_id,name,category\n1,a,\n",
        b"tag_id,name,category\n1,a,x\n",
        b"tag_id,name,category\n1,a,77\n",
        b"tag_id,name,category\n1,a\n",
        b"tag_id,name,category\n1,a\x07b,0\n",
        b"\xff\xfe\x00\x01",
        b"PK\x03\x04\x00\x00",
    ],
)
def test_a_list_of_tags_that_is_none_is_explained(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "selected_tags.csv"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="list of tags cannot be used"):
        read_tags(path)


def test_a_missing_list_of_tags_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no model", b"\x08\x09" * 50])
def test_a_model_that_is_none_is_explained(
    content: bytes | None, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "selected_tags.csv").write_bytes((folder / "selected_tags.csv").read_bytes())
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="tagger cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize(
    "shape", [("batch", 3, SIDE, SIDE), (1, SIDE, 16, 3), (1, 4, 4, 3), (1, "h", "w", 3)]
)
def test_a_model_of_another_layout_is_explained(
    shape: tuple[int | str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="not of the WD14 kind"):
        load(save_tagger(tmp_path, shape=shape))


def test_more_tags_than_values_are_refused(tmp_path: Path) -> None:
    folder = save_tagger(tmp_path, tags=[*COMPUTED, *CONSTANT, ("one more", GENERAL)])
    with pytest.raises(ModelError, match="gives 10 values for 11 tags"):
        tags_of(load(folder), Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("factor", [1.0, -1.0, float("nan"), float("inf")])
def test_values_that_are_no_probabilities_are_refused(factor: float, tmp_path: Path) -> None:
    tagger = load(save_tagger(tmp_path, factor=factor))
    with pytest.raises(ModelError, match="no probabilities"):
        tags_of(tagger, Image.new("RGB", (8, 8), WHITE))


def test_without_onnxruntime_it_is_said_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "trainer.captioners.tagger")
    with pytest.raises(ConfigError, match="needs a package that is not installed") as raised:
        CAPTIONERS.load("tagger")
    assert 'pip install "likeness[tagger]"' in raised.value.fix
