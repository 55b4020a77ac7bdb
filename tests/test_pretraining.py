"""The embedded base: its drawings, captions, stages, committed weights and sample sets."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops, ImageOps, ImageStat

from pretraining import data, palette, sample_sets, unet
from pretraining.avatars import draw_avatar
from pretraining.build import stages
from pretraining.captions import Caption, invented_name, name_of, sample_caption
from pretraining.looks import (
    HELD_OUT_HAIR_STYLE,
    HELD_OUT_MARK,
    HELD_OUT_SKIN,
    HELD_OUT_STYLE,
    SCENES,
    STYLES,
    Context,
    Identity,
    sample_context,
    sample_identity,
    sample_style,
)
from pretraining.recipe import Recipe
from pretraining.tokenizer import build_tokenizer
from pretraining.training import pixels, rate_share
from pretraining.vae import new_vae

ROOT = Path(__file__).parent.parent
BASE = ROOT / "trainer" / "assets" / "base"
DATASETS = ROOT / "datasets"


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Several threads stall each other on nets this small when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mean_difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference in grey levels, 0 to 255."""
    means = ImageStat.Stat(ImageChops.difference(first.convert("RGB"), second.convert("RGB"))).mean
    return float(np.mean(means))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [64, 128])
def test_drawing_depends_on_the_seed_alone(size: int, style: str) -> None:
    def draw(seed: int) -> bytes:
        random.seed(seed * 7)
        image = draw_avatar(sample_identity(seed), sample_context(seed), size, style)
        assert image.size == (size, size)
        return image.tobytes()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_held_out_looks_are_never_sampled() -> None:
    identities = [sample_identity(seed) for seed in range(2000)]
    assert HELD_OUT_SKIN not in {identity.skin for identity in identities}
    assert HELD_OUT_HAIR_STYLE not in {identity.hair_style for identity in identities}
    assert HELD_OUT_MARK not in {identity.mark for identity in identities}
    assert {identity.skin for identity in identities} == set(palette.SKIN) - {HELD_OUT_SKIN}
    assert {sample_style(seed) for seed in range(200)} == set(STYLES) - {HELD_OUT_STYLE}
    drawn = draw_avatar(sample_identity(1), sample_context(1), 64, sample_style(1))
    assert np.array_equal(data.picture(1, 64), np.asarray(drawn))


def test_every_style_looks_like_no_other() -> None:
    pictures = [draw_avatar(sample_identity(5), sample_context(5), 64, style) for style in STYLES]
    for number, picture in enumerate(pictures):
        for other in pictures[:number]:
            assert mean_difference(picture, other) > 3


@pytest.mark.parametrize("side", [16, 32])
def test_faces_count_for_more_and_the_whole_for_as_much(side: int) -> None:
    weights = unet.face_weights(side, 5.0)
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights.max().item() == pytest.approx(5 * weights.min().item())
    # Where the eyes and the mouth of a drawing are, and where its corners are.
    for y, x in ((0.53, 0.4), (0.53, 0.6), (0.69, 0.5)):
        assert weights[int(y * side), int(x * side)] == weights.max()
    assert weights[0, 0] == weights[-1, -1] == weights.min()


def test_captions_name_the_style() -> None:
    captions = {
        style: [
            sample_caption(sample_identity(n), sample_context(n), n, style=style)
            for n in range(200)
        ]
        for style in STYLES
        if style != HELD_OUT_STYLE
    }
    stated = {
        style: sum("style" in caption.fields for caption in found) / 200
        for style, found in captions.items()
    }
    assert stated["flat"] < 0.3
    assert all(share > 0.85 for style, share in stated.items() if style != "flat")
    words = {style: " ".join(c.text for c in found) for style, found in captions.items()}
    for style, text in words.items():
        assert style in text
        assert not any(other in text for other in ("comic", "pastel", "pixel") if other != style)


