"""Where the presets, prompts and the embedded base are: beside the package or inside it."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ConfigError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
REPOSITORY = ASSETS.parent.parent
EMBEDDED_BASE = ASSETS / "base"
OWN_CAPTIONER = ASSETS / "captioner"


def shipped_folder(name: str) -> Path:
    """`configs` or `prompts`: in a checkout at the top, in an installed wheel among the assets."""
    packaged = ASSETS / name
    return packaged if packaged.is_dir() else REPOSITORY / name


def preset_path(kind: str, *, embedded: bool) -> Path:
    """The preset of a kind of training (`face`, `style`) for the embedded or for real bases."""
    return shipped_folder("configs") / f"{'embedded-' if embedded else ''}{kind}.toml"


def prompts_path(name: str) -> Path:
    """The prompts file that `preview.prompts` names: a path, or the name of a shipped one.

    Raises:
        ConfigError: there is neither.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    shipped = {path.stem: path for path in sorted(shipped_folder("prompts").glob("*.txt"))}
    if name in shipped:  # not put together from the name, which could lead anywhere
        return shipped[name]
    raise ConfigError(
        "There is no such prompts file.",
        where=f"preview.prompts = {name!r}",
        fix="Give the path of a text file with one prompt per line, or one of: "
        f"{', '.join(shipped)}",
    )
