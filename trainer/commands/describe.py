"""The captioner that settings or flags name, as a function of a photo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from trainer.captioners import CAPTIONERS, Captioner
from trainer.config.presets import OWN_CAPTIONER
from trainer.config.settings import TrainConfig
from trainer.data.decode import decode_upright
from trainer.errors import ConfigError
from trainer.families import BaseFacts
from trainer.training.device import choose_device
from trainer.types import Photo

# The name of our own captioner, where a folder could be given.
OWN = "own"


def describer_of(
    config: TrainConfig, facts: BaseFacts, console: Console
) -> Callable[[Photo], str] | None:
    """What describes a run's photos without a sidecar, if anything.

    Raises:
        ConfigError: there is no such captioner, or only our own for a base that is not ours.
    """
    name, folder = config.caption.captioner, config.caption.captioner_folder
    if name == "auto":
        name = "blip" if folder != OWN or facts.embedded else "none"
    if name == "none":
        return None
    CAPTIONERS[name]
    if folder == OWN and not facts.embedded:
        raise ConfigError(
            "Our own captioner knows the embedded base's drawings only.",
            where=f"caption.captioner = {name!r}",
            fix="Give the folder of a captioning model for photos, such as BLIP: "
            "--set caption.captioner_folder=FOLDER",
        )
    red, green, blue = bytes.fromhex(config.data.background.removeprefix("#"))
    return describer(
        name,
        folder,
        console,
        kind=config.run.kind,
        background=(red, green, blue),
        device=config.model.device,
    )


def describer(
    name: str,
    folder: str,
    console: Console,
    *,
    kind: str,
    background: tuple[int, int, int],
    device: str,
) -> Callable[[Photo], str]:
    """A function that says what a photo shows; the captioner is loaded when it is first asked.

    Args:
        name: of the captioner, in `CAPTIONERS`.
        folder: with its weights, or "own".
        console: where it is said that this begins; large captioners take seconds for a photo.
        kind: what is learned from the photos: `face` or `style`.
        background: colour behind transparent pictures, RGB 0..255.
        device: where it runs, as in `model.device`.
    """
    loaded: list[Captioner] = []

    def describe(photo: Photo) -> str:
        if not loaded:
            whose = "our own captioner" if folder == OWN else f"the captioner in {folder}"
            console.print(
                f"Describing photos with {whose}", markup=False, highlight=False, soft_wrap=True
            )
            place = OWN_CAPTIONER if folder == OWN else Path(folder).expanduser()
            chosen = choose_device(device, "fp32", "auto").device
            loaded.append(CAPTIONERS.load(name)(place, chosen))
        return loaded[0].caption(decode_upright(photo.path, background=background), kind)

    return describe