def stated_truths(identity: Identity, context: Context) -> set[str]:
    """Every phrase that a caption of these looks may hold, without articles."""
    hair = identity.hair_colour
    truths = {
        f"{identity.skin} skin",
        f"{identity.face} face",
        f"{identity.eyes} eyes",
        f"{identity.brows} eyebrows",
        context.mouth,
        f"{context.clothes_colour} {context.clothes}",
    }
    if identity.hair_style == "bald":
        truths.add("bald")
    else:
        for words in (f"{hair} {identity.hair_style}", f"{identity.hair_style} {hair}"):
            truths |= {words, f"{words} hair"}
    truths.add("no hat" if context.hat == "none" else f"{context.hat_colour} {context.hat}")
    if identity.beard != "none":
        truths.add(f"{hair} {identity.beard}")
    if identity.glasses != "none":
        truths |= {identity.glasses, f"{identity.glasses} glasses"}
    if identity.mark != "none":
        truths |= {identity.mark, f"{identity.mark} cheeks"}
    if context.is_scene:
        place = {"night sky": "night", "snow": "snow"}.get(context.background, context.background)
        truths.add(place)
    else:
        pattern = {"plain": "", "stripes": "striped ", "dots": "dotted "}[context.background]
        truths.add(f"{context.background_colour} {pattern}background")
        truths.add(f"plain {context.background_colour} {pattern}background")
    return truths


def is_true(statement: str, truths: set[str]) -> bool:
    """Whether a caption's part says nothing but truths."""
    for thing in statement.removeprefix("wearing ").split(" and "):
        words = thing.removeprefix("an ").removeprefix("a ")
        if words in truths:
            continue
        places = truths & {"beach", "forest", "night", "city", "snow"}
        if not any(place in words for place in places):
            return False
    return True


STYLE_WORDS = {
    "flat style": "flat",
    "flat drawing": "flat",
    "comic style": "comic",
    "comic drawing": "comic",
    "black outlines": "comic",
    "pastel style": "pastel",
    "pastel colours": "pastel",
    "soft pastel colours": "pastel",
    "pixel style": "pixel",
    "pixel art": "pixel",
}


def test_captions_are_true_and_name_what_they_state() -> None:
    seen: set[str] = set()
    for seed in range(600):
        identity, context = sample_identity(seed), sample_context(seed)
        truths = stated_truths(identity, context)
        for caption in data.captions(seed, 2):
            opening, *statements = caption.text.split(", ")
            assert "avatar" in opening or "portrait" in opening
            for statement in statements:
                if statement in STYLE_WORDS:
                    assert STYLE_WORDS[statement] == sample_style(seed)
                    continue
                assert is_true(statement, truths), (caption.text, statement)
            seen |= set(caption.fields)
    assert seen == {name for name, _ in data.label_fields()}


def test_a_third_of_the_captions_is_named() -> None:
    plain = {"avatar", "an avatar", "portrait", "portrait of an avatar"}
    plain |= {"a portrait of an avatar", "a picture of an avatar"}
    openings = [
        sample_caption(sample_identity(s), sample_context(s), s).text.split(", ")[0]
        for s in range(2000)
    ]
    named = sum(opening not in plain for opening in openings) / len(openings)
    assert 0.3 < named < 0.4
    assert len({invented_name(random.Random(s)) for s in range(500)}) > 400


def test_names_stand_for_skin_and_hair_colour() -> None:
    names: dict[tuple[str, str], set[str]] = {}
    for seed in range(3000):
        identity = sample_identity(seed)
        look = (identity.skin, identity.hair_colour)
        names.setdefault(look, set()).add(name_of(identity, random.Random(seed)))
    assert all(len(own) == 2 for own in names.values())
    everything = [name for own in names.values() for name in own]
    assert len(set(everything)) > 0.97 * len(everything)


def test_labels_hold_what_the_caption_states() -> None:
    identity, context = data.looks(11)
    numbers = data.label(identity, context, "flat", Caption("", ("skin", "mouth")))
    for (name, options), number in zip(data.label_fields(), numbers, strict=True):
        if name in ("skin", "mouth"):
            value = identity.skin if name == "skin" else context.mouth
            assert options[number - 1] == value
        else:
            assert number == 0


