"""The LoRA file of a run: tensors and metadata written, read back and checked."""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from trainer import __version__
from trainer.adapters.attach import Attached
from trainer.adapters.file import Verified, read_lora, verify_lora, write_lora
from trainer.adapters.folding import written_forms
from trainer.adapters.hashes import ModelHashes, model_hashes
from trainer.adapters.metadata import TrainingFacts, build_metadata
from trainer.adapters.naming import KeyNaming, expected_shapes, kohya_tensors, naming_of
from trainer.config.reader import to_toml
from trainer.data.buckets import bucket_counts
from trainer.errors import FileFormatError
from trainer.families import Backbone
from trainer.training.device import PRECISIONS
from trainer.training.session import Session
from trainer.types import Size

THUMBNAIL_PX = 256


def export_lora(
    session: Session,
    path: Path,
    *,
    step: int,
    started_at: float,
    thumbnail: Image.Image | None,
    source: Path | None = None,
) -> Verified:
    """Write the adapters as they are now and check what was written.

    Args:
        step: optimizer steps done.
        started_at: when the training started, seconds since 1970.
        thumbnail: a picture for the file's metadata.
        source: an earlier step's file of this run, whose tensors are written instead.

    Raises:
        OutputError: it cannot be written.
        FileFormatError: what was written is not what it should be.
    """
    strength = session.job.config.adapter.strength
    tensors: dict[str, Tensor] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for attached, naming in named_adapters(session):
        tensors |= kohya_tensors(attached, naming, strength)
        expected |= expected_shapes(attached, naming)
    if source is not None:
        tensors = dict(read_lora(source).tensors)
    picture = _jpeg(thumbnail) if thumbnail else None
    metadata = build_metadata(_facts(session, _output_name(path), step, started_at, picture))
    precision = session.job.config.adapter.save_precision
    write_lora(path, tensors, metadata, dtype=PRECISIONS[precision])
    return verify_lora(path, expected)


def keep_best(
    session: Session,
    best: int | None,
    *,
    now: int,
    started_at: float,
    thumbnail: Image.Image | None,
) -> bool:
    """Make the file of the best step hold that step's weights, and say whether it was written.

    Args:
        best: the best step so far; None removes the file, as it would be that of a later step
            which a resumed run has yet to come to.
        now: the step whose weights the adapters hold. Another step's come from its own file.

    Raises:
        OutputError: it cannot be written.
        FileFormatError: what was written, or the step's own file, is not what it should be.
    """
    folder = session.job.folder
    if best is None:
        folder.best_lora.unlink(missing_ok=True)
        return False
    if written_step(folder.best_lora) == best:
        return False
    export_lora(
        session,
        folder.best_lora,
        step=best,
        started_at=started_at,
        thumbnail=thumbnail,
        source=None if best == now else folder.step_lora(best),
    )
    return True


def written_step(path: Path) -> int | None:
    """The step whose weights a LoRA file of a run holds; None if there is no whole file."""
    try:
        return int(read_lora(path).metadata["ss_steps"])
    except (FileFormatError, KeyError, ValueError):
        return None


def _output_name(path: Path) -> str:
    """The name that the file will have, without its ending."""
    return path.name.removesuffix(".safetensors").removesuffix(".unfinished")


def named_adapters(session: Session) -> list[tuple[Attached, KeyNaming]]:
    """Each component's adapters with the naming of the family's files."""
    backbone = session.backbone
    return [
        (attached, naming_for(backbone, component))
        for component, attached in session.learner.adapters.items()
    ]


def naming_for(backbone: Backbone, component: str) -> KeyNaming:
    """How the layers of a component are called in the family's files."""
    names = backbone.names
    module = backbone.components[component]
    return naming_of(module, *names.prefixes[component], ldm=names.ldm and component == "unet")


