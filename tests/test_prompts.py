"""Prompts of every family: chunks, padding, layers and pooled embeddings, against diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.learners import load_backbone
from tests.tiny import TINY_BASES, save_tiny, tiny_tokenizer
from trainer.errors import ModelError
from trainer.families import Backbone
from trainer.families.prompts import open_tokenizer, token_ids
from trainer.training.embeddings import filled, together, with_dropped
from trainer.training.preview import draw_latents
from trainer.types import Prompts, Size

FAMILIES = ("sd1", "sd2-v", "sdxl")
A_CHUNK, B_CHUNK = "a" * 75, "b" * 75

Loader = Callable[..., Backbone]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    return {name: save_tiny(home / name, name) for name in TINY_BASES}


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Loader:
    """`load("sdxl", prompt_chunks=3)`: a backbone, each loaded once."""
    loaded: dict[str, Backbone] = {}

    def call(name: str, **options: Any) -> Backbone:
        key = f"{name} {options}"
        if key not in loaded:
            loaded[key] = load_backbone(folders[name], **options)
        return loaded[key]

    return call


def plain_pipeline(folder: Path) -> Any:
    """What a person without this program would load."""
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encoded(backbone: Backbone, *texts: str) -> Prompts:
    return backbone.encode_prompts(texts)


def same(one: Prompts, other: Prompts) -> bool:
    """Equal but for rounding, which is another in a batch of another size."""

    def close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)

    return close(one.embeddings_BTD, other.embeddings_BTD) and close(one.pooled_BP, other.pooled_BP)


# --- one chunk


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_what_a_plain_pipeline_makes_of_them(
    name: str, folders: dict[str, Path], load: Loader
) -> None:
    texts = ["a photo of zqx, smiling", "", "b " * 30]
    pipeline = plain_pipeline(folders[name])
    with torch.no_grad():
        theirs = pipeline.encode_prompt(
            texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    ours = encoded(load(name), *texts)
    assert torch.equal(ours.embeddings_BTD, theirs[0])
    if name == "sdxl":
        assert ours.pooled_BP is not None
        assert torch.equal(ours.pooled_BP, theirs[2])
        assert ours.embeddings_BTD.shape == (3, 77, 40)
        assert ours.pooled_BP.shape == (3, load(name).facts.pooled) == (3, 24)
    else:
        assert ours.pooled_BP is None
        assert load(name).facts.pooled == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_those_of_a_plain_pipeline(
    name: str, folders: dict[str, Path], load: Loader
) -> None:
    options = {"width": 40, "height": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    with torch.no_grad():
        theirs = plain_pipeline(folders[name])(
            prompt=["a", "b c"],
            negative_prompt=["bad", ""],
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            output_type="latent",
            **options,
        ).images
    ours = draw_latents(
        load(name),
        ["a", "b c"],
        [1, 2],
        size=Size(40, 32),
        steps=2,
        guidance=3.0,
        negatives=["bad", ""],
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("saved", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_an_exclamation_mark_stays_a_word(pad_token: str, saved: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, pad_token=pad_token)
    if saved:
        tokenizer.save_pretrained(tmp_path / "saved")
    opened = open_tokenizer(tmp_path / "saved" if saved else tmp_path)
    [[ids]] = token_ids(opened, ["a! b"], length=8, chunks=1, pad=0).tolist()
    # "a", "!" and "b" at the end of a word, between start and end.
    assert ids == [512, 320, 256, 321, 513, 0, 0, 0]


# --- several chunks


def test_tokens_are_cut_into_chunks_with_a_start_and_an_end_each(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    ids = token_ids(tokenizer, ["abcdefg", "h", ""], length=5, chunks=2, pad=513)
    a = tokenizer("a").input_ids[1] - 256  # as it stands inside a word
    inside = [a + number for number in range(7)]
    assert ids.tolist() == [
        [[512, *inside[0:3], 513], [512, *inside[3:6], 513]],  # the seventh has no room
        [[512, inside[0] + 256 + 7, 513, 513, 513], [512, 513, 513, 513, 513]],
        [[512, 513, 513, 513, 513], [512, 513, 513, 513, 513]],
    ]
    assert token_ids(tokenizer, ["h"], length=5, chunks=3, pad=0).shape == (1, 1, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_long_prompts_are_chunks_one_after_the_other(name: str, load: Loader) -> None:
    backbone = load(name, prompt_chunks=3)
    both = encoded(backbone, f"{A_CHUNK} {B_CHUNK}")
    first, second = (encoded(load(name), text) for text in (A_CHUNK, B_CHUNK))
    joined = torch.cat([first.embeddings_BTD, second.embeddings_BTD], dim=1)
    assert both.embeddings_BTD.shape == joined.shape == (1, 154, load(name).facts.width)
    assert same(both, Prompts(joined, first.pooled_BP))
    most = encoded(backbone, "a" * 300)
    assert most.embeddings_BTD.shape[1] == 231
    assert same(most, encoded(backbone, "a" * 225 + "c"))
    assert encoded(load(name), f"{A_CHUNK} {B_CHUNK}").embeddings_BTD.shape[1] == 77


@pytest.mark.parametrize("name", FAMILIES)
def test_short_prompts_beside_long_ones_are_filled_with_empty_chunks(
    name: str, load: Loader
) -> None:
    backbone = load(name, prompt_chunks=3)
    texts = (f"{A_CHUNK} {B_CHUNK}", "a", "")
    batch = encoded(backbone, *texts)
    empty = encoded(backbone, "")
    one_by_one = together([encoded(backbone, text) for text in texts], empty)
    assert same(batch, one_by_one)
    assert same(filled(empty, 154, empty), Prompts(batch.embeddings_BTD[2:], empty.pooled_BP))
    dropped = with_dropped(batch, [False, True, False], empty)
    assert same(dropped, encoded_alike(batch, (2, 1, 2)))


def encoded_alike(prompts: Prompts, rows: tuple[int, ...]) -> Prompts:
    pooled_BP = None if prompts.pooled_BP is None else prompts.pooled_BP[list(rows)]
    return Prompts(prompts.embeddings_BTD[list(rows)], pooled_BP)


def test_pictures_are_drawn_from_long_prompts_with_short_negatives(load: Loader) -> None:
    def drawn(name: str, text: str, **options: Any) -> torch.Tensor:
        size = Size(32, 32)
        return draw_latents(load(name, **options), [text], [1], size=size, steps=1, guidance=2.0)

    for name in ("sd1", "sdxl"):
        long = drawn(name, f"{A_CHUNK} {B_CHUNK}", prompt_chunks=2)
        assert not torch.equal(long, drawn(name, A_CHUNK, prompt_chunks=2))
        assert torch.equal(drawn(name, A_CHUNK, prompt_chunks=2), drawn(name, A_CHUNK))


# --- the layer


def test_clip_skip_takes_an_earlier_layer_and_the_last_normalisation(load: Loader) -> None:
    """As if the text encoder had one layer less."""
    backbone = load("sd1", clip_skip=2)
    skipped = encoded(backbone, "a")
    assert same(encoded(load("sd1", clip_skip=1), "a"), encoded(load("sd1"), "a"))
    assert not same(skipped, encoded(load("sd1"), "a"))
    shorter = load_backbone(backbone.facts.folder)
    encoder: Any = shorter.components["text_encoder"]
    encoder.encoder.layers = encoder.encoder.layers[:-1]
    assert same(skipped, encoded(shorter, "a"))
    assert backbone.notices == ()


def test_a_clip_skip_beyond_the_first_layer_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="Clip skip 3 is more than .* layers \\(2\\)"):
        load_backbone(folders["sd1"], clip_skip=3).hold("text_encoder")


@pytest.mark.parametrize("name", ["sd2-v", "sdxl"])
def test_families_of_one_layer_keep_to_it_and_say_so(name: str, load: Loader) -> None:
    for usual in (1, 2):
        assert load(name, clip_skip=usual).notices == ()
    backbone = load(name, clip_skip=3)
    assert len(backbone.notices) == 1
    assert "Clip skip 3 is not used" in backbone.notices[0]
    assert same(encoded(backbone, "a"), encoded(load(name), "a"))


def test_sdxl_takes_the_layers_before_the_last_as_they_are(load: Loader) -> None:
    """The last layer of its first encoder is of no account, and its normalisations neither."""
    backbone = load_backbone(load("sdxl").facts.folder)
    first: Any = backbone.components["text_encoder"]
    with torch.no_grad():
        for part in (first.encoder.layers[-1].mlp.fc1, first.final_layer_norm):
            part.weight.mul_(2)
    assert same(encoded(backbone, "a"), encoded(load("sdxl"), "a"))


def test_gradients_reach_both_text_encoders(folders: dict[str, Path]) -> None:
    backbone = load_backbone(folders["sdxl"], prompt_chunks=2)
    for component in ("text_encoder", "text_encoder_2"):
        backbone.components[component].requires_grad_(True)
    prompts = backbone.encode_prompts([f"{A_CHUNK} {B_CHUNK}", "a"])
    assert prompts.pooled_BP is not None
    (prompts.embeddings_BTD.sum() + prompts.pooled_BP.sum()).backward()
    for component in ("text_encoder", "text_encoder_2"):
        weights = dict(backbone.components[component].named_parameters())
        found = [name for name, weight in weights.items() if weight.grad is not None]
        assert any("layers.0.self_attn.q_proj" in name for name in found)
