"""LoRA files in the form of another program, with exactly the same update of every layer.

kohya's form states an alpha for each layer. diffusers' has none (its scale is 1), so alpha is
multiplied into `up`. peft's is a folder for each model with a configuration that states the alphas.
A file keeps its number format as long as every number of the new one can be written in it; else it
becomes float32.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters.factors import narrowest
from trainer.adapters.file import LoraFile, read_lora, write_lora
from trainer.adapters.foreign import COMPONENTS, Foreign, Layer, family_of
from trainer.adapters.forms import (
    Form,
    Source,
    diffusers_form,
    form_metadata,
    kohya_form,
    peft_form,
    problem,
)
from trainer.adapters.outside import CONFIG_NAME, WEIGHTS_NAME, read_foreign
from trainer.errors import FileFormatError, OutputError

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written: how many layers and tensors, in which number format, for which family."""

    layers: int
    tensors: int
    dtype: str
    family: str


def convert(
    source: Path, target: Path, *, to: Form, family: str = "", overwrite: bool = False
) -> Converted:
    """Write a LoRA in another program's form, whole or not at all.

    Args:
        source: a LoRA file of any program, or a folder of peft (with one for each model in it).
        target: a file, for peft a folder; the folder it is to be in must exist.
        to: the form.
        family: "sd1", "sd2" or "sdxl", where it cannot be told from the file.
        overwrite: replace what is there.

    Raises:
        FileFormatError: the source cannot be read, or not be said in that form; nothing written.
        OutputError: the target is there already, or cannot be written.
    """
    _check_target(target, to, overwrite)
    read = read_source(source, family)
    _check_source(read, to)
    if to == "peft":
        return _write_peft(read, target)
    tensors = kohya_form(read) if to == "kohya" else diffusers_form(read)
    dtype = narrowest(_originals(read), tensors.values())
    metadata = form_metadata(read, to)
    write_lora(target, tensors, metadata, dtype=dtype)
    return Converted(len(read.layers), len(tensors), _name(dtype), read.family)


def read_source(source: Path, family: str = "") -> Source:
    """The layers of a LoRA of any program, with their tensors.

    Raises:
        FileFormatError: it cannot be read, or not be understood.
    """
    files = [read_lora(path) for path in lora_files(source)]
    names = [read_foreign(file) for file in files]
    metadata: dict[str, str] = {}
    tensors: dict[Layer, Mapping[str, Tensor]] = {}
    loose: dict[str, Tensor] = {}
    for file, found in zip(files, names, strict=True):
        _check_tensors(file, found)
        metadata |= file.metadata
        loose |= {key: file.tensors[key] for key in found.embeddings}
        for layer in found.layers:
            if layer.kind != "none":  # an alpha alone changes nothing
                tensors[layer] = {p: file.tensors[key] for p, key in layer.parts.items()}
    everything = Foreign(tuple(tensors), tuple(loose), ())
    told = family_of(everything)
    if family and told not in ("unknown", family):
        raise FileFormatError(
            f"The layers of the LoRA are those of {told}, not of {family}.",
            where=str(source),
            fix="Leave out --family.",
        )
    return Source(
        path=source,
        layers=tuple(tensors),
        embeddings=tuple(loose),
        tensors=tensors,
        loose=loose,
        metadata=metadata,
        family=family or family_of(everything, metadata),
    )


def lora_files(source: Path) -> list[Path]:
    """The file itself, or those in a folder of peft."""
    if not source.is_dir():
        return [source]
    places = (source, *(source / component for component in COMPONENTS))
    files = [place / WEIGHTS_NAME for place in places if (place / WEIGHTS_NAME).is_file()]
    if not files:
        raise FileFormatError(
            f"The folder holds no LoRA: there is no {WEIGHTS_NAME} in it.",
            where=str(source),
            fix="Give a LoRA file, or a folder that peft has saved.",
        )
    return files


def _check_tensors(file: LoraFile, names: Foreign) -> None:
    if names.unknown:
        raise FileFormatError(
            f"{len(names.unknown)} names in the file are not understood.",
            where="\n".join([str(file.path), *(n[:200] for n in names.unknown[:_SHOWN])]),
            fix="Only LoRAs for Stable Diffusion 1, 2 and XL can be read.",
        )
    bad = [
        name for name, tensor in file.tensors.items() if not torch.isfinite(tensor.float()).all()
    ]
    if bad:
        raise FileFormatError(
            f"{len(bad)} tensors hold numbers that are not finite.",
            where="\n".join([str(file.path), *(name[:200] for name in bad[:_SHOWN])]),
            fix="The file is broken: use one of an earlier step of its training.",
        )


