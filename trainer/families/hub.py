"""A base on the Hugging Face hub, `author/model` or `author/model@revision`, as a local folder.

Only what training needs is downloaded: configurations, tokenizers and the weights in safetensors
files, of one precision. The hub's own environment variables are honoured (HF_HUB_OFFLINE, HF_HOME,
HF_TOKEN and their kin).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from trainer.errors import ModelError

# A revision becomes a file name in the hub's cache: none that leads elsewhere.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@(?!/|.*\.\.)[\w./-]+)?")
_MODEL_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}

# Folders of a repository that make a base; others (safety checker, ONNX, Flax) are left there.
_PARTS = {
    *("unet", "vae", "scheduler"),
    *("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}
_SETTINGS = {".json", ".txt"}
# `NAME.fp16.safetensors` or `NAME.fp16-00001-of-00002.safetensors`.
_VARIANT = re.compile(r"\.([A-Za-z]\w*)(?:-\d+-of-\d+)?\.safetensors$")


def is_hub_id(text: str) -> bool:
    """Whether a text that names no file or folder can be a repository on the hub.

    Not if it ends as a model file does, or begins with a folder that is there: then it is a path
    with a slip in it.
    """
    if not _HUB_ID.fullmatch(text) or Path(text).suffix.lower() in _MODEL_SUFFIXES:
        return False
    return not Path(text).exists() and not Path(text.partition("/")[0]).is_dir()


def hub_folder(text: str, *, variant: str = "", download: bool = True) -> Path:
    """The local folder of a base on the hub, downloaded if need be.

    Args:
        text: `author/model`, or with `@` and a branch, tag or commit.
        variant: precision of the weights to take where the repository has several ("fp16");
            "": the plain files.
        download: whether the network may be used.

    Raises:
        ModelError: there is no such repository or it wants a login; it is not here and cannot be
            downloaded; it holds no model in diffusers format.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    name, _, revision = text.partition("@")
    where = {"repo_id": name, "revision": revision or None}
    if constants.HF_HUB_OFFLINE or not download:
        return _cached(text, where)
    try:
        files = huggingface_hub.list_repo_files(**where)
        wanted = wanted_files(files, variant)
        if "model_index.json" not in wanted:
            raise _not_diffusers(text, files)
        return Path(huggingface_hub.snapshot_download(**where, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"The model '{name}' is given only to people who have accepted its terms.",
            where=f"https://huggingface.co/{name}",
            fix="Accept them there, then log in on this machine with: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"The model '{name}' has no revision '{revision}'.",
            where=f"https://huggingface.co/{name}",
            fix="Give a branch, tag or commit of it after the @, or none.",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"There is no model '{name}' on the Hugging Face hub, nor a folder of that name here "
            "(or it is private).",
            where=text,
            fix="Check the name; for a private model log in first with: hf auth login",
        ) from error
    except (OSError, errors.HTTPError) as error:
        return _cached(text, where, error)


def _cached(text: str, where: dict[str, str | None], cause: Exception | None = None) -> Path:
    """The folder as far as it has been downloaded before.

    Patterns are given so that files nobody asked for are not missed.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            **where, local_files_only=True, allow_patterns=["model_index.json"]
        )
        if (Path(found) / "model_index.json").is_file():
            return Path(found)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        pass
    reason = f"the hub cannot be reached ({cause})" if cause else "the network may not be used"
    raise ModelError(
        f"The model '{text}' is not on this machine, and {reason}.",
        where=text,
        fix="Connect, or allow the network (HF_HUB_OFFLINE), and run again; or give a folder or "
        "file of your own after --base.",
    ) from cause


def _not_diffusers(text: str, files: Iterable[str]) -> ModelError:
    single = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    return ModelError(
        f"The repository '{text}' holds no model in diffusers format.",
        where=f"https://huggingface.co/{text.partition('@')[0]}",
        fix=f"Download {single[0]} from there and give that file after --base."
        if single
        else "Give a model of Stable Diffusion.",
    )


def wanted_files(files: Iterable[str], variant: str) -> list[str]:
    """Those of a repository's files that training needs.

    Args:
        files: all of them, with "/" between folders.
        variant: precision of weights that is taken in the folders that have it; "" for plain.
    """
    files = list(files)
    chosen = []
    for part in sorted(_PARTS):
        inside = [name for name in files if str(PurePosixPath(name).parent) == part]
        weights = [name for name in inside if name.endswith(".safetensors")]
        of_variant = [name for name in weights if variant and _variant(name) == variant]
        plain = [name for name in weights if not _variant(name)]
        chosen += [name for name in inside if PurePosixPath(name).suffix in _SETTINGS]
        chosen += of_variant or plain or weights
    return [name for name in ("model_index.json",) if name in files] + chosen


def _variant(name: str) -> str:
    match = _VARIANT.search(name)
    return match[1] if match else ""


def variant_of(folder: Path) -> str | None:
    """Which variant of a part's weights a folder holds, as `from_pretrained(variant=...)` wants.

    Args:
        folder: of one part, such as `unet`.

    Returns:
        None where there are plain files, which are taken first, or none at all.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names or any(not _variant(name) for name in names):
        return None
    found = {_variant(name) for name in names}
    return "fp16" if "fp16" in found else min(found)
