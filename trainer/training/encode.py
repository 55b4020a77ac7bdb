"""Training pictures and captions become latents and prompt embeddings, once, and are kept on disk.

An entry's key names all that its numbers depend on and nothing else: an edited photo, another
crop or another VAE makes just the entries anew that they change. The weights of the loss (masks,
transparency, faces) are entries of their own, so that changing them leaves the latents alone.
Threads decode pictures ahead of the VAE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trainer.data.cache import TensorCache, fingerprint
from trainer.data.decode import PictureError, shown
from trainer.data.masks import latent_weights
from trainer.data.pixels import load_picture
from trainer.data.variants import picture_key, sample_key
from trainer.diffusion.noise import generator_of
from trainer.families import Backbone
from trainer.families.backbone import encodes_in_tiles
from trainer.training.ahead import batches_of_alike, work_ahead
from trainer.types import Bucketed, CachedSample, Photo

# Part of every cache key: change it when what is cached changes.
CACHE_FORMAT = 2
# Pictures of one bucket that a GPU's VAE encodes at once. The processor takes them singly: it is no
# faster with more, and the last digits of a picture's latents would depend on its neighbours.
GPU_BATCH = 4


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How photos are encoded.

    vae, text: fingerprints of what makes latents and prompt embeddings.
    background: RGB behind transparency. transparency, face_weight: as `load_picture` takes them.
    cache_prompts: whether samples get the prompt embeddings of their caption.
    workers: pictures decoded at the same time.
    """

    vae: str
    text: str
    background: tuple[int, int, int]
    transparency: Literal["background", "mask"]
    face_weight: float
    cache_prompts: bool
    workers: int


@dataclass(frozen=True, slots=True)
class _Task:
    """A training picture and the names of the entries it needs, "" for none.

    weights: "" where all its latents weigh alike.
    """

    photo: Bucketed
    latents: str
    weights: str


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A picture on its way to the VAE. weights_hw: those of its latents, if they are needed."""

    task: _Task
    pixels_CHW: Tensor
    weights_hw: Tensor | None


@torch.no_grad()
def encode_photos(
    photos: Sequence[Bucketed],
    backbone: Backbone,
    cache: TensorCache,
    options: EncodeOptions,
    progress: Callable[[int, int], None],
) -> list[CachedSample]:
    """Encode every training picture; whether the numbers are finite is for the caller to look at.

    Args:
        photos: in any order; the samples come in the same.
        backbone: encodes in batches of one bucket on a GPU, singly on the processor.
        cache: what it has of them is not made again.
        options: how they are encoded.
        progress: called with (pictures done, pictures in all).

    Raises:
        PictureError: a photo or its mask is gone, damaged, or not what it was when the folder was
            looked through.
    """
    tasks = [_task(photo, options) for photo in photos]
    made: dict[str, Tensor] = {}
    missing: list[_Task] = []
    done = 0
    settled = {""}  # entries that are there, or some task's already
    for task in tasks:
        _look_up(task, backbone, cache, made)
        settled |= {task.latents, task.weights} & made.keys()
        left = _left_to_do(task, settled)
        if left:
            missing.append(left)
            settled |= {left.latents, left.weights}
        else:
            done += 1
            progress(done, len(photos))
    missing.sort(key=lambda task: task.photo.bucket)
    batch = _batch_size(backbone)
    work = partial(_decode, backbone=backbone, options=options)
    ahead = options.workers + batch
    with closing(work_ahead(missing, work, workers=options.workers, ahead=ahead)) as decoded:
        for pictures in batches_of_alike(decoded, batch, lambda picture: picture.task.photo.bucket):
            _encode(pictures, backbone, cache, made)
            for _ in pictures:
                done += 1
                progress(done, len(photos))
    prompts = _encode_texts(photos, backbone, cache, options)
    return [_sample(task, made, prompts.get(task.photo.captioned.text, {})) for task in tasks]


@torch.no_grad()
def encode_text(
    text: str, backbone: Backbone, cache: TensorCache, options: EncodeOptions
) -> dict[str, Tensor]:
    """`prompt` [T, D] and, in families that have it, `pooled` [P], float32, of one caption."""
    entry = fingerprint("prompt", CACHE_FORMAT, options.text, text)

    def make() -> dict[str, Tensor]:
        prompts = backbone.encode_prompts([text]).kept()
        made = {"prompt": prompts.embeddings_BTD[0]}
        return made if prompts.pooled_BP is None else {**made, "pooled": prompts.pooled_BP[0]}

    shapes = {"prompt": [-1, backbone.facts.width]}
    if backbone.facts.pooled:
        shapes["pooled"] = [backbone.facts.pooled]
    return cache.get_or_make(entry, make, shapes=shapes, kind="prompt", source=text)


def _task(photo: Bucketed, options: EncodeOptions) -> _Task:
    """Names a picture's entries by all that their numbers depend on, and nothing else."""
    taken, variant = photo.captioned.photo, asdict(photo.variant)
    variant.pop("number")  # in the picture's key, where it decides the draw of the posterior
    place = [photo.bucket.width, photo.bucket.height, photo.left, photo.top]
    place += [photo.resized.width, photo.resized.height]
    latents = fingerprint(
        "latents",
        CACHE_FORMAT,
        options.vae,
        picture_key(photo),
        taken.digest,
        place,
        variant,
        options.background,
        *(["tiles"] if encodes_in_tiles(photo.bucket.width, photo.bucket.height) else []),
    )
    see_through = options.transparency == "mask"
    boxes = [asdict(face.box) for face in photo.faces] if options.face_weight != 1.0 else []
    if not (see_through or boxes or taken.mask):
        return _Task(photo, latents, "")
    weights = fingerprint(
        "weights",
        CACHE_FORMAT,
        taken.digest if see_through else "",
        taken.mask_digest,
        boxes,
        options.face_weight if boxes else 1.0,
        [taken.size.width, taken.size.height],
        place,
        photo.variant.flip,
    )
    return _Task(photo, latents, weights)


