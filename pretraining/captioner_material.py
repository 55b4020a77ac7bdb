"""What the captioner is trained on: pictures, their captions as tokens, and its tokenizer."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from pretraining import palette
from pretraining.avatars import draw_avatar
from pretraining.captions import describe_context, describe_identity
from pretraining.data import PICTURES, label_fields, looks
from pretraining.looks import Context, Identity, sample_style
from pretraining.training import pixels

STRANGERS = "strangers.npy"
# What stands before a caption, by what is learned from the photos.
PROMPTS = {"face": "scene:", "style": "everything:"}
# In place of a look's index where it cannot be seen, and of a token that is not learned.
NOT_SHOWN = -100
_STRANGER_SEED = 30_000_000
# The looks of strangers that have no name.
_NAMELESS = ("skin", "hair_colour")
_PAD, _START, _END = "[PAD]", "[CLS]", "[SEP]"


@dataclass(frozen=True, slots=True)
class CaptionerRecipe:
    """Sizes, amounts and rates; counts of steps are optimizer steps."""

    seed: int = 1
    resolution_px: int = 64
    strangers: int = 20_000

    # Model.
    patch_px: int = 8
    width: int = 128
    heads: int = 4
    vision_layers: int = 4
    text_layers: int = 3
    vocabulary: int = 520
    vocabulary_texts: int = 4_000
    tokens: int = 64
    initial_spread: float = 0.05

    # Training: first the looks alone, then the captions with the looks beside them.
    looks_steps: int = 1_200
    steps: int = 4_000
    batch: int = 64
    rate: float = 1.5e-3
    warmup_steps: int = 200
    decay_share: float = 0.43
    final_rate_share: float = 0.01
    looks_weight: float = 0.3
    everything_share: float = 0.4
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    save_every_steps: int = 250


def stranger(seed: int, size: int) -> NDArray[np.uint8]:
    """Picture number `seed` with a skin and hair of any colour: uint8 [size, size, 3].

    The drawings know few skins; the captioner must not take a new one for something else.
    """
    identity, context = looks(seed)
    rng = random.Random(f"stranger {seed}")
    skin, hair = (tuple(rng.randrange(20, 250) for _ in range(3)) for _ in range(2))
    with (
        patch.dict(palette.SKIN, {identity.skin: skin}),
        patch.dict(palette.HAIR, {identity.hair_colour: hair}),
    ):
        return np.asarray(draw_avatar(identity, context, size, sample_style(seed)))


def draw_strangers(recipe: CaptionerRecipe, work: Path) -> None:
    """Draw the pictures with unknown skin and hair colours, unless they are there."""
    if (work / STRANGERS).exists():
        return
    seeds = range(_STRANGER_SEED, _STRANGER_SEED + recipe.strangers)
    drawn = np.stack([stranger(seed, recipe.resolution_px) for seed in seeds])
    temporary = work / f"part-{STRANGERS}"
    np.save(temporary, drawn)
    temporary.replace(work / STRANGERS)


def describe(kind: str, identity: Identity, context: Context) -> str:
    """The caption that is to be learned: of what changes, or of everything."""
    if kind == "face":
        return describe_context(context)
    return f"{describe_identity(identity)}, {describe_context(context)}"


def shown_looks(identity: Identity, context: Context, style: str) -> list[int]:
    """For every look of `label_fields` its value's index, or -100 where it cannot be seen."""
    values = asdict(identity) | asdict(context) | {"style": style}
    hidden = set()
    if context.hat == "none":
        hidden.add("hat_colour")
    if context.is_scene:
        hidden.add("background_colour")
    if identity.hair_style == "bald" and identity.beard == "none":
        hidden.add("hair_colour")
    return [
        NOT_SHOWN if name in hidden else options.index(values[name])
        for name, options in label_fields()
    ]


