"""The pipeline from end to end, second half: whole trainings on sets, masks, variants and a cache.

What is encoded anew, what each photo counts, which texts are read, and that a run which was
stopped goes on to the same bits with everything switched on at once.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import QUICK
from tests.runs import (
    Outcome,
    checkpoint_of,
    lora_of,
    metrics_of,
    run_cli,
    same_tensors,
    save_photos,
    tensors_of,
)
from trainer.data.cache_folder import list_entries
from trainer.diffusion import objective
from trainer.families.backbone import StableDiffusionBackbone
from trainer.training import learner
from trainer.training.learner import Learner
from trainer.types import Batch, CachedSample, Prompts

Train = Callable[..., Outcome]
ONE_STEP = ("run.total_steps=1", "adapter.text_encoder=false")


def losses_of(output: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(output)]


def blocks(seed: int, width: int = 48, height: int = 48) -> Image.Image:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(12, axis=0).repeat(12, axis=1))


def save_set(folder: Path, seeds: Sequence[int]) -> Path:
    """Square pictures without captions."""
    folder.mkdir(parents=True)
    for seed in seeds:
        blocks(seed).save(folder / f"{seed}.png")
    return folder


# --- what is encoded anew


def entries(cache: Path) -> dict[str, tuple[str, str, int]]:
    """Kind, source and time of writing of every entry, by its file's name."""
    return {
        entry.path.name: (entry.kind, entry.source, entry.path.stat().st_mtime_ns)
        for entry in list_entries(cache).entries
        if entry.kind not in ("hashes", "trial")
    }


@pytest.fixture(scope="module")
def encoded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A photo folder and the cache of a run on it; not to be written to."""
    home = tmp_path_factory.mktemp("encoded")
    folder = save_photos(home / "anna")
    Image.new("L", (48, 48), 255).save(folder / "2-mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIKENESS_CACHE", str(home / "cache"))
        words = [f"--set={word}" for word in (*QUICK, *ONE_STEP)]
        assert run_cli("train", folder, "--base", base, "--output", home / "out", *words) == 0
    return folder, home / "cache"


def edit_pixel(folder: Path, base: Path) -> None:
    with Image.open(folder / "1.png") as image:
        image.putpixel((50, 20), (1, 2, 3))
        image.save(folder / "1.png")


def edit_caption(folder: Path, base: Path) -> None:
    (folder / "0.txt").write_text("{trigger} {class}, grave", encoding="utf-8")


def edit_mask(folder: Path, base: Path) -> None:
    mask = Image.new("L", (48, 48), 255)
    mask.paste(0, (0, 0, 24, 48))
    mask.save(folder / "2-mask.png")


def edit_weight(part: str) -> Callable[[Path, Path], None]:
    def edit(folder: Path, base: Path) -> None:
        (file,) = (base / part).glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if name.endswith("weight"))
        tensors[name] = tensors[name] + 0.01
        save_file(tensors, file)

    return edit


def rename(folder: Path, base: Path) -> None:
    (folder / "1.png").rename(folder / "one.png")


def leave(folder: Path, base: Path) -> None:
    pass


ALL = ("0.png", "1.png", "2.png")


@pytest.mark.parametrize(
    ("edit", "settings", "latents", "others"),
    [
        (leave, (), (), {}),
        (rename, (), (), {}),
        (edit_pixel, (), ("1.png",), {"facts": 1}),
        (leave, ("data.resolution=48",), ALL, {"weights": 1}),
        (leave, ("data.resolution=[32, 48]",), ALL, {"weights": 1}),
        (leave, ("data.max_aspect=1",), ("1.png",), {}),
        (leave, ("data.flip=true",), ALL, {"weights": 1}),
        (leave, ("data.variants=1", "data.colour=0.3"), ALL, {}),
        # Which photos have transparent parts is known only once they are decoded.
        (leave, ("data.background=#102030",), ALL, {"facts": 3}),
        (edit_weight("vae"), (), ALL, {}),
        (edit_weight("text_encoder"), (), (), {"prompt": 2}),
        (edit_weight("unet"), (), (), {}),
        (edit_caption, (), (), {"prompt": 1}),
        (edit_mask, (), (), {"weights": 1}),
        (leave, ("data.masks=false", "run.seed=5", "adapter.rank=3"), (), {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_changed_is_encoded_anew_and_nothing_else(
    edit: Callable[[Path, Path], None],
    settings: tuple[str, ...],
    latents: tuple[str, ...],
    others: dict[str, int],
    encoded: tuple[Path, Path],
    base: Path,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, cache = tmp_path / "anna", tmp_path / "cache"
    shutil.copytree(encoded[0], folder)
    shutil.copytree(encoded[1], cache)
    own = shutil.copytree(base, tmp_path / "tiny")
    edit(folder, own)
    before = entries(cache)
    assert Counter(kind for kind, *_ in before.values()) == Counter(
        {"latents": 3, "weights": 1, "prompt": 2, "facts": 3}
    )
    monkeypatch.setenv("LIKENESS_CACHE", str(cache))
    train(*ONE_STEP, *settings, folder=folder, model=own).done()
    after = entries(cache)
    assert {name: after[name] for name in before} == before
    new = [after[name] for name in after.keys() - before.keys()]
    assert sorted(source for kind, source, _ in new if kind == "latents") == list(latents)
    assert Counter(kind for kind, *_ in new if kind != "latents") == Counter(others)


# --- what each photo counts


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, Batch | None]]:
    """The batches that runs train on, photos and class pictures, in their order."""
    taken: list[tuple[Batch, Batch | None]] = []
    plain = Learner.loss

    def loss(self: Learner, index: int) -> Tensor:
        prior = self.prior.batch(index) if self.prior else None
        taken.append((self.batches.batch(index), prior))
        return plain(self, index)

    monkeypatch.setattr(Learner, "loss", loss)
    return taken


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that the text encoder is given."""
    read: list[str] = []
    plain = StableDiffusionBackbone.encode_prompts

    def encode_prompts(self: StableDiffusionBackbone, words: Sequence[str]) -> Prompts:
        read.extend(words)
        return plain(self, words)

    monkeypatch.setattr(StableDiffusionBackbone, "encode_prompts", encode_prompts)
    return read


