"""Captions by a WD14 tagger: `model.onnx` and `selected_tags.csv`, run by onnxruntime.

The conventions are those of the public WD14 and WD v3 taggers: the picture is fitted into a white
square, its colours go in as blue, green, red from 0 to 255, and out come probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as onnx_errors
from PIL import Image

from trainer.captioners import CHARACTER_THRESHOLD, CaptionerOptions
from trainer.captioners.places import find_model, reason_of
from trainer.captioners.tags import Tag, TagChoice, choose_tags, excluded, read_tags
from trainer.errors import ModelError
from trainer.types import Photo

MODEL, TAGS = "model.onnx", "selected_tags.csv"
_SIDES = range(32, 2049)
_WHITE = (255, 255, 255)
_ERRORS = (
    onnx_errors.Fail,
    onnx_errors.InvalidArgument,
    onnx_errors.InvalidGraph,
    onnx_errors.InvalidProtobuf,
    onnx_errors.NoSuchFile,
    onnx_errors.NotImplemented,
    onnx_errors.RuntimeException,
    OSError,
    ValueError,
    RuntimeError,
)
_GPU_PROVIDERS = ("CUDAExecutionProvider", "DmlExecutionProvider")


class Tagger:
    """A tagger, ready to run.

    Args:
        session: the model in onnxruntime.
        tags: what each of its outputs stands for.
        options: thresholds and the like.
    """

    def __init__(self, session: Any, tags: tuple[Tag, ...], options: CaptionerOptions) -> None:
        self.session = session
        self.tags = tags
        self.options = options
        self.input = session.get_inputs()[0]
        self.side = self.input.shape[1]

    def caption(self, photo: Photo, image: Callable[[], Image.Image], kind: str) -> str:
        """The tags of a photo, see `Captioner`; for a face without the names of characters."""
        pixels_HWC = prepare(image(), self.side)
        try:
            output = self.session.run(None, {self.input.name: pixels_HWC[None]})[0]
        except _ERRORS as error:
            raise ModelError(
                f"The tagger cannot describe {photo.path.name}: {reason_of(error)}",
                where=str(photo.path),
                fix="Write its caption by hand, into a .txt file of its name.",
            ) from error
        return choose_tags(self.tags, self._probabilities(np.asarray(output)), self._choice(kind))

    def _probabilities(self, output: Any) -> list[float]:
        if output.size != len(self.tags):
            raise ModelError(
                f"The tagger gives {output.size} values for {len(self.tags)} tags.",
                fix=f"Its {MODEL} and {TAGS} do not belong together. Download both again.",
            )
        if not (np.isfinite(output).all() and output.min() >= 0 and output.max() <= 1):
            raise ModelError(
                "The tagger's values are no probabilities from 0 to 1.",
                fix="Take a tagger of the WD14 or WD v3 kind, whose model ends in a sigmoid.",
            )
        return [float(value) for value in output.ravel()]

    def _choice(self, kind: str) -> TagChoice:
        character = self.options.character_threshold
        if character is None and kind != "face":
            character = CHARACTER_THRESHOLD
        return TagChoice(
            general=self.options.threshold,
            character=character,
            exclude=excluded(self.options.exclude),
            rating=self.options.rating,
        )


def prepare(image: Image.Image, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A picture as the taggers take it.

    Args:
        image: RGB, of any size.
        side: of the square, in pixels.

    Returns:
        float32 [side, side, 3], 0..255 in the order blue, green, red.
    """
    share = side / max(image.size)
    width, height = (max(1, round(length * share)) for length in image.size)
    square = Image.new("RGB", (side, side), _WHITE)
    fitted = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(fitted, ((side - width) // 2, (side - height) // 2))
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[:, :, ::-1])


def load_captioner(options: CaptionerOptions) -> Tagger:
    """Read a tagger from its folder, or from the hub.

    Raises:
        ModelError: there is none, or it is not of the WD14 kind.
    """
    folder = find_model(options.model, (MODEL, TAGS))
    tags = read_tags(folder / TAGS)
    there = onnxruntime.get_available_providers()
    on_gpu = options.device is not None and options.device.type != "cpu"
    wanted = (*_GPU_PROVIDERS * on_gpu, "CPUExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(
            str(folder / MODEL), providers=[name for name in wanted if name in there]
        )
    except _ERRORS as error:
        raise ModelError(
            f"The tagger cannot be loaded: {reason_of(error)}",
            where=str(folder / MODEL),
            fix="It has to be a WD14 tagger in ONNX format. Download it again.",
        ) from error
    _require_layout(session, folder)
    return Tagger(session, tags, options)


def _require_layout(session: Any, folder: Path) -> None:
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
    if not (square and shape[1] in _SIDES and inputs[0].type == "tensor(float)"):
        raise ModelError(
            f"The tagger is not of the WD14 kind: it takes {shape} instead of [1, 448, 448, 3].",
            where=str(folder / MODEL),
            fix="Take one that takes pictures as height, width, colour in float32.",
        )