def _facts(
    session: Session, name: str, step: int, started_at: float, thumbnail: bytes | None
) -> TrainingFacts:
    job, names = session.job, session.backbone.names
    config = job.config
    side = max(config.data.resolutions or (job.facts.resolution,))
    prediction = session.learner.objective.schedule.prediction
    text_encoder_lr = config.optimizer.text_encoder_learning_rate
    # As they stand in the file, where some layers have their own.
    forms = written_forms(session.learner.adapters["unet"].layers).values()
    (rank, alpha), _ = Counter((form.rank, form.alpha) for form in forms).most_common(1)[0]
    return TrainingFacts(
        output_name=name,
        version=__version__,
        kind=config.run.kind,
        trigger=config.caption.trigger,
        class_noun=config.caption.class_noun,
        note=job.note,
        base_name=job.facts.name,
        base_model_version=names.version,
        architecture=names.architecture,
        implementation=names.implementation,
        prediction_type="epsilon" if prediction == "epsilon" else "v",
        v2=names.v2,
        rank=rank,
        alpha=alpha * config.adapter.strength,
        network_args=_network_args(config.adapter.strength),
        captions=tuple(text for photo in job.photos for text in photo.texts),
        repeats=config.data.repeats,
        resolution=Size(side, side),
        buckets=bucket_counts(job.plain_pictures),
        bucket_ar_error=_aspect_error(session),
        steps=step,
        epochs=session.epochs,
        learning_rate=config.optimizer.learning_rate,
        unet_lr=config.optimizer.learning_rate,
        text_encoder_lr=text_encoder_lr if config.adapter.text_encoder else None,
        optimizer=config.optimizer.name,
        lr_scheduler=config.optimizer.schedule,
        seed=config.run.seed,
        mixed_precision="no" if session.device.precision == "fp32" else session.device.precision,
        started_at=started_at,
        finished_at=time.time(),
        settings_toml=_shared_settings(session),
        thumbnail_jpeg=thumbnail,
        clip_skip=config.model.clip_skip,
        base_hashes=_base_hashes(job.facts.folder),
        attention=session.device.attention,
        frozen_weights=session.device.weights,
    )


def _network_args(strength: float) -> dict[str, str]:
    """What changes the update beside rank and alpha."""
    return {} if strength == 1.0 else {"strength": f"{strength:g}"}


@cache
def _base_hashes(base: Path) -> ModelHashes | None:
    """Of a base that is a single file; read once, since it may take a minute."""
    return model_hashes(base) if base.is_file() else None


def _shared_settings(session: Session) -> str:
    """The settings as they go into the file: without the folders of the user's machine."""
    config = session.job.config
    data, preview = config.data, config.preview
    sets = [kept.model_copy(update={"folder": Path(kept.folder).name}) for kept in data.sets]
    names: dict[str, dict[str, Any]] = {
        "data": {
            "sets": sets,
            "face_detector_file": Path(data.face_detector_file).name,
            "face_recognizer_file": Path(data.face_recognizer_file).name,
        },
        "caption": {"captioner_folder": Path(config.caption.captioner_folder).name},
        "model": {"base": session.job.facts.name},
        "preview": {
            "prompts": Path(preview.prompts).name,
            "scorer_folder": Path(preview.scorer_folder).name,
        },
        "objective": {"prior_prompts": Path(config.objective.prior_prompts).name},
    }
    sections = {
        section: getattr(config, section).model_copy(update=update)
        for section, update in names.items()
    }
    return to_toml(config.model_copy(update=sections))


def _aspect_error(session: Session) -> float:
    """Mean difference between a photo's aspect ratio and its bucket's."""
    errors = [
        abs(
            photo.captioned.photo.size.width / photo.captioned.photo.size.height
            - photo.bucket.width / photo.bucket.height
        )
        for photo in session.job.plain_pictures
    ]
    return math.fsum(errors) / len(errors)


def _jpeg(image: Image.Image) -> bytes:
    side = THUMBNAIL_PX
    picture = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
