"""Read, write and check LoRA files (`.safetensors`), and compute the hashes they are known by.

Pickle files are refused: opening one can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.adapters.container import (
    damaged,
    header_bytes,
    metadata_of,
    read_header,
    unreadable,
)
from trainer.errors import FileFormatError, OutputError

# ComfyUI shows no header over 1 MiB.
MAX_HEADER_BYTES = 2**20
# The largest LoRA files, of all layers of SDXL in fp32, have 5 GB.
_MAXIMUM_BYTES = 2**33
_SHOWN_NAMES = 5
_CHUNK_BYTES = 2**20

# What only names of adapter tensors have (LoRA, LoHa, LoKr, OFT, full difference, norm).
_ADAPTER_MARK = re.compile(r"lora|\.(?:hada|lokr|oft)_|\.(?:diff|diff_b|w_norm)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """A LoRA file in memory: tensors on the CPU as stored, and the header's metadata."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Verified:
    """A file that was read back and found right: how many tensors it has and how many matched."""

    tensors: int
    matched: int


@dataclass(frozen=True, slots=True)
class FileHashes:
    """The hashes by which programs and sites know a file, in lower-case hexadecimal.

    sha256: of the whole file. autov1: 8 digits, of 64 KiB at 1 MiB; None below 2 MiB.
    autov2: first 10 digits of sha256. autov3: SHA-256 of the tensor data alone, which stays when
    the metadata is edited; A1111 and CivitAI show its first 12 digits.
    """

    sha256: str
    autov1: str | None
    autov2: str
    autov3: str


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, dtype: torch.dtype
) -> str:
    """Write a LoRA file whole or not at all, and return its `sshs_model_hash`.

    Adds `sshs_model_hash`, `sshs_legacy_hash` and `modelspec.hash_sha256` to the metadata. Equal
    arguments give equal bytes.

    Args:
        path: of the file; its folder must exist. A symbolic link is followed.
        tensors: from name to tensor; all are stored as `dtype`.
        metadata: see `build_metadata`.
        dtype: float16, bfloat16 or float32.

    Raises:
        FileFormatError: a tensor is not finite, or the header would be too long; nothing written.
        OutputError: the file cannot be written; an older file at `path` is as it was.
    """
    stored = _cast(tensors, dtype)
    content, model_hash = _content(stored, metadata)
    try:
        _replace_file(path.resolve(), content)
    except OSError as error:
        raise OutputError(
            f"The LoRA file cannot be written: {error.strerror or error}.",
            where=str(path),
            fix="Check that the folder exists, can be written and has room, and that no other "
            "program holds the file open.",
        ) from error
    return model_hash


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file of any program.

    Raises:
        FileFormatError: there is no such file, or it is damaged or something else.
    """
    try:
        with path.open("rb") as file:
            header, _ = read_header(path, file)
            require_adapter(path, header)
            if os.fstat(file.fileno()).st_size > _MAXIMUM_BYTES:
                raise damaged(path, f"it is larger than {_MAXIMUM_BYTES // 2**30} GiB")
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise damaged(path, str(error)) from error
    # In the file's order: the library's own changes every time.
    ordered = {name: tensors[name] for name in header if name in tensors}
    return LoraFile(path, ordered, metadata_of(path, header))


def verify_lora(path: Path, expected: Mapping[str, tuple[int, ...]]) -> Verified:
    """Read a written file back and check it against the table of what it should hold.

    Args:
        path: of the file.
        expected: from tensor name to shape, see `expected_shapes`.

    Raises:
        FileFormatError: a tensor is missing, too many, of another shape or not finite, a layer has
            no alpha, or the stored hash is not that of the data.
    """
    file = read_lora(path)
    problems = [f"{name}: missing" for name in expected if name not in file.tensors]
    problems += [f"{name}: not expected" for name in file.tensors if name not in expected]
    for name, tensor in file.tensors.items():
        if name in expected and tuple(tensor.shape) != tuple(expected[name]):
            problems.append(f"{name}: shape {list(tensor.shape)}, not {list(expected[name])}")
        if not torch.isfinite(tensor.float()).all():
            problems.append(f"{name}: not finite")
        alpha = f"{name.partition('.')[0]}.alpha"
        if name.endswith("lora_down.weight") and alpha not in file.tensors:
            problems.append(f"{alpha}: missing")
    if file.metadata.get("sshs_model_hash") != file_hashes(path).autov3:
        problems.append("sshs_model_hash: not the hash of the tensor data")
    if problems:
        problems = list(dict.fromkeys(problems))
        raise FileFormatError(
            f"The LoRA file does not hold what it should: {len(problems)} differences.",
            where="\n".join([str(path), *problems[:_SHOWN_NAMES]]),
            fix="Write the file again; if this repeats, check the disk.",
        )
    return Verified(tensors=len(file.tensors), matched=len(expected))


def file_hashes(path: Path) -> FileHashes:
    """The hashes of a safetensors file; reads it in pieces, so it may be of any size.

    Raises:
        FileFormatError: the file cannot be read or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            _, data_start = read_header(path, file)
            size = os.fstat(file.fileno()).st_size
            file.seek(0)
            whole = _sha256(file)
            file.seek(data_start)
            data = _sha256(file)
            file.seek(2**20)
            part = hashlib.sha256(file.read(2**16)).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    autov1 = part[:8] if size >= 2 * 2**20 else None
    return FileHashes(sha256=whole, autov1=autov1, autov2=whole[:10], autov3=data)


