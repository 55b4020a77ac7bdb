"""What can be typed: the commands and their flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="likeness",
        description="Train a Stable Diffusion LoRA of a face, an avatar or a style from a folder "
        "of photos.",
    )
    parser.add_argument("--version", action="version", version=f"likeness {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_prepare(commands)
    _add_sample(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_caption(commands)
    _add_cache(commands)
    return parser


def _add_photos(parser: argparse.ArgumentParser) -> None:
    """A folder of photos and the settings they are trained with."""
    parser.add_argument("photos", type=Path, metavar="FOLDER", help="the folder of photos")
    parser.add_argument("--kind", choices=("face", "style"), help="what is learned (default: face)")
    parser.add_argument("--trigger", metavar="WORD", help="the word that calls it up later")
    parser.add_argument("--class", dest="class_noun", metavar="NOUN", help="what the photos show")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model: a single file, a folder in diffusers format, or a name on the hub "
        "(default: the embedded base, for trying out)",
    )
    _add_parts(parser)
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="one setting; may be given several times",
    )


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """What may take the place of a part of the base."""
    parser.add_argument("--vae", metavar="PATH", help="another VAE: a file or a folder")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="the CLIP tokenizer, for a single file without one"
    )


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a LoRA from a folder of photos",
        description="Train a LoRA from a folder of photos. Everything else has a good default.",
        epilog="All settings for --set, with meaning and range: docs/settings.md",
    )
    _add_photos(train)
    train.add_argument(
        "--output", type=Path, metavar="DIR", help="output folder (default: a new one in runs/)"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on with a run that was stopped, from its newest checkpoint; or from that of "
        "another run folder, or from one checkpoint",
    )
    train.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="start from this LoRA file, of any trainer; rank and layers are its own",
    )
    train.add_argument(
        "--overwrite", action="store_true", help="replace the run in the output folder"
    )
    train.add_argument(
        "--preflight",
        action="store_true",
        help="make one step of the largest bucket and one sample, say what memory and time the run "
        "would take, and end; nothing is written but the cache",
    )


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="say what is wrong with a folder of photos, before training",
        description="Look at every photo of a folder and say what would spoil the training and "
        "what to do about it. Nothing in the folder is changed. The exit code is 1 if the photos "
        "cannot be trained on as they are.",
        epilog="All settings for --set, with meaning and range: docs/settings.md",
    )
    _add_photos(prepare)
    prepare.add_argument(
        "--json", action="store_true", help="print JSON; a page is only written with --page then"
    )
    prepare.add_argument(
        "--page",
        type=Path,
        metavar="FILE.html",
        help="where the page with all photos goes (default: FOLDER-doctor.html, here)",
    )


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sample = commands.add_parser(
        "sample",
        help="draw pictures with a LoRA file",
        description="Draw pictures with a LoRA file on a base model.",
    )
    sample.add_argument("file", type=Path, metavar="FILE", help="the LoRA file")
    sample.add_argument(
        "--prompt", action="append", required=True, help="what to draw; may be given several times"
    )
    sample.add_argument("--base", metavar="MODEL", help="the base that the file was made for")
    _add_parts(sample)
    sample.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    sample.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    sample.add_argument("--count", type=int, default=1, help="pictures per prompt (default: 1)")
    sample.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    sample.add_argument("--guidance", type=float, default=5.0, help="guidance (default: 5)")
    sample.add_argument("--strength", type=float, default=1.0, help="LoRA's weight (default: 1)")
    sample.add_argument("--width", type=int, metavar="PX", help="width (default: the base's)")
    sample.add_argument("--height", type=int, metavar="PX", help="height (default: the base's)")
    sample.add_argument(
        "--output", type=Path, default=Path("samples"), metavar="DIR", help="default: samples/"
    )


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what is in a LoRA file",
        description="Say what is in a LoRA file of any trainer.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="the LoRA file")
    inspect.add_argument("--json", action="store_true", help="as JSON")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="write a LoRA file as another program wants it",
        description="Write a LoRA file of any trainer as another program wants it, with the same "
        "effect. What cannot be said in that form is refused, and nothing is written.",
    )
    convert.add_argument(
        "source", type=Path, metavar="IN", help="the LoRA file, or a folder saved by peft"
    )
    convert.add_argument(
        "target", type=Path, metavar="OUT", help="the new file; for peft the new folder"
    )
    convert.add_argument(
        "--to",
        required=True,
        choices=("kohya", "diffusers", "peft"),
        help="kohya is what ComfyUI, A1111, Forge, diffusers and kohya's trainer all load",
    )
    convert.add_argument(
        "--family",
        default="",
        choices=("sd1", "sd2", "sdxl"),
        help="what it is for, where the file does not tell",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_caption(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    caption = commands.add_parser(
        "caption",
        help="write captions for photos, to be edited before training",
        description="Write what each photo shows into a .txt file beside it. What is there stays, "
        "so a run that was stopped goes on with the photos that are left.",
        epilog="Captioners: own knows the embedded base's drawings only; transformers is any model "
        "that turns a picture into text (BLIP, Florence-2, LLaVA, Qwen-VL), tagger a WD14 tagger "
        "with its model.onnx and selected_tags.csv, both given by --model; template takes a line "
        "of a text file, filename the words of the photo's name.",
    )
    caption.add_argument("photos", type=Path, metavar="FOLDER", help="the folder of photos")
    caption.add_argument(
        "--kind",
        choices=("face", "style"),
        default="face",
        help="what will be learned (default: face, which leaves out who is shown)",
    )
    caption.add_argument(
        "--captioner",
        default="own",
        metavar="NAME",
        help="own, transformers, tagger, template or filename (default: own)",
    )
    caption.add_argument(
        "--model",
        default="",
        metavar="FOLDER",
        help="the model's folder or its name on the Hugging Face hub; for template a text file",
    )
    caption.add_argument(
        "--prompt", metavar="TEXT", help="what transformers is asked (default: what suits it)"
    )
    caption.add_argument(
        "--threshold", type=float, metavar="P", help="tagger: least probability (default: 0.35)"
    )
    caption.add_argument(
        "--character-threshold",
        type=float,
        metavar="P",
        help="tagger: the same for names of characters (default: 0.85; none for a face)",
    )
    caption.add_argument(
        "--exclude", default="", metavar="TAGS", help="tagger: tags to leave out, with commas"
    )
    caption.add_argument("--rating", action="store_true", help="tagger: write the rating, too")
    caption.add_argument("--recursive", action="store_true", help="sub-folders too")
    caption.add_argument(
        "--overwrite", action="store_true", help="replace the .txt files that are there"
    )


def _add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser(
        "cache",
        help="show what is kept on disk of earlier runs, or make it smaller",
        description="Show what is kept on disk of earlier runs. All of it can be made again, so "
        "deleting it only costs the next run some time.",
    )
    cache.add_argument(
        "--prune-days", type=float, metavar="N", help="delete what no run has used for N days"
    )
    cache.add_argument(
        "--limit",
        type=float,
        metavar="GB",
        dest="limit_gb",
        help="delete what was not used for the longest until the rest is at most this large",
    )
    cache.add_argument("--clear", action="store_true", help="delete everything in it")