def test_tokenizer_round_trip_and_length(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(Recipe(), data.vocabulary_texts(500), tmp_path)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.model_max_length == 77
    for seed in range(300):
        text = sample_caption(sample_identity(seed), sample_context(seed), seed).text
        ids = tokenizer(text).input_ids
        assert len(ids) - 2 <= 75
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")
    assert len(tokenizer("zqx").input_ids) == 5, "invented names stay spelled out"


def test_new_autoencoder_starts_as_a_thumbnail_maker() -> None:
    vae = new_vae(Recipe()).eval()
    true = pixels(torch.from_numpy(np.stack([data.picture(seed, 64) for seed in range(4)])))
    with torch.no_grad():
        latents = vae.encode(true).latent_dist.mean
    small = torch.nn.functional.avg_pool2d(true, 4)
    correlation = np.corrcoef(latents[:, :3].flatten().numpy(), small.flatten().numpy())[0, 1]
    assert latents.shape == (4, 4, 16, 16)
    assert correlation > 0.95


def test_learning_rate_rises_stays_and_falls() -> None:
    shares = [rate_share(step, 100, 10, 0.3, 0.02) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[10:70] == [1.0] * 60
    assert shares[70:] == sorted(shares[70:], reverse=True)
    assert shares[99] < 0.05


def test_all_stages_run_and_resume(tmp_path: Path) -> None:
    recipe = Recipe(
        pictures=50, held_out_pictures=4, captions_per_picture=2, vae_steps=1, vae_batch=2,
        polish_steps=1, text_steps=1, text_batch=4, unet_steps=1, unet_batch=2,
        unet_channels=(16, 16, 16), save_every_steps=1,
    )  # fmt: skip
    work, target = tmp_path / "work", tmp_path / "base"
    work.mkdir()
    for run in stages(recipe, work, target, processes=1).values():
        run()
    unet.train_unet(replace(recipe, unet_steps=2), work, processes=1)
    resumed = torch.load(work / "unet.pt", weights_only=True)
    (work / "unet.pt").unlink()
    unet.train_unet(replace(recipe, unet_steps=2), work, processes=1)
    straight = torch.load(work / "unet.pt", weights_only=True)
    assert resumed["step"] == straight["step"] == 2
    for name, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    names = {p.name for p in target.rglob("*") if p.is_file()}
    assert {"model_index.json", "vocab.json", "merges.txt", "model.safetensors"} <= names
    assert StableDiffusionPipeline.from_pretrained(target).unet.dtype == torch.float32


def test_processes_share_a_batch_and_average() -> None:
    recipe = Recipe(unet_batch=4)
    latents = np.zeros((9, 4, 16, 16), np.float16)
    tokens = np.zeros((9, 2, 77), np.uint16)
    whole, *shares = (
        unet.draw_batch(recipe, 5, part, latents, tokens, torch.ones(77, dtype=torch.long))
        for part in (slice(0, 4), slice(0, 2), slice(2, 4))
    )
    assert torch.equal(torch.cat([share.noise_BChw for share in shares]), whole.noise_BChw)
    assert torch.equal(torch.cat([share.tokens_BT for share in shares]), whole.tokens_BT)

    meeting = unet.Meeting(processes=2, numbers=3)
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: meeting.average(rank, 0, values[rank]), range(2)))
    assert all(torch.equal(value, torch.full((3,), 2.0)) for value in values)


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_base_is_small_and_complete() -> None:
    files = [p for p in BASE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 20_000_000
    assert sorted(str(p.relative_to(BASE).as_posix()) for p in files) == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_base_has_the_shape_of_stable_diffusion(base: StableDiffusionPipeline) -> None:
    assert base.vae.config.latent_channels == base.unet.config.in_channels == 4
    assert base.unet.config.cross_attention_dim == base.text_encoder.config.hidden_size
    schedule = base.scheduler.config
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)
    assert schedule.beta_schedule == "scaled_linear"
    assert schedule.num_train_timesteps == 1000
    assert schedule.prediction_type == "epsilon"
    assert base.unet.dtype == base.text_encoder.dtype == base.vae.dtype == torch.float32
    config, tokenizer = base.text_encoder.config, base.tokenizer
    assert config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id