def _replace_file(target: Path, content: bytes) -> None:
    # A short name of its own: a long file name with an ending added could be too long.
    temporary = target.with_name(f".likeness-{secrets.token_hex(6)}.tmp")
    # Made by open, not tempfile, so that the permissions are the user's usual ones.
    file = temporary.open("xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def require_adapter(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse a whole model before its gigabytes are read."""
    names = [name for name in header if name != "__metadata__"]
    if not any(_ADAPTER_MARK.search(name) for name in names):
        raise FileFormatError(
            "This file holds no LoRA" + ("; its tensors are called:" if names else "."),
            where="\n".join(names[:_SHOWN_NAMES]),
            fix=f"Choose a LoRA file instead of {path}.",
        )


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    stored = {
        name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    bad = [name for name, tensor in stored.items() if not torch.isfinite(tensor).all()]
    if bad:
        finite = all(bool(torch.isfinite(tensors[name]).all()) for name in bad)
        why = f"too large for {str(dtype).removeprefix('torch.')}" if finite else "not finite"
        raise FileFormatError(
            f"{len(bad)} tensors of the LoRA are {why}; the file was not written.",
            where="\n".join(bad[:_SHOWN_NAMES]),
            fix="Training went astray: use a lower learning rate.",
        )
    return stored


def _content(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, str]:
    """The whole file as bytes, and its `sshs_model_hash`."""
    # kohya's trainer takes both hashes from the file as it is with the ss_* metadata alone.
    kohya = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    saved = safetensors.torch.save(tensors)
    data_start = 8 + int.from_bytes(saved[:8], "little")
    entries: dict[str, Any] = json.loads(saved[8:data_start])
    data = saved[data_start:]
    model_hash = hashlib.sha256(data).hexdigest()
    legacy = (header_bytes(entries, kohya) + data)[2**20 : 2**20 + 2**16]
    header = header_bytes(
        entries,
        {
            **metadata,
            "sshs_model_hash": model_hash,
            "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
            "modelspec.hash_sha256": f"0x{model_hash}",
        },
    )
    if len(header) > MAX_HEADER_BYTES:
        raise FileFormatError(
            f"The LoRA file's header would be {len(header)} bytes; the limit is "
            f"{MAX_HEADER_BYTES}.",
            fix="Shorten the metadata.",
        )
    return header + data, model_hash
