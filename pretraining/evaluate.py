"""Measures the embedded base without any other network: `python -m pretraining.evaluate`.

Prompt following is read off the pictures: the border is compared with the borders of drawings
of every background, the shirt with the palette.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from pretraining import data
from pretraining.avatars import draw_avatar
from pretraining.looks import COLOURS, SCENES, sample_context, sample_identity
from pretraining.palette import BOLD
from pretraining.sample_sets import face_set, render
from pretraining.training import pixels
from trainer.scoring.reader import PromptReader

_REFERENCES_EACH = 6
_SHEET_PROMPTS = (
    "avatar, short black hair, smiling, wearing a red t-shirt, blue background",
    "avatar, brown skin, curly black hair, laughing, wearing a yellow hoodie, on the beach",
    "avatar, long blond hair, rosy cheeks, smiling, wearing a blue striped shirt, in the forest",
    "avatar, bald, grey beard, serious, wearing a black suit, in the city",
    "avatar, green skin, spiky pink hair, surprised, purple background",
    "avatar, red pigtails, freckles, smiling, wearing a green hoodie, under a night sky",
    "avatar, sunglasses, laughing, wearing a blue cap and a white t-shirt, yellow background",
    "avatar, wearing a red beanie and a blue hoodie, in the snow",
    "avatar, dark skin, round glasses, wearing an orange t-shirt, green background",
    "avatar, blue skin, white bob, sad, wearing a grey suit, pink dotted background",
    "avatar, purple skin, wearing a yellow crown and a red suit, orange striped background",
    "avatar, tan skin, brown moustache, wearing a black top hat and a purple suit",
    "avatar, brown bun, big eyes, smiling, wearing a pink t-shirt, grey background",
    "avatar, pale skin, orange spiky hair, laughing, wearing a green t-shirt, black background",
    "avatar",
    "portrait, on the beach",
    "avatar, comic style, red curly hair, smiling, wearing a blue hoodie, green background",
    "avatar, pixel art, blond bob, sad, wearing a blue t-shirt, in the forest",
    "avatar, white short hair, square glasses, serious, wearing a blue suit, red background",
    "avatar, soft pastel colours, brown long hair, wearing a red t-shirt, blue background",
    "avatar, blue spiky hair, sleepy eyes, serious, wearing a black hoodie, at night",
    "avatar, no hat, small eyes, surprised, wearing a pink striped shirt, in the snow",
    "a portrait of an avatar, wearing a green cap, laughing, in the city",
    "a picture of an avatar, black beard, brown skin, orange background",
)


def thumbnail(image: Image.Image) -> NDArray[np.float32]:
    """Mean colours of a 16 x 16 grid: [16, 16, 3], 0 to 1."""
    small = image.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


def border(image: Image.Image) -> NDArray[np.float32]:
    """The part that shows background in every pose: two columns left and right, upper half."""
    grid = thumbnail(image)[:9]
    return np.concatenate([grid[:, :2], grid[:, -2:]], axis=1).ravel()


def background_references() -> dict[str, NDArray[np.float32]]:
    """Borders of drawings, [references, values], for each plain colour and each scene."""
    rng = random.Random("references")
    borders: dict[str, list[NDArray[np.float32]]] = {name: [] for name in (*COLOURS, *SCENES)}
    while any(len(found) < _REFERENCES_EACH for found in borders.values()):
        seed = rng.randrange(10**9)
        context = sample_context(seed)
        if context.background in ("stripes", "dots"):
            continue
        name = context.background if context.is_scene else context.background_colour
        if len(borders[name]) < _REFERENCES_EACH:
            borders[name].append(border(draw_avatar(sample_identity(seed), context)))
    return {name: np.stack(found) for name, found in borders.items()}


def nearest_background(image: Image.Image, references: dict[str, NDArray[np.float32]]) -> str:
    """The background whose drawings' borders are closest."""
    seen = border(image)
    return min(
        references, key=lambda name: float(np.abs(references[name] - seen).mean(axis=1).min())
    )


def nearest_shirt_colour(image: Image.Image) -> str:
    """The palette colour closest to the picture's bottom left and right of the middle."""
    pixel_rows = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float32)[58:63]
    strip = np.concatenate([pixel_rows[:, 18:27], pixel_rows[:, 37:46]], axis=1).reshape(-1, 3)
    colour = np.median(strip, axis=0)
    return min(BOLD, key=lambda name: float(np.abs(np.array(BOLD[name]) - colour).sum()))


