"""What kind of model a file or folder is: its family, what it predicts, whether it can be trained.

The family comes from structure: which text encoders there are, whether the UNet takes a further
embedding (SDXL), whether its attention is entered by linear layers (SD 2.x and SDXL) or 1x1
convolutions (SD 1.x). So small bases of a family are recognised too, and names of classes and
files decide nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.families import telltales
from trainer.families.header import Header
from trainer.families.ldm import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX

FAMILY_WORDS = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
# The parts of a base beside its VAE, which may be given separately.
NEEDED = {
    "sd1": ("unet", "text_encoder"),
    "sd2": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
}
# Width of the prompt embeddings of SDXL's refiner, which has the second text encoder alone.
REFINER_WIDTH = 1280
LATENT_CHANNELS = 4

# ModelSpec's and diffusers' words for what a UNet predicts.
PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a model is.

    family: `sd1`, `sd2` or `sdxl`; "" where it is none of these. what: in words, for messages.
    prediction: `epsilon`, `v_prediction`, or "" where it cannot be known.
    parts: `unet`, `vae`, `text_encoder`, `text_encoder_2`, as far as they are there.
    obstacle: why it cannot be trained, and advice: what to do then; "" where it can.
    """

    family: str
    what: str
    prediction: str = ""
    zero_terminal_snr: bool = False
    parts: frozenset[str] = field(default_factory=frozenset)
    obstacle: str = ""
    advice: str = ""


_GIVE_BASE = "Give the model that it was made for after --base."
_GIVE_ORDINARY = "Train on the ordinary model it was made from; the LoRA will work in both."


def identify(header: Header) -> Kind:
    """What a single file is, from the names and shapes of its tensors and its metadata."""
    names = header.tensors.keys()
    in_ldm = any(name.startswith(UNET_PREFIX) for name in names)
    if telltales.is_lora(names):
        return _no_base("LoRA file (or a relative of it)", _GIVE_BASE)
    if telltales.is_controlnet(names):
        return _no_base("ControlNet", _GIVE_BASE)
    other = telltales.other_model(names)
    if other:
        return Kind("", other, obstacle=f"This is {other}, another kind of model.")
    if in_ldm and f"{UNET_PREFIX}input_blocks.0.0.weight" in names:
        return _single_file(header)
    if "conv_in.weight" in names and "time_embedding.linear_1.weight" in names:
        return _unet_alone(header)
    return _part_alone(header)


def _no_base(what: str, advice: str) -> Kind:
    return Kind("", what, obstacle=f"This is a {what}, no base model.", advice=advice)


def _part_alone(header: Header) -> Kind:
    names = header.tensors.keys()
    if telltales.is_vae(names):
        kind = _no_base("VAE alone", "Give it after --vae, and a base model after --base.")
        return replace(kind, parts=frozenset({"vae"}))
    if telltales.is_text_encoder(names):
        return _no_base("text encoder alone", "Give a base model after --base.")
    if telltales.is_textual_inversion(header):
        return _no_base("textual inversion (an embedding)", _GIVE_BASE)
    return Kind(
        "",
        "unknown",
        obstacle=f"This is no model that is known here: none of its {len(names):,} tensors are "
        "those of Stable Diffusion 1.x, 2.x or XL.",
    )


@dataclass(frozen=True, slots=True)
class _Unet:
    """What the kind of a UNet shows in."""

    channels: int
    linear: bool
    conditioned: bool
    width: int


def _look_at(header: Header, prefix: str, entrance: str, condition: str) -> _Unet:
    def shape(end: str) -> tuple[int, ...]:
        found = (n for n in header.tensors if n.startswith(prefix) and n.endswith(end))
        return header.shape(next(found, ""))

    entering = header.shape(prefix + entrance)
    queries = shape(".attn2.to_k.weight")
    return _Unet(
        channels=entering[1] if len(entering) == 4 else 0,
        linear=len(shape(".proj_in.weight")) == 2,
        conditioned=prefix + condition in header.tensors,
        width=queries[1] if len(queries) == 2 else 0,
    )


def _single_file(header: Header) -> Kind:
    unet = _look_at(header, UNET_PREFIX, "input_blocks.0.0.weight", "label_emb.0.0.weight")
    found = {
        part
        for prefix, (part, _) in TEXT_PREFIXES.items()
        if any(name.startswith(prefix) for name in header.tensors)
    }
    refiner = any(name.startswith("conditioner.embedders.0.model.") for name in header.tensors)
    if any(name.startswith(VAE_PREFIX) for name in header.tensors):
        found.add("vae")
    if unet.conditioned and any(name.startswith("cond_stage_model.") for name in header.tensors):
        return _no_base("unCLIP model (drawn from pictures)", "Give a base model that takes text.")
    kind = _of_unet(unet, refiner=refiner)
    kind = replace(kind, parts=frozenset({"unet", *found}))
    return kind if kind.obstacle else _with_prediction(kind, header)


