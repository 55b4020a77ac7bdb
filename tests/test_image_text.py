"""Captions by other people's models: how each family is asked, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.captioners import FAMILIES, save_family, save_tiny_captioner, word_tokenizer
from tests.runs import Outcome
from trainer.captioners import CaptionerOptions, image_text, places
from trainer.captioners.asking import CHAT, family_of
from trainer.captioners.image_text import ImageTextCaptioner, load_captioner, whole_part
from trainer.errors import ModelError
from trainer.types import Photo, Size

Cli = Callable[..., Outcome]
CHATTED = f"<s> USER: <image> {CHAT.face} ASSISTANT:"
AROUND = "<fake_token_around_image>"
SPLIT = f"<s> USER: {AROUND} <global-img> <image> {AROUND} {{}} ASSISTANT:"

# The text beside the picture as the model reads it: unasked, and with the prompt "a man".
READ: dict[str, tuple[str | None, str]] = {
    "blip": (None, "[CLS] a man [SEP]"),
    "blip-2": (None, "<image> a man"),
    "git": ("[CLS]", "[CLS] a man"),
    "vision-encoder-decoder": (None, ""),
    "florence2": (
        "<image> <s> Describe in detail what is shown in the image. </s>",
        "<image> <s> a man </s>",
    ),
    "llava": (CHATTED, "<s> USER: <image> a man ASSISTANT:"),
    "joycaption": (CHATTED, "<s> USER: <image> a man ASSISTANT:"),
    "old llava": (CHATTED.removeprefix("<s> "), "USER: <image> a man ASSISTANT:"),
    "paligemma": ("<image> <s> caption en", "<image> <s> a man"),
    "idefics3": (SPLIT.format(CHAT.face), SPLIT.format("a man")),
}


# Those that are tried in the long suite alone.
RARE = ("old llava", "paligemma", "idefics3")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with somebody's BLIP; never written to."""
    return save_tiny_captioner(tmp_path_factory.mktemp("captioners") / "tiny")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of a few tokens: quicker, and as good for what is looked at."""
    monkeypatch.setattr(
        image_text, "family_of", lambda *a, **k: replace(family_of(*a, **k), tokens=5)
    )


def load(folder: Path | str, **options: Any) -> ImageTextCaptioner:
    return load_captioner(CaptionerOptions(str(folder), **options))


def read_text(captioner: ImageTextCaptioner, inputs: dict[str, torch.Tensor]) -> str | None:
    """The text beside a picture, with the picture's tokens as one."""
    if "input_ids" not in inputs:
        return None
    return re.sub(r"(<image> ?)+", "<image> ", captioner.tokenizer.decode(inputs["input_ids"][0]))


def test_every_family_that_is_tried_has_its_expectation() -> None:
    assert READ.keys() == FAMILIES.keys()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in FAMILIES],
)
def test_each_family_is_asked_in_its_way(
    name: str, cli: Cli, tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_family(name, tmp_path / "model")
    photos = tmp_path / "anna"
    photos.mkdir()
    picture.save(photos / "a.png")
    seen: list[tuple[str | None, Size]] = []
    inputs_of = ImageTextCaptioner.inputs

    def spy(self: ImageTextCaptioner, image: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
        inputs = inputs_of(self, image, prompt)
        seen.append((read_text(self, inputs), Size(*image.size)))
        assert inputs["pixel_values"].dtype == torch.float32
        return inputs

    monkeypatch.setattr(ImageTextCaptioner, "inputs", spy)
    asked, with_prompt = READ[name]
    out = cli("caption", photos, "--captioner", "transformers", "--model", model).done().out
    assert seen == [(asked, Size(50, 40))]
    sidecar = photos / "a.txt"
    if sidecar.exists():
        text = sidecar.read_text(encoding="utf-8").strip()
        assert f"1 of 1  a.png: {text}" in out
        assert not set(text.split()) & {"USER:", "<image>", "<s>", "</s>", "[CLS]"}
        again = load(model).describe(picture, "face")
        assert again == text == load(model).describe(picture, "face")
    else:
        assert "has no words for it" in out
    if name == "vision-encoder-decoder":
        with pytest.raises(ModelError, match="takes no prompt"):
            load(model, prompt="a man")
        return
    asked_for = load(model, prompt="a man")
    seen.clear()
    assert not asked_for.describe(picture, "style").startswith("a man a man")
    assert [text for text, _ in seen] == [with_prompt]


def test_questions_leave_out_what_the_trigger_shall_mean() -> None:
    chat = family_of("unheard of", chat_template=True)
    assert "Do not describe the person's face, hair" in chat.prompt("face")
    assert "nothing about style" in chat.prompt("style")
    assert "nothing about style" not in chat.prompt("face")
    assert family_of("unheard of", chat_template=False).prompt("face") == ""


def test_the_prompt_is_no_part_of_the_caption(tiny: Path, picture: Image.Image) -> None:
    captioner = load(tiny, prompt="A  Man")
    made = captioner.model.generate(**captioner.inputs(picture, "A  Man"), max_new_tokens=60)
    whole = captioner.tokenizer.decode(made[0], skip_special_tokens=True)
    assert whole.startswith("a man")
    caption = captioner.describe(picture, "face")
    assert caption
    assert whole.removeprefix("a man").strip().startswith(caption)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a man. He sits in a", "a man."),
        ("a man. He sits, in a", "a man."),
        ("a man, sitting, in a", "a man, sitting"),
        ("a man sitting in a", "a man sitting in a"),
        (", a man", ", a man"),
        ("", ""),
    ],
)
def test_of_a_caption_that_was_cut_off_the_whole_part_is_kept(text: str, kept: str) -> None:
    assert whole_part(text) == kept


