"""Captions by any model that transformers loads to turn a picture into text.

Weights are read from `.safetensors` files alone, and code that comes with a model is never run.
A model's `config.json` may say what it is asked, by what is learned from the photos:
`"caption_prompts": {"face": "...", "style": "..."}`; ours does. Other models are asked as
`asking.py` has it for their family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from trainer.captioners import CaptionerOptions
from trainer.captioners.asking import Family, family_of
from trainer.captioners.places import find_model, reason_of
from trainer.errors import ModelError
from trainer.types import Photo
from trainer.untrusted import CONFIG_BYTES, read_json

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# What transformers raises on folders that hold something else, or lack something.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
# What models raise on pictures they cannot take, such as very narrow ones.
_PHOTO_ERRORS = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)
# A few weights that a caption does not need may be missing (the pooler of some vision encoders);
# if more are, the file is of another layout and the model would be a random one.
_MISSING_SHARE = 0.1


class ImageTextCaptioner:
    """A captioner of transformers with its processor.

    Args:
        model: makes token ids from pixels and a prompt.
        processor: brings a picture to the model's size, and text beside it to tokens.
        tokenizer: turns text into tokens and back.
        family: how the model is asked.
        prompts: what it is asked, by kind; other kinds as its family has it.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tokenizer: Any,
        *,
        family: Family,
        prompts: Mapping[str, str],
    ) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = tokenizer
        self.family = family
        self.prompts = prompts

    def caption(self, photo: Photo, image: Callable[[], Image.Image], kind: str) -> str:
        """What a photo shows, see `Captioner`."""
        picture = image()
        try:
            return self.describe(picture, kind)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                "The captioner does not fit into the GPU's memory.",
                where=str(photo.path),
                fix="Close other programs that use the GPU, or take a smaller captioner.",
            ) from error
        except _PHOTO_ERRORS as error:
            raise ModelError(
                f"The captioner cannot describe {photo.path.name}: {reason_of(error)}",
                where=str(photo.path),
                fix="Write its caption by hand, into a .txt file of its name.",
            ) from error

    @torch.no_grad()
    def describe(self, image: Image.Image, kind: str) -> str:
        """What a picture shows; the most probable word each time, so that nothing is random."""
        prompt = self.prompts.get(kind, self.family.prompt(kind))
        inputs = self.inputs(image, prompt)
        limit = self.family.tokens
        made = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0].tolist()
        asked = inputs["input_ids"][0].tolist() if "input_ids" in inputs else []
        if asked and made[: len(asked)] == asked:
            made = made[len(asked) :]
        text = _one_line(self.tokenizer.decode(made, skip_special_tokens=True))
        text = self._without(prompt, text)
        return text if self._ended(made) else whole_part(text)

    def inputs(self, image: Image.Image, prompt: str) -> dict[str, Tensor]:
        """What the model is given for a picture and a question, on its device."""
        way = self.family.way
        if way == "chat":
            given = self._chat(image, prompt)
        elif way == "begin":
            start = self.tokenizer.cls_token_id, self.tokenizer.bos_token_id
            first = [next(token for token in start if token is not None)]
            words = self.tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
            given = dict(self.processor(images=image, return_tensors="pt"))
            given["input_ids"] = torch.tensor([first + list(words)])
        elif way == "image":
            given = self.processor(images=image, return_tensors="pt")
        else:
            text = self.family.around.replace("{prompt}", prompt)
            given = self.processor(images=image, text=text or None, return_tensors="pt")
        place = self.model.device
        return {
            name: value.to(place, self.model.dtype if value.is_floating_point() else None)
            for name, value in given.items()
            if isinstance(value, Tensor) and name != "labels"  # PaliGemma's, for training
        }

    def _chat(self, image: Image.Image, prompt: str) -> Mapping[str, Tensor]:
        """A question in the form of the model's chat template.

        Most templates take a list of a picture and a text; some (JoyCaption's) take a plain text
        and put the picture before it themselves.
        """
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        listed = [{"role": "user", "content": content}]
        plain = [{"role": "user", "content": prompt}]
        apply = partial(self.processor.apply_chat_template, add_generation_prompt=True)
        try:
            takes_list = "{'type'" not in apply(listed)
        except TypeError:  # a list cannot be put between texts
            takes_list = False
        if takes_list:
            return apply(listed, tokenize=True, return_dict=True, return_tensors="pt")
        text = apply(plain)
        begun = text.startswith(self.tokenizer.bos_token or "\0")
        return self.processor(
            images=image, text=text, return_tensors="pt", add_special_tokens=not begun
        )

    def _without(self, prompt: str, text: str) -> str:
        """A caption without the prompt it begins with, as the tokenizer writes that."""
        if not prompt:
            return text
        ids = self.tokenizer(prompt).input_ids
        begin = _one_line(self.tokenizer.decode(ids, skip_special_tokens=True))
        return text.removeprefix(begin).strip()

    def _ended(self, made: list[int]) -> bool:
        """Whether the model came to an end by itself."""
        end = self.model.generation_config.eos_token_id
        ends = {*(end if isinstance(end, list) else [end])}
        ends |= {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
        # The first token may be the mark of an end that some decoders begin with.
        return len(made) < self.family.tokens or not ends.isdisjoint(made[1:])


def load_captioner(options: CaptionerOptions) -> ImageTextCaptioner:
    """Read a captioner in the format of transformers from a folder, or from the hub.

    Raises:
        ModelError: there is none, it cannot be read, or it needs code or packages that are not
            here.
    """
    folder = find_model(options.model, _FILES)
    config = _read_config(folder)
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **safe)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or getattr(processor, "image_processor", None) is None:
            processor = AutoImageProcessor.from_pretrained(folder, **safe)
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            **safe,
            use_safetensors=True,
            dtype=options.half or torch.float32,
            output_loading_info=True,
        )
    except _LOAD_ERRORS as error:
        raise _unusable(folder, error) from error
    missing = report["missing_keys"]
    if len(missing) > _MISSING_SHARE * len(model.state_dict()):
        raise ModelError(
            f"The captioner's weights are not those of its kind ({config['model_type']}): "
            f"{len(missing)} of them are missing.",
            where=f"{folder}\nfor instance {sorted(missing)[0]}",
            fix="Take the model in the layout that transformers itself knows (for Florence-2: "
            "one of florence-community).",
        )
    chat = bool(getattr(processor, "chat_template", None))
    family = family_of(str(config["model_type"]), chat_template=chat)
    if options.prompt is None:
        prompts = dict(config.get("caption_prompts") or {})
    elif family.way == "image":
        raise ModelError(
            "This captioner takes no prompt.", where=str(folder), fix="Leave out --prompt."
        )
    else:
        prompts = dict.fromkeys(("face", "style"), options.prompt)
    model = model.eval().to(options.device or "cpu")
    return ImageTextCaptioner(model, processor, tokenizer, family=family, prompts=prompts)


