"""Pictures as unit vectors that say who is shown: our own net for avatars, or one from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from trainer.errors import ModelError
from trainer.scoring.avatar_net import BATCH, FOLDER, AvatarNet, load_net, run_net

NAME = "identity"


class Embedder(Protocol):
    """Anything that puts pictures of one subject close together."""

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Unit vectors of upright RGB pictures of any size: [N, D]."""
        ...


class AvatarEmbedder:
    """The net that was trained on the embedded base's drawings; mirroring changes nothing."""

    def __init__(self, net: AvatarNet) -> None:
        self._net = net

    @classmethod
    def load(cls, folder: Path | None = None) -> Self:
        """Read the weights from a folder; None takes those that come with the trainer.

        Raises:
            ModelError: a file is missing or damaged.
        """
        return cls(load_net(folder or FOLDER, NAME)[0])

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Unit vectors: [N, 64]."""
        return _unit(run_net(self._net, images, mirrored=True))


class FolderEmbedder:
    """A vision model with its processor as transformers saves them: CLIP, DINOv2 and their kin.

    Args:
        model: gives image features (`get_image_features`) or a pooled output.
        processor: pictures to `pixel_values`.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read model and processor from a local folder; nothing is downloaded.

        Raises:
            ModelError: the folder holds no vision model.
        """
        from transformers import AutoImageProcessor, AutoModel

        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"The vision model cannot be loaded: {error}",
                where=str(folder),
                fix="Give a folder with config.json, model.safetensors and "
                "preprocessor_config.json, as CLIP and DINOv2 are published.",
            ) from error
        if getattr(model, "main_input_name", "") != "pixel_values" and not hasattr(
            model, "get_image_features"
        ):
            raise ModelError(
                f"This is no vision model but a {type(model).__name__}.",
                where=str(folder),
                fix="Give the folder of a CLIP, DINOv2 or other model that takes pictures.",
            )
        return cls(model.eval().requires_grad_(False), processor)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Unit vectors: [N, D], D as the model has it."""
        parts = [
            self._features(images[start : start + BATCH]) for start in range(0, len(images), BATCH)
        ]
        return _unit(torch.cat(parts)) if parts else np.empty((0, 1))

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        upright = [image.convert("RGB") for image in images]
        inputs = self._processor(images=upright, return_tensors="pt")
        features = getattr(self._model, "get_image_features", self._model)(**inputs)
        # Models of both towers answer with the features, vision towers with all their layers.
        pooled: Tensor = getattr(features, "pooler_output", features)
        return pooled


def _unit(vectors_ND: Tensor) -> NDArray[np.float64]:
    return F.normalize(vectors_ND.double(), dim=1).numpy()