def _check_source(source: Source, to: Form) -> None:
    """Refuse what the form has no words for."""
    if not source.layers:
        raise FileFormatError(
            "The file has no layer that could be converted.",
            where=str(source.path),
            fix="'likeness inspect FILE' says what is in it.",
        )
    problems = [p for layer in source.layers if (p := problem(layer, to))]
    if to != "kohya" and source.embeddings:
        problems += ["an embedding (bundle_emb)"] * len(source.embeddings)
    if to == "kohya" and source.family == "unknown":
        raise FileFormatError(
            "It cannot be told from the file whether it is for SD 1, SD 2 or SDXL.",
            where=str(source.path),
            fix="Say it: --family sd1, --family sd2 or --family sdxl.",
        )
    second = any(layer.component == "text_encoder_2" for layer in source.layers)
    if second and source.family in ("sd1", "sd2"):
        problems.append(f"a second text encoder, which {source.family} does not have")
    dora = [("dora" in layer.parts, layer.component) for layer in source.layers]
    if to == "peft" and any((not has, c) in dora for has, c in dora):
        problems.append("layers with and without DoRA")
    paths = Counter((layer.component, layer.path) for layer in source.layers)
    problems += [f"two updates of one layer ({p})" for (_, p), n in paths.items() if n > 1]
    if problems:
        counted = Counter(problems).most_common()
        raise FileFormatError(
            f"The LoRA cannot be written in the form of {to} with the same effect; nothing was "
            "written.",
            where="\n".join(
                [str(source.path), *(f"{text}: {count} times" for text, count in counted[:_SHOWN])]
            ),
            fix="Use it with a program that knows this kind; 'likeness inspect FILE' lists them.",
        )


def _write_peft(source: Source, target: Path) -> Converted:
    present = [c for c in COMPONENTS if any(layer.component == c for layer in source.layers)]
    made = {component: peft_form(source, component) for component in present}
    count = sum(len(tensors) for tensors, _ in made.values())
    dtype = narrowest(
        _originals(source), [t for tensors, _ in made.values() for t in tensors.values()]
    )
    metadata = form_metadata(source, "peft")
    target = target.resolve()
    aside = target.with_name(f".likeness-{secrets.token_hex(6)}.tmp")
    try:
        aside.mkdir()
        for component, (tensors, config) in made.items():
            folder = aside / component
            folder.mkdir()
            write_lora(folder / WEIGHTS_NAME, tensors, metadata, dtype=dtype)
            text = json.dumps(config, indent=2)
            (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        _put_in_place(aside, target)
    except OSError as error:
        raise OutputError(
            f"The folder cannot be written: {error.strerror or error}.",
            where=str(target),
            fix="Check that the folder it is to be in exists, can be written and has room.",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Converted(len(source.layers), count, _name(dtype), source.family)


def _put_in_place(made: Path, target: Path) -> None:
    """Put the new folder where an old one may be; the old one is gone only afterwards."""
    if not target.is_dir():
        made.rename(target)
        return
    old = target.with_name(f".likeness-{secrets.token_hex(6)}.old")
    target.rename(old)
    try:
        made.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _check_target(target: Path, to: Form, overwrite: bool) -> None:
    if not target.exists():
        if to != "peft" and target.suffix != ".safetensors":
            raise OutputError(
                "The new LoRA file needs a name that ends in .safetensors.", where=str(target)
            )
        return
    if not overwrite:
        raise OutputError(
            "There is something already where the new LoRA is to be written.",
            where=str(target),
            fix="Choose another name, or replace it with --overwrite.",
        )
    if (to == "peft") != target.is_dir() or (to == "peft" and not _is_peft_folder(target)):
        kind = "a folder of LoRAs that peft can load" if to == "peft" else "a file"
        raise OutputError(
            f"What is there cannot be replaced: it is not {kind}.",
            where=str(target),
            fix="Choose another name.",
        )


def _is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds nothing but what was written by `convert`."""
    allowed = {CONFIG_NAME, WEIGHTS_NAME}
    return all(
        inside.name in COMPONENTS
        and inside.is_dir()
        and {x.name for x in inside.iterdir()} <= allowed
        for inside in folder.iterdir()
    )


def _originals(source: Source) -> Iterable[Tensor]:
    """The tensors whose number format the new file is to have."""
    return (
        tensor
        for parts in source.tensors.values()
        for part, tensor in parts.items()
        if part != "alpha"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
