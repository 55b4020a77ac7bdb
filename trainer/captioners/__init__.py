"""Captioners: what says what a photo shows, and the table of those that there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainer.registry import Entry, Registry
from trainer.types import Photo

if TYPE_CHECKING:
    import torch
    from PIL import Image

GENERAL_THRESHOLD = 0.35
CHARACTER_THRESHOLD = 0.85


@dataclass(frozen=True, slots=True)
class CaptionerOptions:
    """What a captioner is loaded with; each takes what concerns it.

    Args:
        model: the folder of its weights or the name of a model on the Hugging Face hub; for
            `template` the file of its lines.
        device: where it runs; None is the processor.
        half: number format of a large model; None is float32.
        prompt: what the model is asked, or what its caption begins with; None: what suits it.
        threshold: least probability of a general tag, 0..1.
        character_threshold: least probability of the name of a character, 0..1; None leaves such
            names out for a face, which the trigger word shall mean, and takes 0.85 for a style.
        exclude: tags that are never written, in any case, with blanks or underscores.
        rating: write the most probable rating, too.
    """

    model: str = ""
    device: torch.device | None = None
    half: torch.dtype | None = None
    prompt: str | None = None
    threshold: float = GENERAL_THRESHOLD
    character_threshold: float | None = None
    exclude: tuple[str, ...] = ()
    rating: bool = False


class Captioner(Protocol):
    """A loaded captioner."""

    def caption(self, photo: Photo, image: Callable[[], Image.Image], kind: str) -> str:
        """What a photo shows, on one line, the same every time; "" where there are no words.

        Args:
            photo: the photo.
            image: decodes it, upright and RGB; a captioner that needs no pixels never calls it.
            kind: what is learned from the photos: `face` or `style`. A captioner that can leaves
                out for a face who is shown, since that is what the trigger word shall mean.

        Raises:
            DataError: the photo cannot be decoded.
            ModelError: the captioner cannot describe this photo.
        """
        ...


class CaptionerLoader(Protocol):
    """What an entry of `CAPTIONERS` stands for."""

    def __call__(self, options: CaptionerOptions) -> Captioner:
        """Make it ready.

        Raises:
            ModelError: there is no such captioner where `options.model` says, or it cannot be used.
        """
        ...


CAPTIONERS = Registry(
    "captioner",
    {
        "own": Entry(
            "trainer.captioners.image_text:load_captioner",
            "our own small one, which knows the embedded base's drawings only",
        ),
        "transformers": Entry(
            "trainer.captioners.image_text:load_captioner",
            "BLIP, Florence-2, LLaVA, Qwen-VL and other models that turn a picture into text",
        ),
        "tagger": Entry(
            "trainer.captioners.tagger:load_captioner",
            "a WD14 tagger in ONNX format: tags instead of a sentence",
            extra="tagger",
        ),
        "template": Entry(
            "trainer.captioners.wordless:load_template",
            "a line of prompts/captions/, with {trigger} and {class}",
        ),
        "filename": Entry(
            "trainer.captioners.wordless:load_filename", "the words of the photo's file name"
        ),
    },
)
