"""A base in a single file: its modules, built from the shipped configurations.

Modules are built without weights first. Then one tensor after the other is read, renamed (`ldm`),
cast and put in its place, so that no more is in memory than the finished modules and one tensor.
Each module is read by itself, when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ModelError
from trainer.families import BaseFacts
from trainer.families.detect import read_json, shapes_of
from trainer.families.header import Header, read_header
from trainer.families.ldm import (
    TEXT_PREFIXES,
    UNET_PREFIX,
    VAE_PREFIX,
    Source,
    text_sources,
    unet_sources,
    vae_sources,
)
from trainer.families.sizes import shipped_config, text_config, unet_config, vae_config
from trainer.families.weights import open_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Tensors that files have beside the weights: positions that modules count themselves, and a
# temperature that belongs to OpenCLIP's training.
_KNOWN_EXTRAS = ("position_ids", "logit_scale")
# As many names as fit in a message.
_NAMES_SHOWN = 5
# What diffusers and transformers raise on a configuration or file that is not what it should be.
_BUILD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Plan:
    """A module to fill: how it is built, and where in the file its tensors are."""

    build: Callable[[], nn.Module]
    sources: Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class SingleFile:
    """The modules of a base in a single file.

    plans: by the modules' names in diffusers' folders. notices: what was unusual in those that
    were read, each a sentence.
    """

    facts: BaseFacts
    header: Header
    plans: Mapping[str, Plan]
    notices: list[str]

    def read(self, name: str, dtype: torch.dtype) -> Any:
        """A module on the CPU, frozen and in evaluation mode: `unet` (UNet2DConditionModel), `vae`
        (AutoencoderKL), `text_encoder` (CLIPTextModel) or, in SDXL, `text_encoder_2`
        (CLIPTextModelWithProjection).

        Raises:
            ModelError: tensors are missing or have shapes that do not fit, named in the message.
        """
        if name == "vae" and self.facts.vae:
            return load_vae(self.facts.vae, self.facts.family, dtype)
        return fill(self.plans[name], self.header, dtype, self.notices)


def open_single_file(facts: BaseFacts) -> SingleFile:
    """Look for the modules of a base that is a single file; no weight is read.

    Args:
        facts: of the base (`inspect_base`); its `folder` is the file.

    Raises:
        ModelError: the file cannot be read, or a whole module is missing.
    """
    header = read_header(facts.folder)
    plans: dict[str, Plan] = {}
    try:
        for prefix, (part, open_clip) in TEXT_PREFIXES.items():
            if any(map(_begins(prefix), header.tensors)):
                sources = text_sources(header.tensors, prefix, open_clip=open_clip)
                plans[part] = _text_plan(facts.family, part, header, sources)
        plans["unet"] = _unet_plan(facts, header)
        if facts.vae is None:
            plans["vae"] = _vae_plan(facts.family, header, vae_sources(header.tensors, VAE_PREFIX))
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"The base model is not complete: {error} is missing.",
            where=str(facts.folder),
            fix="Download it again; if it was merged or cut down, use the model it came from.",
        ) from error
    return SingleFile(facts, header, plans, [])


def load_vae(path: Path, family: str, dtype: torch.dtype) -> Any:
    """A VAE given separately: a folder in diffusers format (or a base's, with one inside) or a
    file in either layout of names.

    Args:
        path: folder or file. family: whose configuration a file goes by. dtype: number format.

    Returns:
        An AutoencoderKL on the CPU, frozen and in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, or is no VAE.
    """
    if path.is_dir():
        return _vae_of_folder(path, dtype)
    header = read_header(path)
    prefix = next((p for p in (VAE_PREFIX, "vae.") if any(map(_begins(p), header.tensors))), "")
    try:
        plan = _vae_plan(family, header, vae_sources(header.tensors, prefix))
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"This is no VAE, or not all of one: {error} is missing.",
            where=str(path),
            fix="Give a VAE's folder in diffusers format or its file after --vae.",
        ) from error
    return fill(plan, header, dtype, [])


def make_scheduler(facts: BaseFacts) -> Any:
    """The noise schedule of a base's family as diffusers' scheduler, for what the base predicts.

    A terminal SNR of zero is only reached when drawing begins at the last timestep
    (arXiv 2305.08891, section 3.3): "trailing" steps.
    """
    import diffusers

    config = shipped_config(facts.family, "scheduler", facts.prediction)
    config["prediction_type"] = facts.prediction
    if facts.zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _begins(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


def _unet_plan(facts: BaseFacts, header: Header) -> Plan:
    from diffusers import UNet2DConditionModel

    sources = unet_sources(header.tensors, UNET_PREFIX)
    shipped = shipped_config(facts.family, "unet", facts.prediction)
    config = unet_config(shapes_of(header, sources), shipped, facts.pooled)
    config["sample_size"] = facts.resolution // facts.pixels_per_latent
    return Plan(lambda: UNet2DConditionModel.from_config(config), sources)


def _vae_plan(family: str, header: Header, sources: dict[str, Source]) -> Plan:
    from diffusers import AutoencoderKL

    config = vae_config(shapes_of(header, sources), shipped_config(family, "vae"))
    if not config["block_out_channels"]:
        raise KeyError("encoder.conv_in.weight")
    return Plan(lambda: AutoencoderKL.from_config(config), sources)


def _text_plan(family: str, part: str, header: Header, sources: dict[str, Source]) -> Plan:
    import transformers

    values = text_config(shapes_of(header, sources), shipped_config(family, part))
    kind = getattr(transformers, values["architectures"][0])
    layers = int(values["num_hidden_layers"])
    unused = tuple(f"encoder.layers.{number}." for number in range(layers, layers + 2))
    used = {name: source for name, source in sources.items() if not name.startswith(unused)}
    return Plan(lambda: kind(transformers.CLIPTextConfig(**values)), used)


def fill(plan: Plan, header: Header, dtype: torch.dtype, notices: list[str]) -> nn.Module:
    """Build a module and read its weights into it, each straight into its number format.

    Args:
        plan: of the module. header: of the file that its weights are in.
        notices: gets a sentence about what was unusual.

    Returns:
        The module on the CPU, frozen and in evaluation mode.

    Raises:
        ModelError: tensors are missing or have shapes that do not fit, named in the message.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            module = plan.build()
    except _BUILD_ERRORS as error:
        raise ModelError(
            f"The sizes of the base model are not those of a model that can be built: {error}",
            where=str(header.path),
            fix="The file is damaged, or of another kind than it seems; download it again.",
        ) from error
    wanted = module.state_dict()
    found = {name: plan.sources.get(name.removeprefix("text_model.")) for name in wanted}
    _require_all(found, header)
    sources = {name: source for name, source in found.items() if source}
    tensors: dict[str, Tensor] = {}
    with open_weights(header) as read:
        for name, source in sources.items():
            _require_shape(source, header, tuple(wanted[name].shape))
            tensors[name] = _take(read(source.name), source, dtype)
    module.load_state_dict(tensors, strict=True, assign=True)
    notices += _extras(plan, sources)
    return module.eval().requires_grad_(False)


def _take(tensor: Tensor, source: Source, dtype: torch.dtype) -> Tensor:
    """What is wanted of a tensor, in the number format wanted, in memory of its own."""
    if source.third is not None:
        tensor = tensor.chunk(3)[source.third]
    if source.squeezed:
        tensor = tensor.flatten(1)
    if source.transposed:
        tensor = tensor.T
    return tensor.to(dtype, copy=True).contiguous()


def _require_all(found: Mapping[str, Source | None], header: Header) -> None:
    missing = [name for name, source in found.items() if source is None]
    if missing:
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        raise ModelError(
            f"The base model is not complete: it has no {', '.join(missing[:_NAMES_SHOWN])}{more}.",
            where=str(header.path),
            fix="Download it again; if it was merged or cut down, use the model it came from.",
        )


def _require_shape(source: Source, header: Header, wanted: tuple[int, ...]) -> None:
    info = header.tensors[source.name]
    if info.dtype[:1] not in ("F", "B") or info.dtype == "BOOL":
        raise ModelError(
            f"The weights are quantised ({source.name} is {info.dtype}), for drawing only.",
            where=str(header.path),
            fix="Use the model in half or full precision (fp16, bf16 or fp32).",
        )
    if source.shape(info.shape) != wanted:
        raise ModelError(
            f"The tensor {source.name} has the shape {list(info.shape)}, which does not fit: "
            f"{list(wanted)} is needed.",
            where=str(header.path),
            fix="The file is damaged, or of another kind than it seems; download it again.",
        )


def _extras(plan: Plan, used: Mapping[str, Source]) -> list[str]:
    taken = {source.name for source in used.values()}
    names = sorted({s.name for s in plan.sources.values()} - taken)
    extra = [name for name in names if not name.endswith(_KNOWN_EXTRAS)]
    if not extra:
        return []
    more = ", and so on" if len(extra) > _NAMES_SHOWN else ""
    return [
        f"{len(extra)} tensors of the base's file are not known and were left out: "
        f"{', '.join(extra[:_NAMES_SHOWN])}{more}."
    ]


def _vae_of_folder(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    inner = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    read_json(inner / "config.json")
    try:
        vae = AutoencoderKL.from_pretrained(
            str(inner), torch_dtype=dtype, low_cpu_mem_usage=False, local_files_only=True
        )
    except _BUILD_ERRORS as error:
        raise ModelError(f"The VAE cannot be loaded: {error}", where=str(folder)) from error
    return vae.eval().requires_grad_(False)