def _look_up(task: _Task, backbone: Backbone, cache: TensorCache, made: dict[str, Tensor]) -> None:
    """Take from the cache what it has of a picture."""
    shape = backbone.latent_shape(task.photo.bucket.width, task.photo.bucket.height)
    for name, kind, wanted in (
        (task.latents, "latents", shape),
        (task.weights, "weights", shape[1:]),
    ):
        if name and name not in made:
            found = cache.get(name, {kind: wanted})
            if found:
                made[name] = found[kind]


def _left_to_do(task: _Task, settled: set[str]) -> _Task | None:
    """The task without the entries that are settled; None if that is all of it."""
    latents = "" if task.latents in settled else task.latents
    weights = "" if task.weights in settled else task.weights
    return _Task(task.photo, latents, weights) if latents or weights else None


def _batch_size(backbone: Backbone) -> int:
    return 1 if backbone.device.type == "cpu" else GPU_BATCH


def _decode(task: _Task, backbone: Backbone, options: EncodeOptions) -> _Decoded:
    photo = task.photo
    picture = load_picture(
        photo,
        background=options.background,
        transparency=options.transparency,
        face_weight=options.face_weight,
    )
    # After it was decoded: what changes later is not in the picture.
    _require_unchanged(photo.captioned.photo)
    weights_hw = None
    if task.weights:
        _, height, width = backbone.latent_shape(photo.bucket.width, photo.bucket.height)
        weights_hw = torch.ones(height, width)
        if picture.weights_HW is not None:
            weights_hw = latent_weights(picture.weights_HW, height, width)
    return _Decoded(task, picture.pixels_CHW, weights_hw)


def _require_unchanged(photo: Photo) -> None:
    """Its entries would tell of the photo that was found, not of the one that is there now."""
    files = [(photo.path, photo.digest)]
    if photo.mask:
        files.append((photo.mask, photo.mask_digest))
    for path, digest in files:
        try:
            with path.open("rb") as file:
                unchanged = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            unchanged = False
        if not unchanged:
            raise PictureError(
                path, "changed while it was in use", "Leave the photos as they are and start again."
            )


def _encode(
    pictures: Sequence[_Decoded],
    backbone: Backbone,
    cache: TensorCache,
    made: dict[str, Tensor],
) -> None:
    """Encode pictures of one bucket and keep what they lack."""
    for picture in pictures:
        if picture.weights_hw is not None:
            _keep(picture.task, "weights", picture.weights_hw, cache, made)
    fresh = [picture for picture in pictures if picture.task.latents]
    if not fresh:
        return
    bucket = fresh[0].task.photo.bucket
    shape = backbone.latent_shape(bucket.width, bucket.height)
    # The draw of the posterior is a picture's own, whatever it is encoded beside.
    noise_BChw = torch.stack(
        [torch.randn(shape, generator=generator_of(picture_key(p.task.photo))) for p in fresh]
    )
    pixels_BCHW = torch.stack([picture.pixels_CHW for picture in fresh])
    latents_BChw = backbone.encode_pixels(pixels_BCHW, noise_BChw).float().cpu()
    for picture, latents_Chw in zip(fresh, latents_BChw, strict=True):
        _keep(picture.task, "latents", latents_Chw.clone(), cache, made)


def _keep(
    task: _Task,
    kind: Literal["latents", "weights"],
    tensor: Tensor,
    cache: TensorCache,
    made: dict[str, Tensor],
) -> None:
    name = task.latents if kind == "latents" else task.weights
    source = shown(task.photo.captioned.photo.path.name)
    if torch.isfinite(tensor).all():
        cache.put(name, {kind: tensor}, kind=kind, source=source)
    made[name] = tensor


def _encode_texts(
    photos: Sequence[Bucketed], backbone: Backbone, cache: TensorCache, options: EncodeOptions
) -> dict[str, dict[str, Tensor]]:
    """What `encode_text` makes by caption, each made once; nothing when they are not cached."""
    if not options.cache_prompts:
        return {}
    texts = dict.fromkeys(photo.captioned.text for photo in photos)
    return {text: encode_text(text, backbone, cache, options) for text in texts}


def _sample(task: _Task, made: dict[str, Tensor], prompt: dict[str, Tensor]) -> CachedSample:
    photo = task.photo
    weights_hw = made[task.weights] if task.weights else None
    if weights_hw is not None and bool((weights_hw == 1.0).all()):
        weights_hw = None
    return CachedSample(
        key=sample_key(photo),
        latents_Chw=made[task.latents],
        texts=photo.captioned.texts,
        prompt_TD=prompt.get("prompt"),
        weights_hw=weights_hw,
        pooled_P=prompt.get("pooled"),
        group=photo.group,
        repeats=photo.repeats,
        weight=photo.weight,
        sizes=photo.size_conditioning,
        set_name=photo.captioned.set_name,
    )
