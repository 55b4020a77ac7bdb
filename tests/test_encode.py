"""Encoding: what changes is made again and nothing else, in any order, and failures are named."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.data.cache import TensorCache
from trainer.data.cache_folder import list_entries
from trainer.data.decode import PictureError
from trainer.data.pixels import TrainingPicture, load_picture
from trainer.diffusion.noise import generator_of
from trainer.errors import DeviceError
from trainer.families import Backbone, LoadOptions
from trainer.families.detect import inspect_base
from trainer.families.sd1 import FAMILY
from trainer.training import encode, prior
from trainer.training.encode import EncodeOptions, encode_photos
from trainer.training.finite import only_finite
from trainer.training.prior import PriorOptions, draw_prior
from trainer.types import Box, Bucketed, CachedSample, Captioned, Face, Photo, Size, Variant

OPTIONS = EncodeOptions(
    vae="vae",
    text="text",
    background=(255, 255, 255),
    transparency="mask",
    face_weight=2.0,
    cache_prompts=True,
    workers=2,
)
FACE = Face(Box(8, 8, 24, 24), 0.9)


@dataclass
class Watched:
    """A backbone whose VAE says what it is given: the shape of every batch."""

    backbone: Backbone
    batches: list[tuple[int, ...]]

    @property
    def encoded(self) -> int:
        return sum(shape[0] for shape in self.batches)


@pytest.fixture(scope="module")
def loaded(base: Path) -> Backbone:
    options = LoadOptions(torch.device("cpu"), torch.float32, "sdpa")
    return FAMILY.load(inspect_base(base), options)


@pytest.fixture
def watched(loaded: Backbone, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(loaded, [])
    plain = loaded.encode_pixels

    def encode_pixels(pixels_BCHW: Tensor, noise_BChw: Tensor) -> Tensor:
        watched.batches.append(tuple(pixels_BCHW.shape))
        return plain(pixels_BCHW, noise_BChw)

    monkeypatch.setattr(loaded, "encode_pixels", encode_pixels)
    return watched


def blocks(seed: int, channels: int = 3, side: int = 48) -> Image.Image:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (side // 8, side // 8, channels), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, axis=0).repeat(8, axis=1).squeeze())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def place(path: Path, *, text: str = "ohwx", mask: Path | None = None, **more: Any) -> Bucketed:
    with Image.open(path) as image:
        size = Size(*image.size)
    photo = Photo(path, size, sha256(path), mask, sha256(mask) if mask else "")
    bucket = more.pop("bucket", Size(32, 32))
    resized = more.pop("resized", Size(40, 40))
    return Bucketed(Captioned(photo, (text,), "sidecar"), bucket, resized, 4, 4, **more)


def three(folder: Path) -> list[Bucketed]:
    """A photo with transparency, one with a mask, one with a face; two captions."""
    folder.mkdir(exist_ok=True)
    blocks(0, channels=4).save(folder / "a.png")
    blocks(1).save(folder / "b.png")
    blocks(2, channels=1).save(folder / "b-mask.png")
    blocks(3).save(folder / "c.png")
    return [
        place(folder / "a.png"),
        place(folder / "b.png", mask=folder / "b-mask.png"),
        place(folder / "c.png", text="ohwx, smiling", faces=(FACE,)),
    ]


def many(folder: Path, count: int) -> list[Bucketed]:
    for number in range(count):
        blocks(number).save(folder / f"{number:03}.png")
    shapes = [Size(32, 32), Size(40, 24)]
    return [
        place(folder / f"{number:03}.png", bucket=shapes[number % 2], resized=Size(48, 48))
        for number in range(count)
    ]


def run(
    photos: Sequence[Bucketed],
    watched: Watched,
    cache: TensorCache | None = None,
    options: EncodeOptions = OPTIONS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CachedSample]:
    return encode_photos(photos, watched.backbone, cache or TensorCache(None), options, progress)


def same(one: Sequence[CachedSample], other: Sequence[CachedSample]) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))

    return len(one) == len(other) and all(
        a.key == b.key
        and equal(a.latents_Chw, b.latents_Chw)
        and equal(a.prompt_TD, b.prompt_TD)
        and equal(a.weights_hw, b.weights_hw)
        for a, b in zip(one, other, strict=True)
    )


# --- what is made again


def edit_pixel(path: Path) -> None:
    with Image.open(path) as image:
        image.putpixel((20, 20), (1, 2, 3, 255) if image.mode == "RGBA" else (1, 2, 3))
        image.save(path)


def edited(number: int) -> Callable[[list[Bucketed]], list[Bucketed]]:
    def change(photos: list[Bucketed]) -> list[Bucketed]:
        photo = photos[number].captioned.photo
        edit_pixel(photo.path)
        return changed(number, digest=sha256(photo.path))(photos)

    return change


def changed(number: int, **values: Any) -> Callable[[list[Bucketed]], list[Bucketed]]:
    """One training picture with other values, of its own, its caption's or its photo's."""

    def change(photos: list[Bucketed]) -> list[Bucketed]:
        old = photos[number]
        if "digest" in values:
            photo = replace(old.captioned.photo, **values)
            new = replace(old, captioned=replace(old.captioned, photo=photo))
        elif "texts" in values:
            new = replace(old, captioned=replace(old.captioned, **values))
        else:
            new = replace(old, **values)
        return [*photos[:number], new, *photos[number + 1 :]]

    return change


def other_mask(photos: list[Bucketed]) -> list[Bucketed]:
    mask = photos[1].captioned.photo.mask
    assert mask is not None
    blocks(9, channels=1).save(mask)
    return [photos[0], place(photos[1].captioned.photo.path, mask=mask), photos[2]]


def larger(photos: list[Bucketed]) -> list[Bucketed]:
    return [replace(photo, bucket=Size(40, 40), left=0, top=0) for photo in photos]


def as_they_are(photos: list[Bucketed]) -> list[Bucketed]:
    return photos


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (as_they_are, {}, {}),
        (edited(0), {}, {"latents": 1, "weights": 1}),
        (edited(2), {}, {"latents": 1, "weights": 1}),
        (larger, {}, {"latents": 3, "weights": 3}),
        (changed(1, left=5), {}, {"latents": 1, "weights": 1}),
        (changed(1, resized=Size(41, 40)), {}, {"latents": 1, "weights": 1}),
        (changed(1, variant=Variant(flip=True)), {}, {"latents": 1, "weights": 1}),
        (changed(1, variant=Variant(1, brightness=1.1)), {}, {"latents": 1}),
        (changed(1, variant=Variant(1, contrast=1.1)), {}, {"latents": 1}),
        (changed(1, variant=Variant(1, saturation=1.1)), {}, {"latents": 1}),
        (other_mask, {}, {"weights": 1}),
        (changed(2, faces=(replace(FACE, box=Box(0, 0, 9, 9)),)), {}, {"weights": 1}),
        (changed(2, faces=(replace(FACE, score=0.8),)), {}, {}),
        (changed(2, texts=("ohwx, grave",)), {}, {"prompt": 1}),
        (changed(2, repeats=3, weight=0.5), {}, {}),
        (as_they_are, {"vae": "other"}, {"latents": 3}),
        (as_they_are, {"text": "other"}, {"prompt": 2}),
        (as_they_are, {"background": (0, 0, 0)}, {"latents": 3}),
        (as_they_are, {"face_weight": 3.0}, {"weights": 1}),
        (as_they_are, {"face_weight": 1.0}, {"weights": 1}),
        # Without transparency the weights of a mask and of a face do not depend on the photo.
        (as_they_are, {"transparency": "background"}, {"weights": 2}),
        (as_they_are, {"workers": 5, "cache_prompts": False}, {}),
    ],
)
def test_what_changed_is_made_again_and_nothing_else(
    change: Callable[[list[Bucketed]], list[Bucketed]],
    options: dict[str, Any],
    expected: dict[str, int],
    watched: Watched,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "cache"
    photos = three(tmp_path / "photos")
    run(photos, watched, TensorCache(folder))
    before = list_entries(folder).entries
    assert Counter(entry.kind for entry in before) == {"latents": 3, "weights": 3, "prompt": 2}
    watched.batches.clear()

    cache = TensorCache(folder)
    photos, chosen = change(photos), replace(OPTIONS, **options)
    samples = run(photos, watched, cache, chosen)
    after = list_entries(folder).entries
    assert Counter(e.kind for e in after) - Counter(e.kind for e in before) == expected
    assert {entry.path for entry in before} <= {entry.path for entry in after}
    assert watched.encoded == expected.get("latents", 0)
    assert cache.misses == sum(expected.values())
    assert same(samples, run(photos, watched, None, chosen))  # as without any cache


def test_an_edit_leaves_the_weights_of_a_mask(watched: Watched, tmp_path: Path) -> None:
    photos = three(tmp_path / "photos")
    options = replace(OPTIONS, transparency="background")
    run(photos, watched, TensorCache(tmp_path / "cache"), options)
    run(edited(1)(photos), watched, TensorCache(tmp_path / "cache"), options)
    kinds = Counter(entry.kind for entry in list_entries(tmp_path / "cache").entries)
    assert kinds == {"latents": 4, "weights": 2, "prompt": 2}


def test_damaged_and_unfit_entries_are_made_again(watched: Watched, tmp_path: Path) -> None:
    photos, folder = three(tmp_path / "photos"), tmp_path / "cache"
    expected = run(photos, watched, TensorCache(folder))
    draw = random.Random(0)
    for entry in list_entries(folder).entries:
        whole = entry.path.read_bytes()
        place_ = draw.randrange(len(whole) // 2, len(whole))
        entry.path.write_bytes(whole[:place_] + bytes([whole[place_] ^ 8]) + whole[place_ + 1 :])
    assert same(run(photos, watched, TensorCache(folder)), expected)
    assert watched.encoded == 6
    for unfit in (torch.zeros(1), torch.zeros(4, 9, 8), torch.full((4, 8, 8), float("nan"))):
        for entry in list_entries(folder).entries:
            key, kind = entry.path.stem, entry.kind
            TensorCache(folder).put(key, {kind: unfit}, kind=kind)
        assert same(run(photos, watched, TensorCache(folder)), expected)
    assert watched.encoded == 15
    assert same(run(photos, watched, TensorCache(folder)), expected)
    assert watched.encoded == 15


# --- what comes out


def test_samples_carry_what_the_training_needs(watched: Watched, tmp_path: Path) -> None:
    blocks(0).save(tmp_path / "a.png")
    photo = place(tmp_path / "a.png", group="g", repeats=4, weight=0.25)
    captioned = replace(photo.captioned, texts=("one", "two"), set_name="anna")
    photo = replace(photo, captioned=captioned)
    [sample] = run([photo], watched)
    assert (sample.texts, sample.set_name) == (("one", "two"), "anna")
    assert (sample.key, sample.group, sample.repeats, sample.weight) == ("g", "g", 4, 0.25)
    assert sample.sizes == (48, 48, 4, 4, 32, 32)
    # An opaque photo without mask or face: all latents weigh alike, though transparency matters.
    assert sample.weights_hw is None
    assert sample.latents_Chw.shape == (4, 8, 8)
    assert sample.prompt_TD is not None
    prompts = watched.backbone.encode_prompts(["one"])
    assert torch.equal(sample.prompt_TD, prompts.embeddings_BTD[0].detach())
    assert sample.pooled_P is None
    [bare] = run([photo], watched, options=replace(OPTIONS, cache_prompts=False))
    assert bare.prompt_TD is None
    assert torch.equal(bare.latents_Chw, sample.latents_Chw)


def test_latents_are_drawn_by_the_samples_key(watched: Watched, tmp_path: Path) -> None:
    """The plain photo's numbers follow from its digest, as in every version of the program."""
    blocks(0).save(tmp_path / "a.png")
    photo = place(tmp_path / "a.png")
    [sample] = run([photo], watched)
    noise = torch.randn((4, 8, 8), generator=generator_of(photo.captioned.photo.digest))
    pixels = load_picture(photo).pixels_CHW
    with torch.no_grad():
        expected = watched.backbone.encode_pixels(pixels[None], noise[None])[0]
    assert sample.key == photo.captioned.photo.digest
    assert torch.equal(sample.latents_Chw, expected)
    assert not sample.latents_Chw.requires_grad


