"""Captions by BLIP and its like: any folder that transformers loads as image to text.

The weights are read from a folder and never from the network. A folder may say in its
`config.json` what stands before a caption, by what is learned from the photos:
`"caption_prompts": {"face": "...", "style": "..."}`; ours does, others are asked without a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from trainer.errors import ModelError

# Captions are trained on with CLIP's 77 tokens; what is longer would be cut off there.
MAXIMUM_NEW_TOKENS = 60


class BlipCaptioner:
    """A captioner of transformers with its processor.

    Args:
        model: makes token ids from pixels and a prompt.
        processor: brings a picture to the model's size, and turns text into tokens and back.
        prompts: what stands before a caption, by kind of training; may be empty.
    """

    def __init__(self, model: Any, processor: Any, prompts: Mapping[str, str]) -> None:
        self.model = model
        self.processor = processor
        self.prompts = prompts

    @torch.no_grad()
    def caption(self, image: Image.Image, kind: str) -> str:
        """What a picture shows; the most probable word each time, so that nothing is random."""
        prompt = self.prompts.get(kind, "")
        inputs = self.processor(images=image, text=prompt or None, return_tensors="pt")
        tokens = self.model.generate(
            **inputs.to(self.model.device), max_new_tokens=MAXIMUM_NEW_TOKENS, do_sample=False
        )
        text = " ".join(self.processor.decode(tokens[0], skip_special_tokens=True).split())
        return text.removeprefix(prompt).strip()


def load_captioner(folder: Path, device: torch.device) -> BlipCaptioner:
    """Read a captioner in the format of transformers, in float32.

    Raises:
        ModelError: the folder holds none, or it cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            "There is no captioner in this folder.",
            where=f"{folder} (it has no config.json)",
            fix="Give the folder of a captioning model as transformers saves it, such as BLIP.",
        )
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"The captioner cannot be loaded: {reason}",
            where=str(folder),
            fix="It has to be a model that turns a picture into text, with its processor and its "
            "weights as .safetensors. Download it again, or go without: "
            "--set caption.captioner=none",
        ) from error
    prompts = getattr(model.config, "caption_prompts", None) or {}
    return BlipCaptioner(model.eval().to(device), processor, prompts)
