"""`likeness sample`: draw pictures with a LoRA file on its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.nn import Conv2d, Linear

from trainer.adapters.attach import Attached, attach
from trainer.adapters.file import LoraFile, read_lora
from trainer.adapters.naming import DOWN, from_kohya, names_in
from trainer.commands.bases import EMBEDDED_NAME, base_facts
from trainer.commands.terminal import Terminal
from trainer.errors import FileFormatError, OutputError, UsageError
from trainer.families import FAMILIES, Backbone, LoadOptions
from trainer.training.device import choose_device
from trainer.training.export import naming_for
from trainer.training.preview import PreviewPrompt, draw, save_preview
from trainer.types import Size

_LARGEST_RANK = 4096


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of `likeness sample`."""

    file: Path
    prompts: tuple[str, ...]
    base: str | None
    vae: str | None
    tokenizer: str | None
    negative: str
    seed: int
    count: int
    steps: int
    guidance: float
    strength: float
    width: int | None
    height: int | None
    output: Path


def run(request: Request) -> None:
    """Draw every prompt `count` times, with seeds counting up, and say where the pictures are."""
    console = Terminal()
    _check(request)
    file = read_lora(request.file)
    facts = base_facts(
        request.base or _base_of(file),
        vae=Path(request.vae).expanduser() if request.vae else None,
        tokenizer=Path(request.tokenizer).expanduser() if request.tokenizer else None,
    )
    device = choose_device("auto", "auto", "sdpa", width=facts.attention.width)
    backbone: Backbone = FAMILIES.load(facts.family).load(
        facts, LoadOptions(device.device, device.dtype, device.attention)
    )
    for attached in load_lora(backbone, file):
        attached.set_multiplier(request.strength)
    side = 8 * facts.pixels_per_latent
    size = Size(
        max(side, (request.width or facts.resolution) // side * side),
        max(side, (request.height or facts.resolution) // side * side),
    )
    prompts = [
        PreviewPrompt(
            text=text,
            negative=request.negative,
            size=size,
            seed=request.seed + number,
            guidance=request.guidance,
            steps=request.steps,
            triggered=True,
        )
        for text in request.prompts
        for number in range(request.count)
    ]
    images = draw(backbone, prompts)
    sampler = type(backbone.pipeline().scheduler).__name__.removesuffix("Scheduler")
    try:
        for prompt, image in zip(prompts, images, strict=True):
            path = _free_path(request.output, request.file.stem, prompt.seed)
            save_preview(path, image, prompt, model=facts.name, sampler=sampler)
            console.print(f"{path}  {prompt.text}", soft_wrap=True)
    except OSError as error:
        raise OutputError(
            f"The picture cannot be written: {error.strerror or error}",
            where=str(request.output),
            fix="Give a folder you may write to after --output.",
        ) from error


def load_lora(backbone: Backbone, file: LoraFile) -> list[Attached]:
    """Attach the layers that a LoRA file holds, with its weights.

    Raises:
        FileFormatError: it holds no layer of this base, or layers of another shape.
    """
    attached = []
    used: set[str] = set()
    for component, root in backbone.components.items():
        naming = naming_for(backbone, component)
        paths = [path for path, layer in root.named_modules() if isinstance(layer, Linear | Conv2d)]
        found = names_in(file.tensors, paths, naming)
        used |= set(found.values())
        ranks = {path: _rank(file, name) for path, name in found.items()}
        for rank in sorted(set(ranks.values())):
            of_rank = [path for path, own in ranks.items() if own == rank]
            layers = attach(root, of_rank, rank=rank, alpha=float(rank), seed=0)
            own = {
                key: tensor
                for key, tensor in file.tensors.items()
                if key.split(".")[0] in {found[path] for path in of_rank}
            }
            layers.load_state(from_kohya(own, layers, naming))
            attached.append(layers)
    strangers = sorted({name.split(".")[0] for name in file.tensors} - used)
    if strangers:
        shown = "\n".join(strangers[:5])
        raise FileFormatError(
            f"{len(strangers)} of the file's layers are not in this base.",
            where=f"{file.path}\n{shown}",
            fix="Give the base it was made for after --base; "
            "'likeness inspect FILE' says which that is.",
        )
    return attached


def _rank(file: LoraFile, name: str) -> int:
    """The rank of a layer; made before its other numbers are looked at, so it has to be one."""
    down = file.tensors.get(f"{name}.{DOWN}")
    if down is None or down.ndim < 2 or not down.numel() or down.shape[0] > _LARGEST_RANK:
        raise FileFormatError(
            "A layer of the LoRA file is not a plain LoRA.",
            where=f"{file.path}\n{name}",
            fix="'likeness inspect FILE' says which programs can draw with it.",
        )
    return int(down.shape[0])


def _base_of(file: LoraFile) -> str:
    """The base to draw with when none is given: the embedded one, for files made for it."""
    made_for = file.metadata.get("likeness.base") or file.metadata.get("ss_sd_model_name", "")
    if made_for == EMBEDDED_NAME:
        return "embedded"
    raise UsageError(
        f"The LoRA was made for the base '{made_for}'." if made_for else "The LoRA needs its base.",
        where=str(file.path),
        fix="Give that base after --base.",
    )


def _check(request: Request) -> None:
    limits = (
        ("--count", request.count, 1, 1000),
        ("--steps", request.steps, 1, 200),
        ("--guidance", request.guidance, 1, 30),
        ("--seed", request.seed, 0, 2**53),
        ("--strength", request.strength, -10, 10),
        ("--width", 64 if request.width is None else request.width, 32, 2048),
        ("--height", 64 if request.height is None else request.height, 32, 2048),
    )
    for flag, value, lowest, highest in limits:
        if not lowest <= value <= highest:
            raise UsageError(f"{flag} {value} is not between {lowest} and {highest}.")


def _free_path(folder: Path, stem: str, seed: int) -> Path:
    """A name that is not taken, so that no picture is ever overwritten."""
    number = 1
    while (path := folder / f"{stem}_seed{seed}_{number:03d}.png").exists():
        number += 1
    return path
