"""The metadata of a LoRA file: what A1111, Forge, ComfyUI and model sites read from its header.

`ss_*` are the keys of kohya's trainer, `modelspec.*` those of the Stability AI model metadata
standard (ModelSpec 1.0.0), `likeness.*` our own. All values are text. ComfyUI refuses to show a
header over 1 MiB, of which tensor entries take up to 0.4 MiB (SDXL), so the metadata stays below
`MAX_METADATA_BYTES`: each long value has a limit of its own, and `likeness.left_out` says what
was left out.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from trainer.adapters.hashes import ModelHashes
from trainer.types import Size

MAX_METADATA_BYTES = 512 * 1024
MAX_THUMBNAIL_BYTES = 192 * 1024
MAX_TAGS_BYTES = 128 * 1024
MAX_SETTINGS_BYTES = 64 * 1024
MAX_LINE_CHARACTERS = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """What `build_metadata` needs to know about a run; plain values only.

    output_name: the file's name without ending; A1111 offers it as `<lora:NAME:1>`, so every file
        of a run should have its own.
    trigger, class_noun: the words to prompt with; `kind` is "face" or "style".
    note: for whom the file is, such as "for the Likeness embedded base; fits no real SD 1.5";
        goes into title, description and usage hint.
    base_model_version ("sd_v1"), architecture ("stable-diffusion-v1/lora"), implementation
        ("diffusers"), prediction_type ("epsilon" or "v") and v2 (Stable Diffusion 2) are facts of
        the model family.
    network_args: further arguments of the network, as text.
    captions: one per photo; repeats: how often a photo counts in an epoch.
    buckets: how many photos (with repeats) each bucket holds; bucket_ar_error: mean difference
        between a photo's aspect ratio and its bucket's.
    unet_lr, text_encoder_lr: None where that part is not trained.
    started_at, finished_at: seconds since 1970 (UTC).
    settings_toml: the resolved settings of the run.
    thumbnail_jpeg: a JPEG file of about 256 px.
    base_hashes: of a base that is a single file.
    attention: what computed the UNet's. frozen_weights: number format they were kept in, "same" as
        they computed in.
    """

    output_name: str
    version: str
    kind: str
    trigger: str
    class_noun: str
    base_name: str
    base_model_version: str
    architecture: str
    implementation: str
    prediction_type: str
    v2: bool
    rank: int
    alpha: float
    captions: tuple[str, ...]
    resolution: Size
    buckets: Mapping[Size, int]
    steps: int
    epochs: int
    learning_rate: float
    unet_lr: float | None
    text_encoder_lr: float | None
    optimizer: str
    lr_scheduler: str
    seed: int
    mixed_precision: str
    started_at: float
    finished_at: float
    settings_toml: str
    repeats: int = 1
    bucket_ar_error: float = 0.0
    clip_skip: int | None = None
    network_args: Mapping[str, str] | None = None
    note: str = ""
    author: str = ""
    comment: str = ""
    thumbnail_jpeg: bytes | None = None
    base_hashes: ModelHashes | None = None
    attention: str = "sdpa"
    frozen_weights: str = "same"


def build_metadata(facts: TrainingFacts) -> dict[str, str]:
    """The metadata of the file, without the hashes (`write_lora` adds them).

    Left out when too long: a thumbnail over `MAX_THUMBNAIL_BYTES`, settings over
    `MAX_SETTINGS_BYTES`, the rarest tags over `MAX_TAGS_BYTES`, and the end of other texts over
    `MAX_LINE_CHARACTERS`.
    """
    left_out: list[str] = []
    metadata = _kohya_keys(facts) | _modelspec_keys(facts) | _likeness_keys(facts)
    metadata = {key: _line(key, value, left_out) for key, value in metadata.items()}
    metadata |= _data_keys(facts, left_out)
    if facts.base_hashes:
        metadata["ss_sd_model_hash"] = facts.base_hashes.autov1
        metadata["ss_new_sd_model_hash"] = facts.base_hashes.sha256
    if _bytes(facts.settings_toml) <= MAX_SETTINGS_BYTES:
        metadata["likeness.settings"] = facts.settings_toml
    else:
        left_out.append("likeness.settings")
    if facts.thumbnail_jpeg is not None:
        encoded = base64.b64encode(facts.thumbnail_jpeg).decode("ascii")
        if len(encoded) <= MAX_THUMBNAIL_BYTES:
            metadata["modelspec.thumbnail"] = f"data:image/jpeg;base64,{encoded}"
        else:
            left_out.append("modelspec.thumbnail")
    if left_out:
        metadata["likeness.left_out"] = ", ".join(left_out)
    # A folder name that is no valid Unicode could not be written to the header.
    return {k: v.encode("utf-8", "replace").decode("utf-8") for k, v in metadata.items()}


def _kohya_keys(facts: TrainingFacts) -> dict[str, str]:
    values: dict[str, object] = {
        "ss_base_model_version": facts.base_model_version,
        "ss_v2": facts.v2,
        "ss_output_name": facts.output_name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": facts.rank,
        "ss_network_alpha": facts.alpha,
        "ss_network_args": _json(dict(facts.network_args or {})),
        # pysssss' ComfyUI nodes split this at the comma.
        "ss_resolution": f"({facts.resolution.width}, {facts.resolution.height})",
        "ss_clip_skip": facts.clip_skip,
        "ss_sd_model_name": facts.base_name,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "ss_training_comment": facts.comment or None,
        "ss_steps": facts.steps,
        "ss_epoch": facts.epochs,
        "ss_num_train_images": len(facts.captions) * facts.repeats,
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.unet_lr,
        "ss_text_encoder_lr": facts.text_encoder_lr,
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.lr_scheduler,
        "ss_seed": facts.seed,
        "ss_mixed_precision": facts.mixed_precision,
    }
    # As kohya's trainer writes them: True with a capital, None where there is nothing.
    return {key: str(value) for key, value in values.items()}


def _modelspec_keys(facts: TrainingFacts) -> dict[str, str]:
    prompt = " ".join(word for word in (facts.trigger, facts.class_noun) if word)
    note = f" {facts.note[0].upper()}{facts.note[1:]}." if facts.note else ""
    keys = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": facts.architecture,
        "modelspec.implementation": facts.implementation,
        "modelspec.title": facts.output_name + (f" ({facts.note})" if facts.note else ""),
        "modelspec.description": (
            f"A {facts.kind} LoRA of {len(facts.captions)} photos, trained for {facts.steps} steps "
            f"on {facts.base_name} with Likeness {facts.version}.{note}"
        ),
        "modelspec.author": facts.author,
        "modelspec.date": datetime.fromtimestamp(int(facts.finished_at), UTC).isoformat(),
        "modelspec.resolution": str(facts.resolution),
        "modelspec.trigger_phrase": facts.trigger,
        "modelspec.tags": ", ".join(w for w in (facts.kind, facts.class_noun, "likeness") if w),
        "modelspec.usage_hint": f"Write '{prompt}' in the prompt.{note}",
        "modelspec.prediction_type": facts.prediction_type,
        "modelspec.encoder_layer": "" if facts.clip_skip is None else str(facts.clip_skip),
    }
    return {key: value for key, value in keys.items() if value}


def _likeness_keys(facts: TrainingFacts) -> dict[str, str]:
    return {
        "likeness.version": facts.version,
        "likeness.base": facts.base_name,
        "likeness.attention": facts.attention,
        "likeness.frozen_weights": facts.frozen_weights,
    }


def _data_keys(facts: TrainingFacts, left_out: list[str]) -> dict[str, str]:
    """Tags, folders and buckets: JSON objects, which A1111 and Forge decode."""
    # The customary folder name of kohya's trainer; A1111 shows it as the heading of the tags.
    folder = f"{facts.repeats}_{facts.class_noun or facts.kind}"[:MAX_LINE_CHARACTERS]
    buckets = {
        str(index): {"resolution": [size.width, size.height], "count": facts.buckets[size]}
        for index, size in enumerate(sorted(facts.buckets))
    }
    tags = Counter(tag for caption in facts.captions for tag in _tags(caption))
    kept = _kept_tags(tags)
    if len(kept) < len(tags):
        left_out.append(f"{len(tags) - len(kept)} of {len(tags)} tags in ss_tag_frequency")
    image_count = len(facts.captions)
    return {
        "ss_tag_frequency": _json({folder: kept}),
        "ss_dataset_dirs": _json({folder: {"n_repeats": facts.repeats, "img_count": image_count}}),
        "ss_bucket_info": _json({"buckets": buckets, "mean_img_ar_error": facts.bucket_ar_error}),
    }


def _tags(caption: str) -> Iterable[str]:
    return (tag for tag in (part.strip().lower() for part in caption.split(",")) if tag)


def _kept_tags(tags: Counter[str]) -> dict[str, int]:
    """The most frequent tags that fit; equally frequent ones in alphabetical order."""
    kept: dict[str, int] = {}
    room = MAX_TAGS_BYTES
    for tag, count in sorted(tags.items(), key=lambda item: (-item[1], item[0])):
        room -= _bytes(_json({tag: count}))
        if room < 0:
            break
        kept[tag] = count
    return kept


def _line(key: str, value: str, left_out: list[str]) -> str:
    if len(value) > MAX_LINE_CHARACTERS:
        left_out.append(f"the end of {key}")
    return value[:MAX_LINE_CHARACTERS]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _bytes(text: str) -> int:
    """How many bytes `text` takes in the header, where quotes and line ends are escaped."""
    return len(_json(text).encode("utf-8", "replace"))
