"""`likeness convert IN OUT --to FORM`: write a LoRA as another program wants it."""

from __future__ import annotations

from pathlib import Path

from trainer.adapters.convert import convert
from trainer.adapters.forms import Form


def run(source: Path, target: Path, *, to: Form, family: str, overwrite: bool) -> None:
    """Convert, and say what was written.

    Args:
        source: a LoRA file of any program, or a folder of peft.
        target: a file, for peft a folder.
        to: "kohya", "diffusers" or "peft".
        family: "sd1", "sd2" or "sdxl", or "" to tell it from the file.
        overwrite: replace what is there.

    Raises:
        FileFormatError: the source cannot be read, or not be said in that form.
        OutputError: the target is there already, or cannot be written.
    """
    made = convert(source, target, to=to, family=family, overwrite=overwrite)
    print(f"{target}: {made.layers} layers, {made.tensors} tensors, {made.dtype}")