def distorted(pictures_BCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror, crop, squeeze and tint some pictures, as photos of any shape will be.

    Pixels in [-1, 1]. Sides are cropped each for itself, since the processor makes every photo
    square.
    """
    count = len(pictures_BCHW)

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=rng)

    changed = (draw(1) < 0.6).float()
    # Less is cut off above and below, where hat and clothes are.
    scale = 1 - changed * torch.tensor([0.22, 0.12]) * draw(2)
    shift = (1 - scale) * (2 * draw(2) - 1)
    mirrored = torch.where(draw() < 0.5, -1.0, 1.0)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = scale[:, 0] * mirrored
    transform[:, 1, 1] = scale[:, 1]
    transform[:, :, 2] = shift
    grid = F.affine_grid(transform, list(pictures_BCHW.shape), align_corners=False)
    moved = F.grid_sample(pictures_BCHW, grid, padding_mode="border", align_corners=False)
    gain = 1 + 0.06 * (2 * draw(3, 1, 1) - 1)
    noise = 0.04 * draw(1, 1, 1) * torch.randn(moved.shape, generator=rng)
    return ((moved + 1) * gain - 1 + noise).clamp(-1, 1)


class Material:
    """All pictures with their looks and their captions as tokens.

    tokens: by kind, int64 [N, T] padded with 0. looks: int64 [N, looks]. Strangers come last;
    their skin and hair have no name, so that they are never asked for everything.
    """

    def __init__(self, recipe: CaptionerRecipe, work: Path, tokenizer: PreTrainedTokenizerFast):
        known: NDArray[np.uint8] = np.load(work / PICTURES, mmap_mode="r")
        strange: NDArray[np.uint8] = np.load(work / STRANGERS, mmap_mode="r")
        self.pictures = (known, strange)
        self.named = len(known)
        seeds = [*range(len(known)), *range(_STRANGER_SEED, _STRANGER_SEED + len(strange))]
        truths = [looks(seed) for seed in seeds]
        shown = [
            shown_looks(*truth, sample_style(seed))
            for truth, seed in zip(truths, seeds, strict=True)
        ]
        self.looks = torch.tensor(shown)
        nameless = [i for i, (name, _) in enumerate(label_fields()) if name in _NAMELESS]
        self.looks[self.named :, nameless] = NOT_SHOWN
        self.tokens = {
            kind: tokenizer(
                [f"{prompt} {describe(kind, *truth)}" for truth in truths],
                padding=True,
                return_tensors="pt",
            ).input_ids
            for kind, prompt in PROMPTS.items()
        }
        self.prompt_lengths = {
            kind: len(tokenizer(prompt).input_ids) - 1 for kind, prompt in PROMPTS.items()
        }

    def __len__(self) -> int:
        return len(self.looks)

    def pick(self, index: Tensor) -> Tensor:
        """Pixels of the pictures: float [B, 3, H, W] in [-1, 1]."""
        known, strange = self.pictures
        rows = [known[i] if i < self.named else strange[i - self.named] for i in index.tolist()]
        return pixels(torch.from_numpy(np.stack(rows)))

    def texts(self, kind: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and what is to be learned of them, both int64 [B, T]; -100 is not learned."""
        ids = self.tokens[kind][index]
        ids = ids[:, : int((ids != 0).sum(1).max())]
        targets = ids.masked_fill(ids == 0, NOT_SHOWN)
        targets[:, : self.prompt_lengths[kind]] = NOT_SHOWN
        return ids, targets


def new_tokenizer(recipe: CaptionerRecipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the captions' words, which gives every text back as it was.

    BLIP's own splits "t-shirt" and puts blanks before commas. Texts get a start and an end
    token, where BLIP expects them.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    texts = [
        f"{prompt} {describe(kind, *looks(seed))}"
        for seed in range(recipe.vocabulary_texts)
        for kind, prompt in PROMPTS.items()
    ]
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=[_PAD, _START, _END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learner.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, 1), (_END, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        pad_token=_PAD,
        bos_token=_START,
        eos_token=_END,
        cls_token=_START,
        sep_token=_END,
        model_max_length=recipe.tokens,
    )
