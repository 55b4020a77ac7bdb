"""Where the words of a base come from.

All text encoders of Stable Diffusion 1.x, 2.x and XL share the vocabulary of OpenAI's CLIP; they
differ only in what fills up a prompt behind its end. Single files hold no vocabulary and none ships
with this package, so one that is on the machine is taken: any of the repositories below has it.
"""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ModelError
from trainer.families import BaseFacts

# Repositories with the vocabulary, and the folder in them; the first is also downloaded.
_REPOSITORIES = (
    ("openai/clip-vit-large-patch14", ""),
    ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ""),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ""),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1-base", "tokenizer/"),
)
_FILES = ("vocab.json", "merges.txt")
_ALL_FILES = [*_FILES, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]

# Tokens behind the end of a prompt: OpenCLIP's encoders were trained with id 0 (the word "!")
# there, OpenAI's with the end of text again.
PADDED_WITH_ZERO = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}


def padding_id(family: str, part: str, end_id: int) -> int:
    """The id that fills up a prompt behind its end.

    Give it to the ids directly: a tokenizer that is told to pad with the word "!" also takes every
    "!" in a prompt for padding.

    Args:
        family: `sd1`, `sd2` or `sdxl`. part: `text_encoder` or `text_encoder_2`.
        end_id: of <|endoftext|> in the vocabulary.
    """
    return 0 if (family, part) in PADDED_WITH_ZERO else end_id


def has_words(folder: Path) -> bool:
    """Whether a folder holds a tokenizer with its vocabulary."""
    whole = (folder / "tokenizer.json").is_file()
    return whole or all((folder / name).is_file() for name in _FILES)


def find_tokenizer(
    facts: BaseFacts, given: Path | None = None, *, download: bool = True, part: str = "tokenizer"
) -> Path:
    """The folder of a base's tokenizer: the one given, the base's own, or one in the hub's cache.

    Args:
        facts: of the base. given: a folder that the user named. download: whether the network may
            be used; the hub's environment variables may forbid it too.
        part: `tokenizer` or `tokenizer_2` (a base without the second uses the first for both).

    Raises:
        ModelError: the folder given has no tokenizer, or there is none to be found.
    """
    if given is not None:
        for folder in (given, given / part, given / "tokenizer"):
            if has_words(folder):
                return folder
        raise ModelError(
            "There is no tokenizer in this folder.",
            where=str(given),
            fix="It should hold vocab.json and merges.txt (or tokenizer.json).",
        )
    for name in (part, "tokenizer"):
        if has_words(facts.folder / name):
            return facts.folder / name
    if facts.folder.is_dir():
        raise ModelError(
            "A file of the base model is missing: it has no words.",
            where=str(facts.folder / "tokenizer" / "tokenizer.json"),
            fix="Copy or download the base again, or name a folder with vocab.json and merges.txt "
            "after --tokenizer.",
        )
    return _cached() or _downloaded(facts, download=download)


def _cached() -> Path | None:
    """A folder of the local hub cache that has the vocabulary."""
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in _REPOSITORIES:
        found = try_to_load_from_cache(repository, f"{folder}vocab.json")
        if isinstance(found, str) and has_words(Path(found).parent):
            return Path(found).parent
    return None


def _downloaded(facts: BaseFacts, *, download: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    repository = _REPOSITORIES[0][0]
    reason = "and the network may not be used"
    cause: Exception | None = None
    if download and not constants.HF_HUB_OFFLINE:
        try:
            folder = Path(snapshot_download(repository, allow_patterns=_ALL_FILES))
            if has_words(folder):
                return folder
            reason = f"and '{repository}' on the Hugging Face hub has none"
        except (OSError, errors.HTTPError) as error:
            reason, cause = f"and the Hugging Face hub cannot be reached ({error})", error
    raise ModelError(
        "The base is a single file, which has no tokenizer; none was found on this machine, "
        f"{reason}.",
        where=str(facts.folder),
        fix="Name a folder with CLIP's vocab.json and merges.txt after --tokenizer (the folder "
        "`tokenizer` of any Stable Diffusion model will do), or connect once to download "
        f"them from '{repository}'.",
    ) from cause