Batches = list[tuple[Batch, Batch | None]]


def samples(batches: Batches) -> list[CachedSample]:
    return [sample for batch, _ in batches for sample in batch.samples]


def test_a_folder_of_kohyas_kind(
    train: Train, batches: Batches, texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "anna"
    save_set(folder / "3_zqx avatar", [1, 2])
    save_set(folder / "1_wvu hat", [3])
    words = ("run.total_steps=1", "data.batch_size=7", "data.cache=false")  # one epoch
    outcome = train(*words, folder=folder).done()
    assert "7 pictures a round (epoch)" in outcome.out
    seen = Counter((sample.set_name, sample.text) for sample in samples(batches))
    assert seen == {("3_zqx avatar", "zqx avatar"): 6, ("1_wvu hat", "wvu hat"): 1}
    assert set(texts) - {""} == {"zqx avatar", "wvu hat"}
    batches.clear()
    named = ("caption.trigger=ohwx", "caption.class_noun=person", "--overwrite")
    train(*words, *named, folder=folder).done()
    assert {sample.text for sample in samples(batches)} == {"ohwx person"}


def sets_file(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return f"--config={path}"


def test_sets_are_balanced_by_their_weights(train: Train, batches: Batches, tmp_path: Path) -> None:
    """Five photos beside two, at shares of one to three."""
    folder = save_set(tmp_path / "anna", range(5))
    save_set(tmp_path / "more", [10, 11])
    config = sets_file(
        tmp_path / "run.toml",
        "[data]\nweight = 1\n"
        "[[data.sets]]\nfolder = 'more'\nweight = 3\ntrigger = 'wvu'\nclass_noun = 'hat'\n",
    )
    outcome = train("run.total_steps=1", "data.batch_size=21", config, folder=folder).done()
    assert "more: 2 photos x 8 repeats = 16 pictures; together 21 pictures" in outcome.out
    epoch = samples(batches)
    shares: dict[str, float] = defaultdict(float)
    for sample in epoch:
        shares[sample.set_name] += sample.weight
    assert shares["more"] / shares["anna"] == pytest.approx(3, rel=1e-6)
    assert sum(shares.values()) / len(epoch) == pytest.approx(1, rel=1e-6)
    assert {sample.text for sample in epoch} == {"ohwx person", "wvu hat"}
    counts = Counter(sample.key for sample in epoch)
    assert sorted(counts.values()) == [1] * 5 + [8] * 2


def test_a_class_set_takes_the_place_of_drawn_pictures(
    train: Train, batches: Batches, texts: list[str], tmp_path: Path
) -> None:
    folder = save_set(tmp_path / "anna", [1, 2])
    people = save_set(tmp_path / "people", [10, 11, 12])
    (people / "10.txt").write_text("a person by the sea", encoding="utf-8")
    sets = f"data.sets=[{{folder='{people.as_posix()}', role='class'}}]"
    outcome = train(sets, "data.cache=false", folder=folder).done()
    assert "drawn by the base" not in outcome.out
    priors = [prior for _, prior in batches if prior is not None]
    assert len(priors) == len(batches) == 4
    digests = {sample.key.split("/")[0] for prior in priors for sample in prior.samples}
    assert len(digests) == 3
    assert {sample.set_name for prior in priors for sample in prior.samples} == {"people"}
    assert {sample.set_name for sample in samples(batches)} == {"anna"}
    assert set(texts) - {""} == {"ohwx person", "person", "a person by the sea"}
    without = train(folder=folder, output=tmp_path / "without").done()
    assert "people" not in without.out
    assert losses_of(tmp_path / "out") != losses_of(tmp_path / "without")


# --- masks


@pytest.fixture
def unweighted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Where a latent does not count, [B, h, w], at each loss of a run.

    On the way it is proved: nothing that is predicted there moves the loss by a bit, and whatever
    is predicted elsewhere does.
    """
    seen: list[Tensor] = []
    plain = objective.diffusion_loss

    def diffusion_loss(predicted: Tensor, target: Tensor, *others: Any) -> Tensor:
        result: Tensor = plain(predicted, target, *others)
        weights_Bhw = others[-1]
        assert weights_Bhw is not None
        without_Bhw = weights_Bhw == 0
        seen.append(without_Bhw)
        there, elsewhere = (1000.0 * where[:, None] for where in (without_Bhw, ~without_Bhw))
        assert torch.equal(plain(predicted + there, target, *others), result)
        assert (plain(predicted + elsewhere, target, *others) > 10 * result).all()
        return result

    monkeypatch.setattr(learner, "diffusion_loss", diffusion_loss)
    return seen


def left_half_masked(folder: Path) -> Path:
    save_set(folder, [1])
    mask = Image.new("L", (48, 48), 255)
    mask.paste(0, (0, 0, 24, 48))
    mask.save(folder / "1-mask.png")
    return folder


def test_what_is_masked_does_not_count(
    train: Train, unweighted: list[Tensor], tmp_path: Path
) -> None:
    folder = left_half_masked(tmp_path / "anna")
    train("data.batch_size=1", "data.flip=true", folder=folder).done()
    # 8 latents across: as the photo is, and as its mirror image, in turn.
    sides = [tuple(without_Bhw[0].all(dim=0).tolist()) for without_Bhw in unweighted]
    left = (*[True] * 4, *[False] * 4)
    assert Counter(sides) == {left: 2, left[::-1]: 2}


def test_a_mask_changes_what_is_learned(train: Train, tmp_path: Path) -> None:
    folder = left_half_masked(tmp_path / "anna")
    for name, masks in (("with", "true"), ("without", "false")):
        train(
            f"data.masks={masks}", "run.total_steps=1", folder=folder, output=tmp_path / name
        ).done()
    assert losses_of(tmp_path / "with")[0] != losses_of(tmp_path / "without")[0]


def test_transparent_parts_may_be_left_out(train: Train, batches: Batches, tmp_path: Path) -> None:
    folder = save_set(tmp_path / "anna", [1])
    picture = blocks(2).convert("RGBA")
    visible = Image.new("L", (48, 48))
    visible.paste(255, (0, 24, 48, 48))
    picture.putalpha(visible)
    picture.save(folder / "2.png")
    for transparency in ("background", "mask"):
        output = tmp_path / transparency
        words = (f"data.transparency={transparency}", "run.total_steps=2", "data.batch_size=1")
        train(*words, folder=folder, output=output).done()
    half = len(batches) // 2
    assert all(batch.weights_Bhw is None for batch, _ in batches[:half])
    weighed = [s.weights_hw for s in samples(batches[half:]) if s.weights_hw is not None]
    assert len(weighed) == 1  # of two photos
    for weights_hw in weighed:
        assert weights_hw[:4].abs().max() == 0 < weights_hw[4:].min()
        assert float(weights_hw.mean()) == pytest.approx(1)
    assert losses_of(tmp_path / "mask") != losses_of(tmp_path / "background")


# --- the texts

SIDECARS = {
    "0": "a portrait, smiling, red scarf",
    "1": "zqx person, zqx with a hat, zqx",
    "2": "{trigger} {class}, at the {sea|lake}, {zqx smiling|grave}",
    "3": "first line, tag\nsecond line of {trigger}, tag, tag\nZQX third",
    "4": "",
    "5": "zqxy and prezqx are other words, zqx's coat",
}
STIRRED = (
    "caption.trigger=zqx",
    "caption.shuffle_tags=true",
    "caption.keep_tags=0",
    "caption.tag_dropout=0.4",
    "caption.wildcards=true",
    "caption.several_lines=true",
    "caption.prefix=photo of {trigger}",
    "caption.suffix={new|old} style, zqx",
)
FROM_NAMES = ("caption.captioner=filename", "caption.trigger=zqx", "caption.dropout=0.3")


def save_captioned(folder: Path) -> Path:
    save_set(folder, range(8))
    for stem, text in SIDECARS.items():
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("further", "trained"),
    [
        (STIRRED, "true"),
        (FROM_NAMES, "false"),
        pytest.param((), "true", marks=pytest.mark.slow),
        pytest.param((), "false", marks=pytest.mark.slow),
        pytest.param(STIRRED, "false", marks=pytest.mark.slow),
        pytest.param(FROM_NAMES, "true", marks=pytest.mark.slow),
    ],
)
def test_every_text_that_is_read_names_the_trigger_once(
    further: tuple[str, ...], trained: str, train: Train, texts: list[str], tmp_path: Path
) -> None:
    folder = save_captioned(tmp_path / "anna")
    # Without a cache: what an earlier run has read is read again.
    words = (f"adapter.text_encoder={trained}", "data.cache=false", "data.batch_size=8")
    train(*words, "run.total_steps=5", "caption.trigger=zqx", *further, folder=folder).done()
    read = set(texts) - {""}  # what is trained without its caption is the empty text
    assert len(read) > (8 if further == STIRRED else 3)
    for text in read:
        assert len(re.findall(r"(?<!\w)zqx(?!\w)", text, re.IGNORECASE)) == 1, text
        assert "{" not in text or further != STIRRED


# --- everything at once

EVERYTHING = (
    *STIRRED,
    "caption.dropout=0.1",
    "data.resolution=[32, 48]",
    "data.variants=2",
    "data.zoom=0.2",
    "data.shift=0.5",
    "data.colour=0.2",
    "data.flip=true",
    "data.transparency=mask",
    "data.batch_size=3",
    "optimizer.accumulate_steps=2",
    "objective.noise_offset=0.1",
    "run.total_steps=20",
    "run.save_every_steps=7",
    "adapter.save_precision=fp32",
)


@pytest.mark.slow
def test_with_everything_switched_on_ten_steps_and_ten_more_are_twenty(
    train: Train, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_captioned(tmp_path / "sets" / "2_zqx person")
    left_half_masked(folder / "masked")
    for path in (folder / "masked").iterdir():
        path.rename(folder / f"m{path.name}")
    (folder / "masked").rmdir()
    blocks(20, 96, 60).convert("RGBA").save(folder / "wide.png")
    save_set(tmp_path / "people", [30, 31, 32])
    save_set(tmp_path / "more", [40, 41])
    config = sets_file(
        tmp_path / "run.toml",
        "[data]\nweight = 1\n"
        "[[data.sets]]\nfolder = 'more'\nweight = 2\ntrigger = 'wvu'\nflip = false\n"
        "[[data.sets]]\nfolder = 'people'\nrole = 'class'\n",
    )
    source = folder.parent
    train(*EVERYTHING, config, folder=source, output=tmp_path / "whole").done()
    variants = {sample.key.partition("@")[2] for sample in samples(batches)}
    assert {"32", "48", "32+flip", "48+1+flip"} <= {name.split("/")[0] for name in variants}
    words = (*EVERYTHING, "run.stop_at_step=10", config)
    train(*words, folder=source, output=tmp_path / "parts").done()
    # Everything is encoded anew, to the same numbers.
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "another cache"))
    resumed = train("--resume", config, folder=source, output=tmp_path / "parts").done()
    assert "Going on from step 10." in resumed.out
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert lora_of(whole).name == lora_of(parts).name
    assert same_tensors(tensors_of(whole), tensors_of(parts))
    assert same_tensors(checkpoint_of(whole, 20), checkpoint_of(parts, 20))
    assert losses_of(whole) == losses_of(parts)
    assert len(set(losses_of(whole))) == 20
