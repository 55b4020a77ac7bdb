"""The command line: parse it, call one command, and turn every error into words and an exit code.

Exit codes: 0 done, 1 an error that is explained, 2 usage or settings, 130/143 stopped after saving.
Nothing heavy is imported before a command is chosen.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from trainer import __version__
from trainer.errors import Stopped, TrainerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    _plain_output()
    parser = build_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser.parse_args(given)
    except SystemExit as exit_:  # argparse has printed the reason, or the help
        return int(exit_.code or 0)
    _quiet_libraries()
    try:
        return _run(options, given)
    except Stopped as stopped:
        print(stopped.message, file=sys.stderr)
        return stopped.exit_code
    except TrainerError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "\nStopped. What was saved before stays; a training goes on from there with --resume.",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        print(
            f"\nA file could not be read or written: {error.strerror or error}\n"
            f"  {error.filename or ''}\nFree some space or make the folder writable; a training "
            "goes on from its last checkpoint with --resume.",
            file=sys.stderr,
        )
        return 1
    except Exception as error:  # the one place where anything may be caught
        return _unexpected(error)


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
    _add_sample(commands)
    _add_inspect(commands)
    _add_caption(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a LoRA from a folder of photos",
        description="Train a LoRA from a folder of photos. Everything else has a good default.",
        epilog="All settings for --set, with meaning and range: docs/settings.md",
    )
    train.add_argument("photos", type=Path, metavar="FOLDER", help="the folder of photos")
    train.add_argument("--kind", choices=("face", "style"), help="what is learned (default: face)")
    train.add_argument("--trigger", metavar="WORD", help="the word that calls it up later")
    train.add_argument("--class", dest="class_noun", metavar="NOUN", help="what the photos show")
    train.add_argument(
        "--base", metavar="FOLDER", help="base model (default: the embedded base, for trying out)"
    )
    train.add_argument("--config", type=Path, metavar="FILE.toml", help="settings file")
    train.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="one setting; may be given several times",
    )
    train.add_argument(
        "--output", type=Path, metavar="DIR", help="output folder (default: a new one in runs/)"
    )
    train.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    train.add_argument(
        "--overwrite", action="store_true", help="replace the run in the output folder"
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
    sample.add_argument("--base", metavar="FOLDER", help="the base that the file was made for")
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


def _add_caption(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    caption = commands.add_parser(
        "caption",
        help="write captions for photos, to be edited before training",
        description="Write what each photo shows into a .txt file beside it. Our own captioner "
        "knows the embedded base's drawings only; for photos give one that knows them.",
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
        metavar="FOLDER",
        help="a captioning model in transformers format, such as BLIP (default: our own)",
    )
    caption.add_argument("--recursive", action="store_true", help="sub-folders too")
    caption.add_argument(
        "--overwrite", action="store_true", help="replace the .txt files that are there"
    )


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    if options.command == "train":
        from trainer.commands import train
        from trainer.commands.decide import Request

        train.run(
            Request(
                photos=options.photos,
                kind=options.kind,
                trigger=options.trigger,
                class_noun=options.class_noun,
                base=options.base,
                config=options.config,
                overrides=tuple(options.overrides),
                output=options.output,
                resume=options.resume,
                overwrite=options.overwrite,
                command=_quoted(["likeness", *given]),
            )
        )
    elif options.command == "sample":
        from trainer.commands import sample

        sample.run(
            sample.Request(
                file=options.file,
                prompts=tuple(options.prompt),
                base=options.base,
                negative=options.negative,
                seed=options.seed,
                count=options.count,
                steps=options.steps,
                guidance=options.guidance,
                strength=options.strength,
                width=options.width,
                height=options.height,
                output=options.output,
            )
        )
    elif options.command == "caption":
        from trainer.commands import caption

        caption.run(
            caption.Request(
                photos=options.photos,
                kind=options.kind,
                captioner=options.captioner,
                recursive=options.recursive,
                overwrite=options.overwrite,
            )
        )
    else:
        from trainer.commands import inspect

        inspect.run(options.file, as_json=options.json)
    return 0


def _quiet_libraries() -> None:
    """Settings that libraries read when they are imported; what the user has set stays."""
    # Threads that wait without spinning do not stall each other on a machine that is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What a photographer cannot act on is not shown; real errors still are.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _quoted(words: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in words)


def _plain_output() -> None:
    """Never fail on a character that the console cannot show (old Windows code pages)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _unexpected(error: Exception) -> int:
    """Say that this is our fault, and where the details are."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="likeness-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    print(
        f"\nSomething went wrong that should not have: {type(error).__name__}: {error}\n"
        f"  {file.name}\n"
        "That file holds the details; please send it with a report. Nothing of yours was changed.",
        file=sys.stderr,
    )
    return 1