def test_text_encoder_pools_at_the_end_of_the_text(base: StableDiffusionPipeline) -> None:
    ids = base.tokenizer("zqx avatar, bald", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = base.text_encoder(ids)
    end = int((ids[0] == base.tokenizer.eos_token_id).nonzero()[0])
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, end])


def test_base_draws(base: StableDiffusionPipeline) -> None:
    latents = base(
        "avatar, on the beach", num_inference_steps=3, output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    assert bool(torch.isfinite(latents).all())
    image = base("", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_base_loads_in_a_named_precision() -> None:
    half = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float16)
    assert half.unet.dtype == half.text_encoder.dtype == half.vae.dtype == torch.float16


def test_autoencoder_keeps_pictures_it_never_saw(base: StableDiffusionPipeline) -> None:
    drawn = [data.picture(seed, 64) for seed in range(10**8, 10**8 + 8)]
    true = pixels(torch.from_numpy(np.stack(drawn)))
    with torch.no_grad():
        made = base.vae.decode(base.vae.encode(true).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((made - true) / 2).pow(2).mean(dim=(1, 2, 3)).log10()
    assert float(psnr.mean()) > 25


@pytest.mark.parametrize(
    ("name", "samples"),
    [("zia", sample_sets.face_set()), ("neon", sample_sets.style_set())],
    ids=["zia", "neon"],
)
def test_sample_sets_are_what_the_code_draws(name: str, samples: list[sample_sets.Sample]) -> None:
    folder = DATASETS / name
    assert 12 <= len(samples) <= 16
    expected = {s.name for s in samples} | {Path(s.name).with_suffix(".txt").name for s in samples}
    assert {p.name for p in folder.iterdir()} == expected
    assert sum(p.stat().st_size for p in folder.iterdir()) < 400_000
    for sample in samples:
        with Image.open(folder / sample.name) as file:
            stored = ImageOps.exif_transpose(file)
        drawn = sample_sets.render(sample)
        assert stored.size == drawn.size
        # JPEG is lossy, and other Pillow releases may round edges differently.
        assert mean_difference(stored, drawn) < (2.5 if sample.name.endswith(".jpg") else 0.5)
        text = (folder / sample.name).with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert text == sample.caption


def test_face_set_is_varied_and_awkward() -> None:
    samples = sample_sets.face_set()
    sizes = {}
    for sample in samples:
        with Image.open(DATASETS / "zia" / sample.name) as file:
            sizes[sample.name] = file.size
    assert any(width != height for width, height in sizes.values())
    assert max(max(size) for size in sizes.values()) >= 512
    rotated = [sample.name for sample in samples if sample.stored_rotated]
    assert len(rotated) == 1
    with Image.open(DATASETS / "zia" / rotated[0]) as file:
        assert file.getexif()[0x0112] == 6
    assert {Path(name).suffix for name in sizes} == {".png", ".jpg"}
    assert sum(sample.context.hat == "none" for sample in samples) >= 8
    for sample in samples:
        for word in ("teal", "mohawk", "orange hair", "star", "zia"):
            assert word not in sample.caption
    assert len({s.context.background for s in samples if s.context.background in SCENES}) >= 4


def test_pictures_to_measure_on() -> None:
    true = sample_sets.true_pictures(6, seed=1)
    assert [p.size for p in true] == [(64, 64)] * 6
    again = sample_sets.true_pictures(6, seed=1)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(true, again, strict=True))
    others = sample_sets.other_avatars(6, seed=1, size=32)
    assert [p.size for p in others] == [(32, 32)] * 6
