"""The captioner: our own and other people's, in a run, as a command, and how ours is made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForConditionalGeneration

from pretraining import captioner as making
from pretraining import palette, training
from pretraining.avatars import draw_avatar
from pretraining.captioner_evaluation import Tally, read_context
from pretraining.captioner_material import (
    PROMPTS,
    CaptionerRecipe,
    describe,
    distorted,
    new_tokenizer,
    stranger,
)
from pretraining.captions import describe_context, describe_identity
from pretraining.data import looks
from pretraining.looks import SCENES
from tests.captioners import save_tiny_captioner
from tests.runs import Outcome, state_of
from tests.strategies import unhurried
from trainer.captioners import CaptionerOptions
from trainer.captioners.image_text import ImageTextCaptioner, load_captioner
from trainer.commands.bases import base_facts
from trainer.commands.describe import caption_flags, describer_of, open_captioner
from trainer.config.photo_settings import CaptionSettings
from trainer.config.presets import EMBEDDED_BASE, OWN_CAPTIONER
from trainer.config.settings import TrainConfig
from trainer.data.captions import caption_photos
from trainer.data.decode import decode_upright
from trainer.errors import ConfigError, ModelError
from trainer.families import BaseFacts
from trainer.types import Photo, Size

QUIET = Console(quiet=True)
DATASETS = Path(__file__).parent.parent / "datasets"
Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def own() -> ImageTextCaptioner:
    return load(OWN_CAPTIONER)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with somebody's BLIP; never written to."""
    return save_tiny_captioner(tmp_path_factory.mktemp("captioners") / "tiny")


@pytest.fixture(scope="module")
def embedded() -> BaseFacts:
    return base_facts("embedded")


def photo(path: Path) -> Photo:
    return Photo(path, Size(64, 64), "0" * 64)


def load(folder: Path) -> ImageTextCaptioner:
    return load_captioner(CaptionerOptions(str(folder)))


def config(kind: str = "face", **caption: str) -> TrainConfig:
    settings = TrainConfig(caption=CaptionSettings(**caption))  # type: ignore[arg-type]
    return settings.model_copy(update={"run": settings.run.model_copy(update={"kind": kind})})


# -- our own


