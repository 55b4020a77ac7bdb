"""The reader finds in a picture what its prompt names, and the words of prompts are understood."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pretraining import data, read_prompts, reader
from pretraining.avatars import draw_avatar
from pretraining.captions import describe_context, sample_caption
from pretraining.looks import sample_context, sample_identity, sample_style
from pretraining.recipe import Recipe
from pretraining.sample_sets import ZIA
from pretraining.score_training import ScoreRecipe, load_base_vae, soft_copies
from trainer.errors import ModelError
from trainer.scoring.avatar_net import FOLDER
from trainer.scoring.reader import PromptReader
from trainer.scoring.words import named_looks, normal

FRESH_SEED = 57_000_000


@pytest.fixture(scope="module")
def prompt_reader() -> PromptReader:
    return PromptReader.load()


def test_captions_are_understood_exactly() -> None:
    phrases = read_prompts.phrases()
    for seed in range(FRESH_SEED, FRESH_SEED + 4000):
        identity, context = data.looks(seed)
        style = sample_style(seed)
        values = asdict(identity) | asdict(context) | {"style": style}
        caption = sample_caption(identity, context, seed, style=style)
        expected = {look: values[look] for look in caption.fields}
        assert named_looks(caption.text, phrases) == expected, caption.text


def test_sidecar_captions_are_understood_exactly() -> None:
    phrases = read_prompts.phrases()
    for seed in range(300):
        context = sample_context(seed)
        named = named_looks(f"zia avatar, {describe_context(context)}", phrases)
        hidden = {"hat", "hat_colour"} if context.hat == "none" else set()
        hidden |= {"background_colour"} if context.is_scene else set()
        looks = {"mouth", "hat", "hat_colour", "clothes", "clothes_colour", "background",
                 "background_colour"} - hidden  # fmt: skip
        assert named == {look: getattr(context, look) for look in looks}


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", {}),
        ("zqx avatar", {}),
        ("a photo of somebody nice", {}),
        ("red", {}),
        ("short red hair", {"hair_style": "short", "hair_colour": "red"}),
        ("red short hair", {"hair_style": "short", "hair_colour": "red"}),
        ("no hat, sad", {"hat": "none", "mouth": "sad"}),
        ("no beard, no glasses", {"beard": "none", "glasses": "none"}),
        (
            "Zia avatar wearing a BLUE cap and a red hoodie in the forest",
            {
                "hat": "cap",
                "hat_colour": "blue",
                "clothes": "hoodie",
                "clothes_colour": "red",
                "background": "forest",
            },
        ),
        ("teal skin, orange mohawk", {"skin": "teal", "hair_style": "mohawk",
                                      "hair_colour": "orange"}),
        ("yellow striped shirt", {"clothes": "striped shirt", "clothes_colour": "yellow"}),
        ("pink dotted background", {"background": "dots", "background_colour": "pink"}),
        ("red, cap", {"hat": "cap"}),
        ("bald, grey beard, a red cap, a blue cap",
         {"hair_style": "bald", "beard": "beard", "hair_colour": "grey", "hat": "cap",
          "hat_colour": "red"}),
    ],
)  # fmt: skip
def test_prompts_name_looks(
    prompt_reader: PromptReader, prompt: str, named: dict[str, str]
) -> None:
    assert prompt_reader.names(prompt) == named


def test_the_normal_form_drops_what_says_nothing() -> None:
    assert normal("Wearing a Red T-Shirt!") == "red t-shirt"


def test_shipped_words_are_those_of_the_captions() -> None:
    shipped = json.loads((FOLDER / "reader.json").read_text(encoding="utf-8"))
    current = json.loads(json.dumps(read_prompts.knowledge()))
    assert {key: shipped[key] for key in current} == current


def test_reads_what_captions_name_in_fresh_drawings(prompt_reader: PromptReader) -> None:
    pictures, _, named = reader.fresh(200, FRESH_SEED, rare=False)
    assert reader.measure(prompt_reader, pictures, named).share >= 0.96
    blurred = soft_copies(pictures[:100], load_base_vae(), seed=5, most_noise=0.0)
    assert reader.measure(prompt_reader, blurred, named[:100]).share >= 0.94


def test_reads_the_looks_that_the_base_never_saw(prompt_reader: PromptReader) -> None:
    pictures, _, named = reader.fresh(100, FRESH_SEED, rare=True)
    assert reader.measure(prompt_reader, pictures, named).share >= 0.93
    seen = prompt_reader.read([draw_avatar(ZIA, sample_context(seed)) for seed in range(40)])
    assert np.mean([looks["skin"] == "teal" for looks in seen]) >= 0.9
    assert np.mean([looks["mark"] == "star" for looks in seen]) >= 0.8


def test_a_prompt_of_another_picture_is_not_followed(prompt_reader: PromptReader) -> None:
    pictures, prompts, _ = reader.fresh(60, FRESH_SEED, rare=False)
    images = [Image.fromarray(picture) for picture in pictures]

    def mean(shares: list[float | None]) -> float:
        return float(np.mean([share for share in shares if share is not None]))

    followed = mean(prompt_reader.follow(images, prompts))
    assert mean(prompt_reader.follow(images, prompts[1:] + prompts[:1])) < followed - 0.5


def test_one_wrong_look_costs_its_share(prompt_reader: PromptReader) -> None:
    context = replace(
        sample_context(3), hat="none", clothes="suit", clothes_colour="black", mouth="laughing",
        background="plain", background_colour="blue",
    )  # fmt: skip
    image = draw_avatar(sample_identity(3), context)
    prompts = [
        "avatar, wearing a black suit, blue background",
        "avatar, wearing a red suit, blue background",
        "avatar",
        "avatar, wearing a red cap",
    ]
    assert prompt_reader.follow([image] * 4, prompts) == [1.0, 0.75, None, 0.0]


def test_what_is_hidden_is_not_held_against_a_picture(prompt_reader: PromptReader) -> None:
    named = {"hair_style": "spiky", "eyes": "big"}
    bare = {"hair_style": "short", "hat": "none", "glasses": "none", "eyes": "small"}
    assert prompt_reader.compare(bare, named) == {"hair_style": False, "eyes": False}
    hidden = bare | {"hat": "cap", "glasses": "sunglasses"}
    assert prompt_reader.compare(hidden, named) == {"hair_style": True}
    assert prompt_reader.compare(hidden | {"hair_style": "long"}, named) == {"hair_style": False}


def test_looks_that_are_not_there_are_left_out(prompt_reader: PromptReader) -> None:
    context = replace(sample_context(4), hat="none", background="forest")
    looks = prompt_reader.read([draw_avatar(sample_identity(4), context)])[0]
    assert looks["hat"] == "none"
    assert looks["background"] == "forest"
    assert not {"hat_colour", "background_colour"} & set(looks)


def test_mirrored_or_larger_pictures_read_the_same(prompt_reader: PromptReader) -> None:
    images = [draw_avatar(*data.looks(seed)) for seed in range(FRESH_SEED, FRESH_SEED + 5)]
    looks = prompt_reader.read(images)
    assert prompt_reader.read([ImageOps.mirror(image) for image in images]) == looks
    enlarged = [image.resize((192, 192), Image.Resampling.NEAREST) for image in images]
    assert prompt_reader.read(enlarged) == looks
    assert prompt_reader.read([]) == []
    assert prompt_reader.follow([], []) == []


def test_every_picture_needs_its_prompt(prompt_reader: PromptReader) -> None:
    with pytest.raises(ValueError, match="1 pictures need as many prompts, got 2"):
        prompt_reader.follow([Image.new("RGB", (64, 64))], ["avatar", "avatar"])


def test_missing_and_damaged_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weights of the reader net are missing") as caught:
        PromptReader.load(tmp_path)
    assert "reader.json" in str(caught.value)
    for name in ("reader.json", "reader.safetensors"):
        shutil.copy(FOLDER / name, tmp_path / name)
    description = tmp_path / "reader.json"
    facts = json.loads(description.read_text(encoding="utf-8"))
    facts["looks"]["skin"].append("plaid")
    description.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ModelError, match="outputs and its description names"):
        PromptReader.load(tmp_path)
    del facts["looks"]
    description.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ModelError, match="stand for cannot be read"):
        PromptReader.load(tmp_path)
    (tmp_path / "reader.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        PromptReader.load(tmp_path)


def test_training_learns_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped training goes on as if it had not stopped, and its export can be loaded."""
    recipe = replace(
        ScoreRecipe(), widths=(4, 4, 4, 4), hidden=8, reader_batch=8, reader_steps=2,
        reader_rare_pictures=4, reader_soft_pictures=4, reader_soft_rare_pictures=2,
        save_every_steps=1,
    )  # fmt: skip
    monkeypatch.setattr(reader, "Recipe", lambda: Recipe(pictures=12, held_out_pictures=2))
    straight = reader.train_reader(recipe, tmp_path).state_dict()
    (tmp_path / reader.STATE).unlink()
    reader.train_reader(replace(recipe, reader_steps=1), tmp_path)
    resumed = reader.train_reader(recipe, tmp_path)
    for key, value in resumed.state_dict().items():
        assert np.allclose(value.numpy(), straight[key].numpy(), atol=1e-6), key
    reader.export(resumed, recipe, tmp_path / "assets")
    image = draw_avatar(sample_identity(1), sample_context(1))
    assert set(PromptReader.load(tmp_path / "assets").read([image])[0]) >= {"skin", "hat"}
