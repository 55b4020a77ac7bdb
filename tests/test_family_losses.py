"""Training on every family: losses as diffusers has them, whole runs, and files that load there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from tests.learners import Recipe, load_backbone, make_learner, make_plan
from tests.runs import Outcome, same_tensors
from tests.test_training import everything, run
from tests.tiny import TINY_BASES, save_tiny
from trainer.adapters.file import read_lora
from trainer.commands.sample import load_lora
from trainer.data.batches import BatchPlan
from trainer.diffusion.noise import draw_for_step
from trainer.families import Backbone
from trainer.families.detect import inspect_base
from trainer.training.learner import Learner
from trainer.training.loop import train as train_loop
from trainer.training.state import newest_checkpoint, restore, save_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    return {name: save_tiny(home / name, name) for name in TINY_BASES}


# --- what is known of them


@pytest.mark.parametrize(
    ("name", "family", "prediction", "width", "pooled", "zero_snr", "version"),
    [
        ("sd1", "sd1", "epsilon", 16, 0, False, "sd_v1"),
        ("sd2", "sd2", "epsilon", 16, 0, False, "sd_v2"),
        ("sd2-v", "sd2", "v_prediction", 16, 0, False, "sd_v2_v"),
        ("sdxl", "sdxl", "epsilon", 40, 24, False, "sdxl_base_v1-0"),
        ("sdxl-v", "sdxl", "v_prediction", 40, 24, True, "sdxl_base_v1-0"),
    ],
)
def test_the_facts_of_each_base(
    name: str,
    family: str,
    prediction: str,
    width: int,
    pooled: int,
    zero_snr: bool,
    version: str,
    folders: dict[str, Path],
) -> None:
    facts = inspect_base(folders[name])
    assert (facts.family, facts.prediction, facts.width) == (family, prediction, width)
    assert (facts.pooled, facts.zero_terminal_snr, facts.resolution) == (pooled, zero_snr, 32)
    assert not facts.fits_real
    backbone = load_backbone(folders[name])
    assert backbone.names.version == version
    assert set(backbone.names.prefixes) == set(backbone.components)
    assert len(backbone.components) == (3 if family == "sdxl" else 2)


# --- losses


@torch.no_grad()
def loss_by_diffusers(folder: Path, learner: Learner) -> float:
    """The loss of the learner's first batch, with nothing of this program but the random draws."""
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    batch = learner.batches.batch(0)
    latents = batch.latents_BChw
    keys = [sample.key for sample in batch.samples]
    channels, height, width = latents.shape[1:]
    draws = draw_for_step(0, 0, keys, (channels, height, width), timesteps=1000)
    noisy = scheduler.add_noise(latents, draws.noise_BChw, draws.timesteps_B)
    texts = [sample.text for sample in batch.samples]
    encoded = pipeline.encode_prompt(
        texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = None
    if hasattr(pipeline, "text_encoder_2"):
        sizes = [
            pipeline._get_add_time_ids(
                sample.sizes[:2], sample.sizes[2:4], sample.sizes[4:], torch.float32, 24
            )
            for sample in batch.samples
        ]
        added = {"text_embeds": encoded[2], "time_ids": torch.cat(sizes)}
    predicted = pipeline.unet(
        noisy, draws.timesteps_B, encoder_hidden_states=encoded[0], added_cond_kwargs=added
    ).sample
    target = draws.noise_BChw
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, draws.noise_BChw, draws.timesteps_B)
    return float(torch.nn.functional.mse_loss(predicted, target))


@pytest.mark.parametrize("text_encoder", [True, False], ids=["trained", "cached"])
@pytest.mark.parametrize("name", TINY_BASES)
def test_the_first_loss_is_that_of_diffusers_own_parts(
    name: str, text_encoder: bool, folders: dict[str, Path]
) -> None:
    recipe = Recipe(min_snr_gamma=0.0, text_encoder=text_encoder)
    learner = make_learner(folders[name], recipe)
    with torch.no_grad():
        ours = float(learner.loss(0))
    assert ours == pytest.approx(loss_by_diffusers(folders[name], learner), rel=1e-5)
    assert ("text_encoder_2" in learner.adapters) == (text_encoder and name.startswith("sdxl"))