def _unet_alone(header: Header) -> Kind:
    """A UNet in diffusers' names, which comes without text encoder and VAE."""
    unet = _look_at(header, "", "conv_in.weight", "add_embedding.linear_1.weight")
    kind = replace(_of_unet(unet, refiner=False), parts=frozenset({"unet"}))
    return kind if kind.obstacle else _with_prediction(kind, header)


def _of_unet(unet: _Unet, *, refiner: bool) -> Kind:
    if unet.conditioned:
        family = "sdxl"
        refiner = refiner or unet.width == REFINER_WIDTH
    else:
        family = "sd2" if unet.linear else "sd1"
    return _trainable(family, unet.channels, refiner=refiner)


def _trainable(family: str, channels: int, *, refiner: bool) -> Kind:
    """A kind of a family, with the obstacle that its input or its place in a chain may be."""
    words = FAMILY_WORDS[family]
    if refiner:
        return Kind(
            family,
            "SDXL refiner",
            obstacle="This is the SDXL refiner, which only finishes pictures of the base.",
            advice="Train on the SDXL base model.",
        )
    special = {9: "inpainting model", 8: "instruct-pix2pix model", 5: "depth model"}
    if channels != LATENT_CHANNELS:
        what = f"{words} {special.get(channels, 'model with a changed input')}"
        return Kind(
            family,
            what,
            obstacle=f"The UNet takes {channels} channels: this is a {what}.",
            advice=_GIVE_ORDINARY,
        )
    return Kind(family, words)


def _with_prediction(kind: Kind, header: Header) -> Kind:
    """What a file says of its prediction: marker tensors first, then ModelSpec's metadata."""
    names = header.tensors.keys()
    if {"edm_mean", "edm_vpred.sigma_max"} & names:
        what = f"{kind.what} with EDM preconditioning"
        return replace(kind, what=what, obstacle=f"This is {what}, which cannot be trained.")
    zero = "ztsnr" in names
    said = PREDICTIONS.get(header.metadata.get("modelspec.prediction_type", "").lower(), "")
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    if "v_pred" in names:
        prediction = "v_prediction"
    elif said:
        prediction = said
    elif re.search(r"v2-768-v", architecture):
        prediction = "v_prediction"
    elif kind.family != "sd2" or re.search(r"v2-512", architecture):
        prediction = "epsilon"
    else:
        prediction = ""
    return replace(kind, prediction=prediction, zero_terminal_snr=zero)


def identify_configs(
    index: Mapping[str, Any],
    unet: Mapping[str, Any],
    text: Mapping[str, Any],
    scheduler: Mapping[str, Any],
) -> Kind:
    """What a folder in diffusers format is, from its configuration files.

    Args:
        index: model_index.json. unet, text, scheduler: configurations of these parts; empty where
            they are missing.
    """
    encoders = tuple(sorted(part for part in index if part.startswith("text_encoder")))
    encoders = tuple(part for part in encoders if _is_there(index[part]))
    conditions = unet.get("addition_embed_type")
    channels = unet.get("in_channels", LATENT_CHANNELS)
    pipeline = str(index.get("_class_name", "unknown"))
    if conditions == "text_time" and encoders in (
        ("text_encoder", "text_encoder_2"),
        ("text_encoder_2",),
    ):
        family = "sdxl"
    elif conditions is None and encoders == ("text_encoder",) and not _has_classes(unet):
        linear = unet.get("use_linear_projection") or text.get("hidden_act") == "gelu"
        family = "sd2" if linear else "sd1"
    else:
        return Kind("", pipeline, obstacle=f"A base of this kind ({pipeline}) cannot be trained.")
    channels = channels if isinstance(channels, int) else 0
    refiner = family == "sdxl" and encoders == ("text_encoder_2",)
    # What the UNet gives is a latent: what it takes beside one is a mask or a picture.
    if channels == unet.get("out_channels", channels):
        channels = LATENT_CHANNELS
    kind = _trainable(family, channels, refiner=refiner)
    return replace(
        kind,
        prediction=str(scheduler.get("prediction_type") or "epsilon"),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        parts=frozenset({"unet", "vae", *encoders}),
    )


def _is_there(entry: Any) -> bool:
    """Whether a part of model_index.json is there: [library, class], both null where it is not."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _has_classes(unet: Mapping[str, Any]) -> bool:
    return bool(unet.get("class_embed_type") or unet.get("num_class_embeds"))
