"""Between layer paths in a model and the tensor names of kohya's trainer in a LoRA file.

The kohya name of a layer is a prefix, "_" and the dotted path with every "." replaced by "_". The
path is that of diffusers and transformers, but for the UNet of Stable Diffusion XL that of the
original code (`ldm_names`): so it is in kohya's own files. This is the one naming that ComfyUI,
A1111, Forge and diffusers all load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.adapters.attach import Attached
from trainer.adapters.folding import in_form, without_filling, written_forms
from trainer.adapters.ldm_names import BlockNames, ldm_blocks, to_ldm
from trainer.adapters.lora import LoRALayer
from trainer.errors import FileFormatError

DOWN = "lora_down.weight"
UP = "lora_up.weight"
ALPHA = "alpha"

_SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True)
class KeyNaming:
    """How one model's layers are called in a file.

    prefix: "lora_unet", "lora_te", "lora_te1" or "lora_te2".
    insert: put in front of a path that does not have it. The `CLIPTextModel` of transformers 5
        has no `text_model.` in its paths, but every loader expects it in the file.
    blocks: of a UNet, both names of its blocks (`ldm_blocks`); files with either are read.
    ldm: whether LDM's names are written, as kohya's trainer does for Stable Diffusion XL.
    """

    prefix: str
    insert: str = ""
    blocks: BlockNames = ()
    ldm: bool = False

    def module_name(self, path: str) -> str:
        """The name that is written for the layer at `path`."""
        return self.module_names(path)[0]

    def module_names(self, path: str) -> tuple[str, str]:
        """The names that the layer at `path` may have in a file; the first is written."""
        if not path.startswith(self.insert):
            path = self.insert + path
        names = [f"{self.prefix}_{p.replace('.', '_')}" for p in (path, to_ldm(path, self.blocks))]
        return (names[1], names[0]) if self.ldm else (names[0], names[1])


def naming_of(module: nn.Module, prefix: str, insert: str = "", *, ldm: bool = False) -> KeyNaming:
    """The naming of one component's layers.

    Args:
        module: a UNet of diffusers, whose configuration says how its blocks are called, or a text
            encoder.
        prefix, insert: see `KeyNaming`.
        ldm: whether LDM's names are written for a UNet; text encoders have none.
    """
    config = getattr(module, "config", None)
    if isinstance(config, Mapping) and "down_block_types" in config:
        return KeyNaming(prefix, insert, ldm_blocks(config), ldm)
    return KeyNaming(prefix, insert)


def kohya_tensors(
    attached: Attached, naming: KeyNaming, strength: float = 1.0
) -> dict[str, Tensor]:
    """The tensors of a file: down, up and alpha of every layer, float32 copies on the CPU.

    Every alpha is multiplied by `strength`, so that programs apply so much of the update and the
    factors stay as they were trained.

    Where ranks or alphas differ between layers, they are written in a form that every program
    applies alike (`folding`).
    """
    state = attached.state()
    forms = written_forms(attached.layers)
    tensors: dict[str, Tensor] = {}
    for path, layer in attached.layers.items():
        name = naming.module_name(path)
        down, up = in_form(state[f"{path}.down"], state[f"{path}.up"], layer, forms[path])
        tensors[f"{name}.{DOWN}"] = down
        tensors[f"{name}.{UP}"] = up
        # Always written: loaders disagree on what a missing alpha means.
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(forms[path].alpha) * strength)
    return tensors


def expected_shapes(attached: Attached, naming: KeyNaming) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `kohya_tensors` gives."""
    forms = written_forms(attached.layers)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in attached.layers.items():
        name, rank = naming.module_name(path), forms[path].rank
        shapes[f"{name}.{DOWN}"] = (rank, *layer.down.shape[1:])
        shapes[f"{name}.{UP}"] = (layer.up.shape[0], rank, *layer.up.shape[2:])
        shapes[f"{name}.{ALPHA}"] = ()
    return shapes


def names_in(
    tensors: Mapping[str, Tensor], paths: Iterable[str], naming: KeyNaming
) -> dict[str, str]:
    """Which of a model's layers a file holds, and under which name: {path: module name}.

    Raises:
        FileFormatError: it holds a layer under both of its names.
    """
    modules = {key.partition(".")[0] for key in tensors}
    found: dict[str, str] = {}
    for path in paths:
        here = [name for name in dict.fromkeys(naming.module_names(path)) if name in modules]
        if len(here) > 1:
            raise FileFormatError(
                "The LoRA file holds a layer twice, under two names.",
                where="\n".join(here),
                fix="Use the file as its trainer wrote it.",
            )
        if here:
            found[path] = here[0]
    return found


def from_kohya(
    tensors: Mapping[str, Tensor], attached: Attached, naming: KeyNaming
) -> dict[str, Tensor]:
    """A state for `Attached.load_state` from a file's tensors.

    The file's alpha is folded into `up` where it differs from the layer's, and zeros that fill up
    its rank are left out, so that the update is the same. Tensors of other models in the file
    (another prefix) are left aside; layers that the file does not hold are left out, for
    `load_state` to name.

    Args:
        tensors: all tensors of the file.
        attached: the layers they are for.
        naming: how these layers are called in the file.

    Raises:
        FileFormatError: the file has names with this prefix that are no layer of the model, or a
            layer that is not a plain LoRA.
    """
    names = names_in(tensors, attached.layers, naming)
    parts = _by_module(tensors, naming.prefix)
    known = set(names.values())
    unknown = [name for name in parts if name not in known]
    if unknown:
        raise FileFormatError(
            "The LoRA file has layers that the model does not have, or that are not among the "
            f"chosen targets ({len(unknown)} of {len(parts)}).",
            where="\n".join(unknown[:_SHOWN_NAMES]),
            fix="Use the base model and targets it was trained with.",
        )
    state: dict[str, Tensor] = {}
    for path, name in names.items():
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
    if rank > layer.rank and up.ndim > 1:
        down, up = without_filling(down, up, layer.rank)
    return down, up if scale == layer.scale else up * (scale / layer.scale)


def _as_layer(tensor: Tensor, like: Tensor) -> Tensor:
    """A 1x1 convolution's factor may be written [a, b] or [a, b, 1, 1]; give the layer's form."""
    if tensor.ndim == 2 and like.ndim == 4:
        return tensor[:, :, None, None]
    if tensor.ndim == 4 and like.ndim == 2 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor
