"""What is wrong, or will surprise, in a LoRA file of any program: one sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trainer.adapters.file import MAX_HEADER_BYTES, FileHashes
from trainer.adapters.foreign import Foreign, Layer, family_of
from trainer.adapters.outline import Outline, Values

_SHOWN = 3
_HASH = re.compile(r"[0-9a-f]{64}")


def flaws(outline: Outline, names: Foreign, values: Values, hashes: FileHashes) -> tuple[str, ...]:
    """The sentences, the gravest first; none for a file without a flaw."""
    return (
        *_of_values(names, values),
        *_of_names(names),
        *_of_strength(names),
        *_of_dora(names),
        *_of_header(outline, names, hashes),
    )


def _of_values(names: Foreign, values: Values) -> Iterator[str]:
    if values.not_finite:
        yield (
            f"{_tensors(len(values.not_finite))} not finite (NaN or infinity): pictures will be "
            f"black or noise{_such_as(sorted(values.not_finite))}"
        )
    ups = [layer.parts["up"] for layer in names.layers if "up" in layer.parts]
    zero = [key for key in ups if key in values.zero]
    if zero and len(zero) == len(ups):
        yield "all updates are zero: the file changes nothing"
    elif zero:
        yield f"{len(zero)} of {len(ups)} layers change nothing, as their updates are zero"


def _of_names(names: Foreign) -> Iterator[str]:
    if names.unknown:
        yield (
            f"{len(names.unknown)} names are not understood: no Stable Diffusion 1, 2 or XL layer "
            f"is called so{_such_as(names.unknown)}"
        )
    flawed = [layer for layer in names.layers if layer.flaw]
    if flawed:
        yield f"{len(flawed)} layers are broken: {flawed[0].flaw}{_such_as(_named(flawed))}"
    bare = [layer for layer in names.layers if layer.without_text_model]
    if any(layer.style.startswith("kohya") for layer in bare):
        yield (
            f"{len(bare)} text encoder names lack 'text_model': most programs leave them out; "
            "'likeness convert' puts it in"
        )
    unet = {layer.style for layer in names.layers if layer.component == "unet"}
    groups = {style.partition("-")[0] for style in names.styles}
    if len(unet) > 1 or len(groups) > 1:
        yield f"names of several styles are mixed ({', '.join(sorted(unet | groups))})"


def _of_strength(names: Foreign) -> Iterator[str]:
    loras = [layer for layer in names.layers if layer.kind == "lora"]
    without = [x for x in loras if x.alpha is None and x.style.startswith(("kohya", "onetrainer"))]
    if without:
        yield (
            f"{len(without)} layers have no alpha: programs differ in how strongly they apply them"
            f"{_such_as(_named(without))}"
        )
    if any(layer.style == "peft" and layer.alpha is None for layer in loras):
        yield "adapter_config.json is not beside the file: without it the strength is not known"


def _of_dora(names: Foreign) -> Iterator[str]:
    dora = [layer for layer in names.layers if "dora" in layer.parts]
    rows = [
        layer
        for layer in dora
        if "up" in layer.shapes and layer.shapes["dora"][:1] == layer.shapes["up"][:1]
    ]
    if dora:
        yield (
            f"{len(dora)} layers are DoRA: diffusers and sd-scripts leave its magnitudes out, and "
            "the result is another"
        )
    if rows and rows[0].style.startswith("kohya"):
        yield (
            f"{len(rows)} of them have a magnitude for each output row: ComfyUI and Forge are some "
            "percent off, A1111 is wrong"
        )


def _of_header(outline: Outline, names: Foreign, hashes: FileHashes) -> Iterator[str]:
    if outline.header_bytes > MAX_HEADER_BYTES:
        yield (
            f"the header has {outline.header_bytes:,} bytes: ComfyUI shows no metadata above "
            f"{MAX_HEADER_BYTES:,}"
        )
    metadata = outline.file.metadata
    stated = metadata.get("sshs_model_hash")
    if stated is not None and stated != hashes.autov3:
        why = "is no SHA-256" if not _HASH.fullmatch(stated) else "is not that of the data"
        yield f"sshs_model_hash {why}: model sites will not know the file by it"
    family, stated_family = family_of(names), family_of(Foreign((), (), ()), metadata)
    if "unknown" not in (family, stated_family) and family != stated_family:
        yield f"the metadata says {stated_family}, but the layers are those of {family}"


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


def _named(layers: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def _such_as(names: Sequence[str]) -> str:
    return f" (such as {', '.join(name[:100] for name in names[:_SHOWN])})"