def test_our_captioner_is_small_and_of_an_architecture_that_transformers_knows() -> None:
    assert sum(path.stat().st_size for path in OWN_CAPTIONER.iterdir()) <= 6_000_000
    model = AutoModelForImageTextToText.from_pretrained(OWN_CAPTIONER, local_files_only=True)
    assert isinstance(model, BlipForConditionalGeneration)
    assert AutoProcessor.from_pretrained(OWN_CAPTIONER, local_files_only=True).tokenizer.is_fast
    with safe_open(OWN_CAPTIONER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
        assert all(name.startswith(("vision_model.", "text_decoder.")) for name in file.keys())  # noqa: SIM118


def test_our_captioner_describes_a_face_that_no_drawing_of_its_training_has() -> None:
    """The face set has a skin, a hair style and a mark that were held out."""
    tally = Tally()
    captioner = open_captioner("own", CaptionerOptions(), QUIET, kind="face", device="cpu")
    for sidecar in sorted((DATASETS / "zia").glob("*.txt")):
        (path,) = (p for p in sidecar.parent.glob(f"{sidecar.stem}.*") if p != sidecar)
        truth = sidecar.read_text(encoding="utf-8").strip()
        text = captioner.caption(photo(path), partial(decode_upright, path), "face")
        tally.add(read_context(truth), read_context(text))
    assert tally.share >= 0.92


def test_our_captioner_says_who_is_shown_for_a_style_alone(own: ImageTextCaptioner) -> None:
    known = []
    for seed in range(71_000_000, 71_000_006):
        identity, context = looks(seed)
        image = draw_avatar(identity, context, 64)
        who = describe_identity(identity).split(", ")
        of_face, of_style = own.describe(image, "face"), own.describe(image, "style")
        assert not set(who) & set(of_face.split(", "))
        known += [part in of_style.split(", ") for part in who]
        assert set(read_context(of_style)) >= {"mouth", "clothes"}
    assert np.mean(known) > 0.8


@pytest.mark.parametrize("size", [(32, 32), (640, 128), (97, 300), (1200, 1200)])
def test_a_photo_of_any_size_gets_the_same_caption_every_time(
    own: ImageTextCaptioner, size: tuple[int, int]
) -> None:
    identity, context = looks(71_000_000)
    image = draw_avatar(identity, context, 128).resize(size)
    text = own.describe(image, "face")
    assert text == load(OWN_CAPTIONER).describe(image, "face")
    assert text == " ".join(text.split()) != ""
    assert "scene" not in text


# -- other people's


def test_somebodys_blip_is_asked_without_a_prompt(tiny: Path, tmp_path: Path) -> None:
    captioner = load(tiny)
    assert captioner.prompts == {}
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    text = captioner.describe(image, "face")
    assert set(text.replace(",", " ").split()) <= {"a", "man", "woman", "in", "front", "of"} | {
        *("red", "blue", "house", "smiling", "-")
    }
    assert text == captioner.describe(image, "style") == load(tiny).describe(image, "")


def test_sampling_in_a_captioners_own_settings_is_not_followed(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "sampling")
    settings = folder / "generation_config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("{", '{"do_sample": true,', 1), encoding="utf-8")
    captioner = load(folder)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    assert len({captioner.describe(image, "face") for _ in range(4)}) == 1


def _nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_processor(folder: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _a_text_encoder(folder: Path) -> None:
    source = EMBEDDED_BASE / "text_encoder" / "config.json"
    (folder / "config.json").write_bytes(source.read_bytes())


@pytest.mark.parametrize(
    "spoil", [_nothing, _no_config, _cut_weights, _no_weights, _no_processor, _a_text_encoder]
)
def test_a_folder_that_is_no_captioner_is_explained(
    tiny: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "spoiled")
    spoil(folder)
    with pytest.raises(ModelError) as raised:
        load(folder)
    assert str(folder) in raised.value.where
    assert raised.value.fix


# -- which one, and where its words go


def test_the_captioner_is_asked_only_about_photos_without_a_caption(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sad", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" \n", encoding="utf-8")
    photos = [photo(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")]
    answers = {"b.jpg": "smiling\n in a garden", "c.jpg": "a ZQX on a beach", "d.jpg": " "}
    captions = caption_photos(
        photos,
        trigger="zqx",
        class_noun="avatar",
        template="{trigger}!",
        describe=lambda photo: answers[photo.path.name],
    )
    assert [(caption.text, caption.origin) for caption in captions] == [
        ("zqx avatar, sad", "sidecar"),
        ("zqx avatar, smiling in a garden", "captioner"),
        ("a zqx on a beach", "captioner"),
        ("zqx!", "template"),
    ]


def test_auto_takes_ours_for_the_embedded_base_and_none_for_others(
    embedded: BaseFacts, tiny: Path
) -> None:
    real = replace(embedded, embedded=False)
    assert describer_of(config(), embedded, QUIET)
    assert describer_of(config(), real, QUIET) is None
    assert describer_of(config(captioner_folder=str(tiny)), real, QUIET)
    assert describer_of(config(captioner="none", captioner_folder=str(tiny)), real, QUIET) is None
    assert describer_of(config(captioner="none"), embedded, QUIET) is None
    for name in ("own", "transformers"):
        with pytest.raises(ConfigError, match="embedded base's drawings only"):
            describer_of(config(captioner=name), real, QUIET)
        assert describer_of(config(captioner=name), embedded, QUIET)
    with pytest.raises(ConfigError, match="tagger needs its folder"):
        describer_of(config(captioner="tagger"), embedded, QUIET)
    with pytest.raises(ConfigError, match="Did you mean 'transformers'"):
        describer_of(config(captioner="transformer"), embedded, QUIET)
    assert describer_of(config(captioner="filename"), real, QUIET)
    assert describer_of(config(captioner="template"), real, QUIET) is None


def test_what_to_type_for_the_captioner_of_a_run(
    embedded: BaseFacts, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "selected_tags.csv").touch()
    known = {
        "": config(),
        f' --captioner transformers --model "{tiny}"': config(captioner_folder=str(tiny)),
        f' --captioner tagger --model "{tmp_path}"': config(captioner_folder=str(tmp_path)),
        " --captioner filename": config(captioner="filename"),
    }
    for flags, settings in known.items():
        assert caption_flags(settings, embedded) == flags


def test_nothing_is_loaded_before_a_photo_needs_it(embedded: BaseFacts, tmp_path: Path) -> None:
    describe_photo = describer_of(
        config(captioner_folder=str(tmp_path / "missing")), embedded, QUIET
    )
    assert describe_photo
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ModelError, match="no captioner in this folder"):
        describe_photo(photo(tmp_path / "a.png"))


def test_a_run_trains_on_the_captioners_words_and_shows_them(
    train: Callable[..., Outcome], photos: Path, tiny: Path, tmp_path: Path
) -> None:
    out = train(f"caption.captioner_folder={tiny}", "caption.trigger=zqx").done().out
    assert "Describing photos with the transformers captioner in" in out
    assert "1 captions from .txt files, 2 by the captioner" in out
    assert f'likeness caption "{photos}" --captioner transformers --model "{tiny}"' in out
    text = load(tiny).describe(Image.open(photos / "1.png").convert("RGB"), "face")
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"zqx person, {text}" in report
    assert "caption: captioner" in report


# -- how it is made


@given(seed=st.integers(0, 10**6))
@unhurried
def test_a_true_caption_is_read_as_it_was_meant(seed: int) -> None:
    identity, context = looks(seed)
    truth = {"mouth": context.mouth, "hat": context.hat, "clothes": context.clothes}
    truth |= {"clothes_colour": context.clothes_colour, "background": context.background}
    if context.hat != "none":
        truth["hat_colour"] = context.hat_colour
    if context.background not in SCENES:
        truth["background_colour"] = context.background_colour
    assert read_context(describe("face", identity, context)) == truth
    assert read_context(describe("style", identity, context)) == truth


def test_a_caption_in_other_words_counts_as_wrong() -> None:
    tally = Tally()
    truth = read_context("sad, wearing a red suit, blue background")
    tally.add(truth, read_context("sad, wearing a green suit, nowhere"))
    right = {name: each[0] for name, each in tally.right.items()}
    assert right == {
        **{"mouth": True, "clothes": True, "hat": True},
        **{"clothes_colour": False, "background": False, "background_colour": False},
    }
    assert tally.share == 0.5


def test_strangers_differ_in_skin_and_hair_alone_and_leave_the_palette() -> None:
    skins, hair = dict(palette.SKIN), dict(palette.HAIR)
    seed = next(s for s in range(100) if looks(s)[0].hair_style == "long")
    drawn, known = stranger(seed, 64), np.asarray(draw_avatar(*looks(seed), 64))
    assert (skins, hair) == (palette.SKIN, palette.HAIR)
    assert np.array_equal(drawn, stranger(seed, 64))
    assert not np.array_equal(drawn, known)
    assert np.array_equal(drawn[:3], known[:3])  # the background


def test_distorted_pictures_keep_their_shape_and_range() -> None:
    pictures = torch.rand(6, 3, 64, 64) * 2 - 1
    made, again = (distorted(pictures, torch.Generator().manual_seed(3)) for _ in range(2))
    assert made.shape == pictures.shape
    assert torch.equal(made, again)
    assert made.abs().max() <= 1
    assert not torch.equal(made, pictures)


SMALL = CaptionerRecipe(
    strangers=8,
    width=16,
    heads=2,
    vision_layers=1,
    text_layers=1,
    vocabulary=300,
    vocabulary_texts=50,
    tokens=200,
    looks_steps=2,
    steps=4,
    batch=4,
    save_every_steps=2,
)


def test_the_tokenizer_gives_every_text_back() -> None:
    tokenizer = new_tokenizer(SMALL)
    for text in ("smiling, wearing a t-shirt", "Zoë's 日本, 3-4!", PROMPTS["face"]):
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.sep_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    drawn = [np.asarray(draw_avatar(*looks(seed), 64)) for seed in range(12)]
    np.save(folder / "pictures.npy", np.stack(drawn))
    return folder


def test_training_goes_on_where_it_stopped(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(work, tmp_path / "whole")
    making.train(SMALL, whole)
    save = training.save_state

    class Stop(Exception):
        pass

    def save_and_stop(path: Path, state: dict[str, object]) -> None:
        save(path, state)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(making, "save_state", save_and_stop)
        with pytest.raises(Stop):
            making.train(SMALL, work)
    making.train(SMALL, work)
    folders = [tmp_path / name for name in ("one", "two")]
    for source, target in zip((whole, work), folders, strict=True):
        making.export(SMALL, source, target)
    assert state_of(folders[0]) == state_of(folders[1])
    assert load(folders[0]).prompts == PROMPTS


def test_export_needs_a_trained_state(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the training first"):
        making.export(SMALL, tmp_path, tmp_path / "out")


def test_a_caption_of_a_face_leaves_out_who_is_shown() -> None:
    identity, context = looks(5)
    assert describe("face", identity, context) == describe_context(context)
    assert describe_identity(identity) in describe("style", identity, context)