def test_weights_have_a_mean_of_one(watched: Watched, tmp_path: Path) -> None:
    samples = run(three(tmp_path / "photos"), watched)
    for sample in samples:
        assert sample.weights_hw is not None
        assert sample.weights_hw.shape == (8, 8)
        assert sample.weights_hw.mean().item() == pytest.approx(1.0)
        assert sample.weights_hw.std() > 0.05


def test_order_and_threads_change_nothing(watched: Watched, tmp_path: Path) -> None:
    photos = many(tmp_path, 9)
    expected = run(photos, watched)
    assert [sample.key for sample in expected] == [p.captioned.photo.digest for p in photos]
    assert {shape[0] for shape in watched.batches} == {1}  # on the processor
    order = random.Random(0).sample(range(9), 9)
    for workers in (1, 7):
        options = replace(OPTIONS, workers=workers)
        shuffled = run([photos[n] for n in order], watched, options=options)
        assert same(shuffled, [expected[n] for n in order])


def test_a_gpu_gets_batches_of_one_bucket(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = many(tmp_path, 9)
    singly = run(photos, watched)
    watched.batches.clear()
    monkeypatch.setattr(encode, "_batch_size", lambda _: encode.GPU_BATCH)
    together = run(photos, watched)
    assert Counter(watched.batches) == {(4, 3, 32, 32): 1, (1, 3, 32, 32): 1, (4, 3, 24, 40): 1}
    for one, other in zip(singly, together, strict=True):
        assert one.key == other.key
        assert torch.allclose(one.latents_Chw, other.latents_Chw, atol=1e-5)


def test_a_picture_that_comes_twice_is_encoded_once(watched: Watched, tmp_path: Path) -> None:
    photos = three(tmp_path / "photos")
    calls: list[tuple[int, int]] = []
    samples = run([*photos, *photos], watched, progress=lambda *now: calls.append(now))
    assert same(samples[:3], samples[3:])
    assert watched.encoded == 3
    assert calls == [(done, 6) for done in range(1, 7)]


def test_progress_counts_every_picture(watched: Watched, tmp_path: Path) -> None:
    photos, cache = many(tmp_path, 6), TensorCache(None)
    run(photos[:2], watched, cache)
    calls: list[tuple[int, int]] = []
    run(photos, watched, cache, progress=lambda *now: calls.append(now))
    assert calls == [(done, 6) for done in range(1, 7)]
    assert run([], watched) == []


# --- what fails


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the photos that were decoded, in order."""
    names: list[str] = []

    def load(bucketed: Bucketed, **options: Any) -> TrainingPicture:
        names.append(bucketed.captioned.photo.path.name)
        return load_picture(bucketed, **options)

    monkeypatch.setattr(encode, "load_picture", load)
    return names


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_a_photo_that_is_gone_is_named_and_the_rest_is_dropped(
    watched: Watched, tmp_path: Path, decoded: list[str]
) -> None:
    photos = many(tmp_path, 40)
    (tmp_path / "001.png").unlink()
    with pytest.raises(PictureError, match=r"001\.png is gone") as caught:
        run(photos, watched)
    assert str(tmp_path / "001.png") in str(caught.value)
    assert len(decoded) < 25


@pytest.mark.parametrize("name", ["b.png", "b-mask.png"])
def test_a_file_that_changed_since_the_scan_is_never_cached(
    name: str, watched: Watched, tmp_path: Path
) -> None:
    """Its entry would go by the hash of what was there before."""
    photos = three(tmp_path / "photos")
    file = tmp_path / "photos" / name
    blocks(77, channels=1 if "mask" in name else 3).save(file)
    with pytest.raises(PictureError, match="changed while it was in use") as caught:
        run(photos[1:2], watched, TensorCache(tmp_path / "cache"))
    assert str(file) in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_ctrl_c_stops_the_threads_and_keeps_what_is_done(
    watched: Watched, tmp_path: Path, decoded: list[str]
) -> None:
    photos, cache = many(tmp_path, 40), TensorCache(None)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(photos, watched, cache, progress=stop)
    assert len(decoded) < 12
    watched.batches.clear()
    run(photos, watched, cache)
    assert watched.encoded == 37


def test_few_pictures_wait_in_memory(watched: Watched, tmp_path: Path, decoded: list[str]) -> None:
    waiting = []
    run(
        many(tmp_path, 30),
        watched,
        options=replace(OPTIONS, workers=3),
        progress=lambda done, _: waiting.append(len(decoded) - done),
    )
    assert max(waiting) <= 3 + 1 + 1


def test_numbers_that_are_none_are_said_and_not_kept(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 is too narrow for some VAEs."""
    photos = many(tmp_path, 2)
    nothing = torch.full((1, 4, 8, 8), float("nan"))
    monkeypatch.setattr(watched.backbone, "encode_pixels", lambda *_: nothing)
    cache = TensorCache(tmp_path / "cache")
    samples = run(photos, watched, cache)
    with pytest.raises(DeviceError, match=r"cannot encode 2 of the photos") as caught:
        only_finite(photos, samples, skip_bad=True, say=print)
    assert "model.precision=fp32" in str(caught.value)
    assert "000.png: its latents" in str(caught.value)
    assert "latents" not in {entry.kind for entry in list_entries(tmp_path / "cache").entries}


# --- pictures of the class


def test_class_pictures_are_drawn_once_for_each_base(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(backbone: Backbone, texts: Sequence[str], seeds: Sequence[int], **_: Any) -> Tensor:
        drawn.append(list(texts))
        return torch.stack([torch.full((4, 8, 8), seed % 97 + 1.0) for seed in seeds])

    monkeypatch.setattr(prior, "draw_latents", draw)
    options = PriorOptions("base", ("a person", "a face"), 9, Size(32, 32), 2, 5.0, 0)

    def sample(options: PriorOptions = options, encoding: EncodeOptions = OPTIONS) -> list[Any]:
        cache = TensorCache(tmp_path)
        return draw_prior(watched.backbone, cache, options, encoding, lambda *_: None)

    first = sample()
    assert [len(texts) for texts in drawn] == [8, 1]
    assert [s.texts for s in first[:3]] == [("a person",), ("a face",), ("a person",)]
    assert first[0].sizes == (32, 32, 0, 0, 32, 32)
    assert first[8].key == "prior-8"
    assert same(sample(), first)
    assert same(sample(encoding=replace(OPTIONS, vae="other")), first)
    assert len(drawn) == 2
    for change in ({"base": "b"}, {"seed": 1}, {"sampling_steps": 3}, {"guidance_scale": 4.0}):
        drawn.clear()
        sample(replace(options, **change))
        assert len(drawn) == 2
    kinds = Counter(entry.kind for entry in list_entries(tmp_path).entries)
    assert kinds == {"prior": 10, "prompt": 2}