def _read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
        ModelError: there is none, or it is of no model that transformers knows.
    """
    try:
        config = read_json(folder / "config.json", CONFIG_BYTES)
    except FileNotFoundError as error:
        raise ModelError(
            "There is no captioner in this folder.",
            where=f"{folder} (it has no config.json)",
            fix="Give the folder of a captioning model as transformers saves it, such as BLIP.",
        ) from error
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in CONFIG_MAPPING:
        own_code = isinstance(config, dict) and "auto_map" in config
        raise ModelError(
            f"The captioner is of a kind that the installed transformers does not know: {kind}.",
            where=str(folder),
            fix="It would run code of its own, which is never done. Take another captioner."
            if own_code
            else "Take another captioner, or a newer version of transformers.",
        )
    return config


def _unusable(folder: Path, error: Exception) -> ModelError:
    if "torchvision" in str(error).lower():
        return ModelError(
            "This captioner needs torchvision to read pictures, which is not installed.",
            where=str(folder),
            fix="Install it from where your PyTorch came from: pip install torchvision",
        )
    return ModelError(
        f"The captioner cannot be loaded: {reason_of(error)}",
        where=str(folder),
        fix="It has to be a model that turns a picture into text, with its processor and its "
        "weights as .safetensors. Download it again, or take another one.",
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def whole_part(text: str) -> str:
    """A caption that was cut off, up to its last sentence, else its last comma, if any."""
    for mark in (". ", ", "):
        begin = text.rpartition(mark)[0]
        if begin:
            return begin + mark.strip(" ,")
    return text