def test_in_half_precision_the_numbers_of_the_picture_follow(
    tiny: Path, picture: Image.Image
) -> None:
    captioner = load(tiny, half=torch.bfloat16)
    assert captioner.model.dtype == torch.bfloat16
    inputs = captioner.inputs(picture, "a man")
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64
    captioner.describe(picture, "face")


# -- what is refused


def code_of(canary: Path) -> str:
    return f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def test_code_that_comes_with_a_model_is_never_run(tiny: Path, tmp_path: Path) -> None:
    folder, canary = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "canary"
    (folder / "modeling_own.py").write_text(code_of(canary), encoding="utf-8")
    own = {name: "modeling_own.Own" for name in ("AutoConfig", "AutoModelForImageTextToText")}
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for change in ({"auto_map": own}, {"auto_map": own, "model_type": "moondream9"}):
        path.write_text(json.dumps(config | change), encoding="utf-8")
        if "model_type" in change:
            with pytest.raises(ModelError, match="does not know: moondream9") as raised:
                load(folder)
            assert "code of its own, which is never done" in raised.value.fix
        else:
            load(folder)  # transformers has this architecture itself
    assert not canary.exists()


def test_code_of_a_processor_is_never_run(tiny: Path, tmp_path: Path) -> None:
    folder, canary = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "canary"
    (folder / "processing_own.py").write_text(code_of(canary), encoding="utf-8")
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"processor_class": "Own", "auto_map": {"AutoProcessor": "processing_own.Own"}}
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError):
        load(folder)
    assert not canary.exists()


def test_pickled_weights_are_never_read(tiny: Path, tmp_path: Path) -> None:
    folder, canary = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(canary)))
    with pytest.raises(ModelError) as raised:
        load(folder)
    assert ".safetensors" in raised.value.fix
    assert not canary.exists()


def test_weights_of_another_layout_are_no_random_captioner(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = {f"other.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="weights are not those of its kind"):
        load(folder)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="is installed")
def test_a_model_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}', encoding="utf-8")
    kinds = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kinds), encoding="utf-8")
    with pytest.raises(ModelError, match="needs torchvision") as raised:
        load(tmp_path)
    assert "pip install torchvision" in raised.value.fix


@pytest.mark.parametrize("config", ["", "[]", "{", "null", '{"model_type": 3}', "\x00"])
def test_a_config_that_is_none_is_explained(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ModelError) as raised:
        load(tmp_path)
    assert str(tmp_path) in raised.value.where


def test_a_photo_that_the_model_cannot_take_is_named(tiny: Path, tmp_path: Path) -> None:
    captioner = load(tiny)
    photo = Photo(tmp_path / "thin.png", Size(1, 1), "0" * 64)

    def fails(image: Image.Image, kind: str) -> str:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    captioner.describe = fails  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"cannot describe thin\.png: absolute aspect ratio"):
        captioner.caption(photo, lambda: Image.new("RGB", (1, 500)), "face")


# -- where the files come from


@pytest.mark.parametrize("name", ["", "a/b/c", "../a/b", "/nowhere/at-all", "C:\\blip", "a b/c"])
def test_a_folder_that_is_missing_is_not_looked_for_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "snapshot_download", lambda *_, **__: pytest.fail("was asked"))
    with pytest.raises(ModelError):
        load(name)


def test_a_name_on_the_hub_is_fetched_without_pickles_and_code(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tiny)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "snapshot_download", download)
    load("somebody/blip-tiny")
    assert asked["name"] == "somebody/blip-tiny"
    assert not {"*", "*.bin", "*.py", "*.pt"} & set(asked["allow_patterns"])
    assert "*/*" in asked["ignore_patterns"]


def test_a_folder_goes_before_a_name_on_the_hub(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / "somebody" / "blip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "snapshot_download", lambda *_, **__: pytest.fail("was asked"))
    load("somebody/blip")


def test_nothing_is_downloaded_when_that_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="switched off by HF_HUB_OFFLINE") as raised:
        load("somebody/blip-tiny")
    assert "download the model by hand" in raised.value.fix
