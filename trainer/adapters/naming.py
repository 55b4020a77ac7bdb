"""Between layer paths in a model and the tensor names of kohya's trainer in a LoRA file.

The kohya name of a layer is a prefix, "_" and the dotted path with every "." replaced by "_". This
is the one naming that ComfyUI, A1111, Forge and diffusers all load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.adapters.attach import Attached
from trainer.adapters.lora import LoRALayer
from trainer.errors import FileFormatError

DOWN = "lora_down.weight"
UP = "lora_up.weight"
ALPHA = "alpha"

_SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True)
class KeyNaming:
    """How one model's layers are called in a file.

    prefix: "lora_unet" or "lora_te".
    insert: put in front of a path that does not have it. The `CLIPTextModel` of transformers 5
        has no `text_model.` in its paths, but every loader expects it in the file.
    """

    prefix: str
    insert: str = ""

    def module_name(self, path: str) -> str:
        """The name in the file for the layer at `path`."""
        if not path.startswith(self.insert):
            path = self.insert + path
        return f"{self.prefix}_{path.replace('.', '_')}"


def kohya_tensors(attached: Attached, naming: KeyNaming) -> dict[str, Tensor]:
    """The tensors of a file: down, up and alpha of every layer, float32 copies on the CPU."""
    state = attached.state()
    tensors: dict[str, Tensor] = {}
    for path, layer in attached.layers.items():
        name = naming.module_name(path)
        tensors[f"{name}.{DOWN}"] = state[f"{path}.down"]
        tensors[f"{name}.{UP}"] = state[f"{path}.up"]
        # Always written: loaders disagree on what a missing alpha means.
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(layer.alpha))
    return tensors


def expected_shapes(attached: Attached, naming: KeyNaming) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `kohya_tensors` gives."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in attached.layers.items():
        name = naming.module_name(path)
        shapes[f"{name}.{DOWN}"] = tuple(layer.down.shape)
        shapes[f"{name}.{UP}"] = tuple(layer.up.shape)
        shapes[f"{name}.{ALPHA}"] = ()
    return shapes


def from_kohya(
    tensors: Mapping[str, Tensor], attached: Attached, naming: KeyNaming
) -> dict[str, Tensor]:
    """A state for `Attached.load_state` from a file's tensors.

    The file's alpha is folded into `up` where it differs from the layer's, so that the update is
    the same. Tensors of other models in the file (another prefix) are left aside; layers that the
    file does not hold are left out, for `load_state` to name.

    Args:
        tensors: all tensors of the file.
        attached: the layers they are for.
        naming: how these layers are called in the file.

    Raises:
        FileFormatError: the file has names with this prefix that are no layer of the model, or a
            layer that is not a plain LoRA.
    """
    paths = {naming.module_name(path): path for path in attached.layers}
    parts = _by_module(tensors, naming.prefix)
    unknown = [name for name in parts if name not in paths]
    if unknown:
        raise FileFormatError(
            "The LoRA file has layers that the model does not have, or that are not among the "
            f"chosen targets ({len(unknown)} of {len(parts)}).",
            where="\n".join(unknown[:_SHOWN_NAMES]),
            fix="Use the base model and targets it was trained with.",
        )
    state: dict[str, Tensor] = {}
    for name, path in paths.items():
        if name in parts:
            down, up = _fold(name, parts[name], attached.layers[path])
            state[f"{path}.down"], state[f"{path}.up"] = down, up
    return state


def _by_module(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """{module name: {part: tensor}} of the tensors whose name has this prefix."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        if name.startswith(prefix + "_"):
            parts.setdefault(name, {})[part] = tensor
    return parts


def _fold(name: str, parts: Mapping[str, Tensor], layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """Down and up in float32, `up` scaled so that the layer's own scale gives the same update."""
    plain = {DOWN, UP} <= parts.keys() <= {DOWN, UP, ALPHA}
    if not plain or parts[DOWN].numel() == 0 or (ALPHA in parts and parts[ALPHA].numel() != 1):
        raise FileFormatError(
            "A layer of the LoRA file is not a plain LoRA.",
            where=f"{name}: {', '.join(sorted(parts))}",
            fix="Only down, up and alpha are understood (no LoHa, LoKr, DoRA or Tucker form).",
        )
    down = _as_layer(parts[DOWN].float(), layer.down)
    up = _as_layer(parts[UP].float(), layer.up)
    rank = down.shape[0] if down.ndim else 1
    # Without an alpha the usual loaders take alpha = rank, that is scale 1.
    scale = float(parts[ALPHA].item()) / rank if ALPHA in parts else 1.0
    return down, up if scale == layer.scale else up * (scale / layer.scale)


def _as_layer(tensor: Tensor, like: Tensor) -> Tensor:
    """A 1x1 convolution's factor may be written [a, b] or [a, b, 1, 1]; give the layer's form."""
    if tensor.ndim == 2 and like.ndim == 4:
        return tensor[:, :, None, None]
    if tensor.ndim == 4 and like.ndim == 2 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor
