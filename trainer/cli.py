"""The command line: parse it, call one command, and turn every error into words and an exit code.

Exit codes: 0 done, 1 an error that is explained, 2 usage or settings, 130/143 stopped after saving.
Nothing heavy is imported before a command is chosen.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from trainer.errors import Stopped, TrainerError
from trainer.parser import build_parser
from trainer.untrusted import printable
from trainer.waiting import choose_waiting


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    _plain_output()
    parser = build_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _said_once():
            options = parser.parse_args(given)
    except SystemExit as exit_:  # argparse has printed the reason, or the help
        return int(exit_.code or 0)
    _quiet_libraries()
    try:
        return _run(options, given)
    except Stopped as stopped:
        print(printable(stopped.message), file=sys.stderr)
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
            f"  {printable(str(error.filename or ''))}\n"
            "Free some space or make the folder writable; a training goes on from its last "
            "checkpoint with --resume.",
            file=sys.stderr,
        )
        return 1
    except Exception as error:  # the one place where anything may be caught
        return _unexpected(error)


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Call the command; only now is anything heavy imported."""
    calls: dict[str, Callable[[argparse.Namespace, Sequence[str]], int | None]] = {
        "train": _train,
        "prepare": _prepare,
        "sample": _sample,
        "caption": _caption,
        "inspect": _inspect,
        "convert": _convert,
        "cache": _cache,
    }
    return calls[options.command](options, given) or 0


@contextmanager
def _said_once() -> Iterator[None]:
    """Of processes that train together, the first one says what is wrong with the command line."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _train(options: argparse.Namespace, given: Sequence[str]) -> None:
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
            overrides=_overrides(options),
            output=options.output,
            resume=options.resume is not None,
            resume_from=Path(options.resume) if options.resume else None,
            init=options.init,
            overwrite=options.overwrite,
            preflight=options.preflight,
            command=_quoted(["likeness", *given]),
        )
    )


def _prepare(options: argparse.Namespace, _given: Sequence[str]) -> int:
    from trainer.commands import prepare

    return prepare.run(
        prepare.Request(
            photos=options.photos,
            kind=options.kind,
            trigger=options.trigger,
            class_noun=options.class_noun,
            base=options.base,
            config=options.config,
            overrides=_overrides(options),
            json=options.json,
            page=options.page,
        )
    )


def _overrides(options: argparse.Namespace) -> tuple[str, ...]:
    """The settings that were typed, those with a flag of their own last."""
    parts = {"model.vae": options.vae, "model.tokenizer": options.tokenizer}
    # A text in JSON's quotes is one in TOML as well, whatever is in it.
    flags = [f"{name}={json.dumps(value)}" for name, value in parts.items() if value is not None]
    return (*options.overrides, *flags)


def _sample(options: argparse.Namespace, _given: Sequence[str]) -> None:
    from trainer.commands import sample

    sample.run(
        sample.Request(
            file=options.file,
            prompts=tuple(options.prompt),
            base=options.base,
            vae=options.vae,
            tokenizer=options.tokenizer,
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


def _caption(options: argparse.Namespace, _given: Sequence[str]) -> None:
    from trainer.commands import caption

    caption.run(
        caption.Request(
            photos=options.photos,
            kind=options.kind,
            captioner=options.captioner,
            model=options.model,
            prompt=options.prompt,
            threshold=options.threshold,
            character_threshold=options.character_threshold,
            exclude=options.exclude,
            rating=options.rating,
            recursive=options.recursive,
            overwrite=options.overwrite,
        )
    )


def _inspect(options: argparse.Namespace, _given: Sequence[str]) -> None:
    from trainer.commands import inspect

    inspect.run(options.file, as_json=options.json)


def _convert(options: argparse.Namespace, _given: Sequence[str]) -> None:
    from trainer.commands import convert

    convert.run(
        options.source,
        options.target,
        to=options.to,
        family=options.family,
        overwrite=options.overwrite,
    )


def _cache(options: argparse.Namespace, _given: Sequence[str]) -> None:
    from trainer.commands import cache

    cache.run(
        cache.Request(prune_days=options.prune_days, limit_gb=options.limit_gb, clear=options.clear)
    )


def _quiet_libraries() -> None:
    """Settings that libraries read when they are imported; what the user has set stays."""
    choose_waiting(os.environ)
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
        "\nSomething went wrong that should not have: "
        f"{printable(f'{type(error).__name__}: {error}')}\n"
        f"  {file.name}\n"
        "That file holds the details; please send it with a report. Nothing of yours was changed.",
        file=sys.stderr,
    )
    return 1