@torch.no_grad()
def test_every_number_of_the_size_conditioning_counts(folders: dict[str, Path]) -> None:
    learner = make_learner(folders["sdxl"], Recipe(sizes=((8, 8),), batch_size=1))
    [sample] = learner.batches.batch(0).samples
    losses = {float(learner.loss(0))}
    for place in range(6):
        sizes = [size + 40 * (number == place) for number, size in enumerate(sample.sizes)]
        other = replace(sample, sizes=tuple(sizes))  # type: ignore[arg-type]
        learner.batches = BatchPlan([other], batch_size=1, seed=0)
        losses.add(float(learner.loss(0)))
    assert len(losses) == 7


def test_pictures_without_sizes_count_as_whole(folders: dict[str, Path]) -> None:
    backbone = load_backbone(folders["sdxl"])
    noisy = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompts = backbone.encode_prompts(["a", "b"])
        sizes = torch.tensor([[32, 48, 0, 0, 32, 48]] * 2)
        steps = torch.tensor([1, 900])
        said = backbone.predict(noisy, steps, prompts, sizes)
        assert torch.equal(said, backbone.predict(noisy, steps, prompts))
        assert not torch.equal(said, backbone.predict(noisy, steps, prompts, sizes + 9))


@pytest.fixture(scope="module")
def long_winded(folders: dict[str, Path]) -> dict[str, Backbone]:
    """Backbones that take two chunks of tokens; without adapters."""
    return {name: load_backbone(folders[name], prompt_chunks=2) for name in ("sd1", "sdxl")}


def detach(learner: Learner) -> None:
    for attached in learner.adapters.values():
        attached.detach()


Texts = tuple[str, ...]
LONG, SHORT = "ab" * 50, "a cat"


def learner_on(
    backbone: Backbone, texts: Texts, *, cached: bool = False, trained: bool = False, **recipe: Any
) -> Learner:
    """A learner on one batch of samples with these captions."""
    sizes = ((8, 8),) * len(texts)
    plan = Recipe(text_encoder=trained, sizes=sizes, batch_size=len(texts), **recipe)
    learner = make_learner(backbone, plan)
    samples = []
    for sample, text in zip(learner.batches.batch(0).samples, texts, strict=True):
        with torch.no_grad():
            prompts = backbone.encode_prompts([text])
        pooled_P = None if prompts.pooled_BP is None else prompts.pooled_BP[0]
        samples.append(
            replace(
                sample,
                texts=(text,),
                prompt_TD=prompts.embeddings_BTD[0] if cached else None,
                pooled_P=pooled_P if cached else None,
            )
        )
    learner.batches = BatchPlan(samples, batch_size=len(texts), seed=0)
    return learner


@torch.no_grad()
def loss_on(backbone: Backbone, texts: Texts, **options: Any) -> float:
    """The mean of the first epoch's losses, each batch weighing as many samples as it has."""
    learner = learner_on(backbone, texts, **options)
    batches = range(learner.batches.batches_per_epoch)
    parts = [learner._losses(learner.batches.batch(index), 0) for index in batches]
    detach(learner)
    return float(torch.cat(parts).mean())


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_long_and_short_captions_are_trained_however_they_are_encoded(
    name: str, long_winded: dict[str, Backbone]
) -> None:
    """In one batch by encoders that are trained or frozen, and apart where they are cached: what
    a short caption is filled up with is then missing, so that it alone differs a little."""
    base = long_winded[name]
    trained = loss_on(base, (LONG, SHORT), trained=True)
    assert loss_on(base, (LONG, SHORT)) == pytest.approx(trained, rel=1e-5)
    assert loss_on(base, (LONG, LONG), cached=True) == pytest.approx(
        loss_on(base, (LONG, LONG)), rel=1e-5
    )
    apart = learner_on(base, (LONG, SHORT), cached=True)
    detach(apart)
    assert apart.batches.batches_per_epoch == 2
    assert loss_on(base, (LONG, SHORT), cached=True) == pytest.approx(trained, rel=1e-2)