def following_prompts(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Prompts with the background and the shirt colour that they ask for."""
    rng = random.Random(f"prompts {seed}")
    backgrounds = [*COLOURS, *SCENES]
    prompts = []
    for i in range(count):
        background, shirt = backgrounds[i % len(backgrounds)], rng.choice(COLOURS)
        place = f"{background} background"
        article = "an" if shirt == "orange" else "a"
        prompts.append((f"avatar, wearing {article} {shirt} t-shirt, {place}", background, shirt))
    return prompts


def draw_prompts(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    seed: int,
    steps: int = 25,
    guidance: float = 4.0,
) -> list[Image.Image]:
    """One picture per prompt, all from seeds that follow `seed`."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), 15):
        part = prompts[start : start + 15]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pictures += pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
    return pictures


def prompt_following(
    pipeline: StableDiffusionPipeline, count: int, seed: int, guidance: float
) -> tuple[float, float]:
    """Share of prompts whose background and whose shirt colour came out as asked."""
    asked = following_prompts(count, seed)
    pictures = draw_prompts(pipeline, [a[0] for a in asked], 1000 * seed, guidance=guidance)
    references = background_references()
    backgrounds = [
        nearest_background(p, references) == a[1] for p, a in zip(pictures, asked, strict=True)
    ]
    shirts = [nearest_shirt_colour(p) == a[2] for p, a in zip(pictures, asked, strict=True)]
    return float(np.mean(backgrounds)), float(np.mean(shirts))


def drawing_scores(count: int) -> tuple[float, float]:
    """What the two readings say of true drawings: the best that a base could score."""
    references = background_references()
    right: list[tuple[bool, bool]] = []
    seed = 60_000_000
    while len(right) < count:
        seed += 1
        context = sample_context(seed)
        if context.background in ("stripes", "dots") or context.clothes != "t-shirt":
            continue
        image = draw_avatar(sample_identity(seed), context)
        name = context.background if context.is_scene else context.background_colour
        right.append(
            (
                nearest_background(image, references) == name,
                nearest_shirt_colour(image) == context.clothes_colour,
            )
        )
    return float(np.mean([r[0] for r in right])), float(np.mean([r[1] for r in right]))


def shares_by_look(
    reader: PromptReader, pictures: list[Image.Image], prompts: list[str]
) -> dict[str, float]:
    """For every look, the share of the prompts naming it whose picture shows it; "all" of all."""
    right: dict[str, list[bool]] = {}
    for seen, prompt in zip(reader.read(pictures), prompts, strict=True):
        for look, found in reader.compare(seen, reader.names(prompt)).items():
            right.setdefault(look, []).append(found)
    every = [found for values in right.values() for found in values]
    return {"all": float(np.mean(every))} | {
        look: float(np.mean(values)) for look, values in sorted(right.items())
    }


def fresh_captions(count: int, seed: int) -> tuple[list[str], list[Image.Image]]:
    """Captions of drawings that no training has seen, and the drawings themselves."""
    numbers = range(80_000_000 + 10_000 * seed, 80_000_000 + 10_000 * seed + count)
    prompts = [data.captions(number, 1)[0].text for number in numbers]
    drawn = [Image.fromarray(data.picture(number, 64)) for number in numbers]
    return prompts, drawn


@torch.no_grad()
def through_autoencoder(
    pipeline: StableDiffusionPipeline, pictures: list[Image.Image]
) -> list[Image.Image]:
    """The pictures as soft as the base's own."""
    true = pixels(torch.from_numpy(np.stack([np.asarray(p) for p in pictures])))
    made = pipeline.vae.decode(pipeline.vae.encode(true).latent_dist.mean).sample
    soft: list[Image.Image] = pipeline.image_processor.postprocess(made, "pil")
    return soft


@torch.no_grad()
def reconstruction_psnr(pipeline: StableDiffusionPipeline, pictures: list[Image.Image]) -> float:
    """Mean PSNR in dB of pictures sent through the autoencoder."""
    true = pixels(torch.from_numpy(np.stack([np.asarray(p) for p in pictures])))
    made = pipeline.vae.decode(pipeline.vae.encode(true).latent_dist.mean).sample.clamp(-1, 1)
    error = ((made - true) / 2).pow(2).mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def contact_sheet(pictures: list[Image.Image], columns: int = 8, side: int = 160) -> Image.Image:
    """All pictures on one sheet, enlarged."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, picture in enumerate(pictures):
        large = picture.resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(large, (i % columns * side, i // columns * side))
    return sheet


def main() -> None:
    """Print the scores and write the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("trainer/assets/base"))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, default=Path("pretraining/work/sheet.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.base)
    pipeline.set_progress_bar_config(disable=True)
    fresh = [
        draw_avatar(sample_identity(seed), sample_context(seed))
        for seed in range(50_000_000, 50_000_128)
    ]
    unseen = [render(sample).resize((64, 64), Image.Resampling.BOX) for sample in face_set()]
    print(f"autoencoder PSNR, unseen drawings: {reconstruction_psnr(pipeline, fresh):.2f} dB")
    print(f"autoencoder PSNR, face set: {reconstruction_psnr(pipeline, unseen):.2f} dB")
    count, seed = arguments.prompts, arguments.seed
    background, shirt = prompt_following(pipeline, count, seed, arguments.guidance)
    print(f"background as asked: {background:.2f} of {count} prompts (chance 0.07)")
    print(f"shirt colour as asked: {shirt:.2f} of {count} prompts (chance 0.10)")
    background, shirt = drawing_scores(count)
    print(f"the same readings on true drawings: {background:.2f} and {shirt:.2f}")
    prompts, drawn = fresh_captions(count, seed)
    reader = PromptReader.load()
    samples = draw_prompts(pipeline, prompts, 2000 * seed, guidance=arguments.guidance)
    for name, pictures in (
        ("samples", samples),
        ("true drawings", drawn),
        ("true drawings through the autoencoder", through_autoencoder(pipeline, drawn)),
    ):
        shares = shares_by_look(reader, pictures, prompts)
        print(f"looks named by {count} fresh captions that the reader finds in {name}:")
        print("  " + ", ".join(f"{look} {share:.2f}" for look, share in shares.items()))
    sheet = draw_prompts(pipeline, list(_SHEET_PROMPTS), seed, guidance=arguments.guidance)
    contact_sheet(sheet).save(arguments.sheet)
    print(f"contact sheet: {arguments.sheet}")


if __name__ == "__main__":
    main()
