"""Where a captioner's files are: in a folder, or on the Hugging Face hub, fetched once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from trainer.errors import ModelError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Files of sub-folders are other formats of the same weights, as are half-precision copies.
_UNWANTED = ("*/*", "*.fp16.safetensors", "consolidated*")


def find_model(text: str, files: Sequence[str]) -> Path:
    """The folder that a text names, else that of a model on the hub, downloaded if need be.

    The hub is asked only for a name such as "Salesforce/blip-image-captioning-base" that is no
    folder here. `HF_HUB_OFFLINE` and `HF_HOME` are obeyed.

    Args:
        text: a folder, or "owner/name".
        files: patterns of the files that are needed of the hub's.

    Raises:
        ModelError: there is neither, or it cannot be fetched.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_NAME.fullmatch(text):
        raise ModelError(
            f"There is no captioner in this folder: {'it is a file' * folder.exists()}"
            f"{'it does not exist' * (not folder.exists())}.",
            where=str(folder),
            fix="Give the folder of a captioning model, or its name on the Hugging Face hub, such "
            "as Salesforce/blip-image-captioning-base.",
        )
    try:
        found = snapshot_download(text, allow_patterns=list(files), ignore_patterns=list(_UNWANTED))
    except (OSError, ValueError) as error:
        offline = " (downloads are switched off by HF_HUB_OFFLINE)" * constants.HF_HUB_OFFLINE
        raise ModelError(
            f"There is no folder '{text}', and no model of this name could be fetched{offline}: "
            f"{reason_of(error)}",
            where=text,
            fix="Check the spelling and the connection, or download the model by hand and give "
            "its folder.",
        ) from error
    return Path(found)


def reason_of(error: Exception) -> str:
    """The first line of what a library says, or the error's name where that is too little."""
    name = type(error).__name__
    lines = (line.strip() for line in str(error).splitlines())
    said = next((line for line in lines if line), "")
    return f"{name} {said}".strip() if isinstance(error, LookupError) or not said else said