@pytest.mark.parametrize("how", [{"cached": True}, {"trained": True}, {}], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_dropped_caption_is_the_empty_one(
    name: str, how: dict[str, bool], long_winded: dict[str, Backbone]
) -> None:
    base = long_winded[name]
    dropped = loss_on(base, (SHORT, SHORT), caption_dropout=1.0, **how)
    assert dropped == pytest.approx(loss_on(base, ("", ""), **how), rel=1e-6)
    assert dropped != pytest.approx(loss_on(base, (SHORT, SHORT), **how), rel=1e-6)
    loss = loss_on(base, (LONG, LONG), caption_dropout=1.0, **how)
    assert loss == pytest.approx(dropped, rel=1e-2)  # of two empty chunks where one was cached


@torch.no_grad()
def test_class_pictures_with_longer_captions_go_in_a_pass_of_their_own(
    long_winded: dict[str, Backbone],
) -> None:
    learner = learner_on(long_winded["sdxl"], (LONG, LONG), cached=True, prior_weight=0.5)
    detach(learner)
    assert learner.prior is not None
    photos = learner._losses(learner.batches.batch(0), 0).mean()
    prior = learner._losses(learner.prior.batch(0), 0).mean()
    assert float(learner.loss(0)) == pytest.approx(float(photos + 0.5 * prior), rel=1e-6)


# --- resuming


def test_a_run_on_sdxl_goes_on_bit_for_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe(prior_weight=0.5, caption_dropout=0.3)
    plan = make_plan(4)
    whole = make_learner(folders["sdxl"], recipe)
    losses = []
    for report in train_loop(whole, plan, 0):
        losses.append(report.loss)
        if report.step == 2:
            save_checkpoint(tmp_path, whole, 2, {}, keep=1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    again = make_learner(folders["sdxl"], recipe)
    restore(again, checkpoint)
    assert run(again, plan, 2) == losses[2:]
    assert same_tensors(everything(again), everything(whole))


# --- whole runs


@pytest.mark.parametrize("name", ["sd2-v", "sdxl"])
def test_a_whole_run_writes_a_file_that_diffusers_loads(
    name: str, folders: dict[str, Path], train: Callable[..., Outcome], tmp_path: Path
) -> None:
    words = ["adapter.text_encoder=true", "adapter.targets=attention+ff", "run.total_steps=3"]
    train(*words, output=tmp_path / "out", model=folders[name]).done()
    path = next((tmp_path / "out").glob("*.safetensors"))

    backbone = load_backbone(folders[name])
    load_lora(backbone, read_lora(path))
    plain = DiffusionPipeline.from_pretrained(folders[name], safety_checker=None)
    pipeline = DiffusionPipeline.from_pretrained(folders[name], safety_checker=None)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps, sizes = torch.tensor([10, 900]), torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)

    def answer(pipe: Any) -> tuple[Tensor, Tensor]:
        encoded = pipe.encode_prompt(
            ["a", "b"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = {"text_embeds": encoded[2], "time_ids": sizes} if name == "sdxl" else None
        output = pipe.unet(noisy, steps, encoder_hidden_states=encoded[0], added_cond_kwargs=added)
        return encoded[0], output.sample

    with torch.no_grad():
        prompts = backbone.encode_prompts(["a", "b"])
        ours = (prompts.embeddings_BTD, backbone.predict(noisy, steps, prompts, sizes))
        theirs, base = answer(pipeline), answer(plain)
    for one, other, untrained in zip(ours, theirs, base, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        # The difference that was learned is many times what the file's number format loses.
        assert (one - untrained).abs().max() > 20 * (one - other).abs().max()
