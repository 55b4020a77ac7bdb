"""Giving a finished file its name."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless that is taken by now.

    Args:
        temporary: the file; it may stay beside the new name.
        path: the name, in the same folder.

    Raises:
        FileExistsError: it is taken.
        OSError: the folder cannot be written.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # FAT and some network drives have no links
        with ExitStack() as stack:
            path.open("x").close()
            stack.callback(path.unlink)
            temporary.replace(path)
            stack.pop_all()
