"""Captioners: models that say what a photo shows, and the table of the kinds that can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainer.registry import Entry, Registry

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Captioner(Protocol):
    """A loaded captioner."""

    def caption(self, image: Image.Image, kind: str) -> str:
        """What an upright RGB picture of any size shows, on one line; the same every time.

        kind: what is learned from the photos: `face` or `style`. A captioner that can leaves out
        for a face who is shown, since that is what the trigger word shall mean.
        """
        ...


class CaptionerLoader(Protocol):
    """What an entry of `CAPTIONERS` stands for."""

    def __call__(self, folder: Path, device: torch.device) -> Captioner:
        """Read a captioner's weights from its folder.

        Raises:
            ModelError: there is no captioner of this kind in the folder.
        """
        ...


CAPTIONERS = Registry(
    "captioner",
    {
        "blip": Entry(
            "trainer.captioners.blip:load_captioner",
            "BLIP, and other models that transformers loads to turn a picture into text",
        )
    },
)
