"""The libraries that models come from, imported by a thread while photos are read.

They take seconds, and photos are decoded outside of Python's lock. Nothing may import the same
libraries meanwhile: two threads that go through modules that import each other find them half
done. So whoever begins waits before anything else is done than reading.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from threading import Thread

# What every base takes, whether it is trained on or drawn with.
_MODULES = (
    "transformers.models.clip.modeling_clip",
    "diffusers.models.unets.unet_2d_condition",
)
_threads: list[Thread] = []


def begin() -> None:
    """Start to import. The end of the process does not wait for it."""
    if not _threads:
        thread = Thread(target=_import, name="imports", daemon=True)
        _threads.append(thread)
        thread.start()


def wait() -> None:
    """Return when what was begun is done; at once if nothing was."""
    for thread in _threads:
        thread.join()


def _import() -> None:
    for name in _MODULES:
        # What cannot be imported is told where it is needed: there it is imported again.
        with suppress(ImportError):
            import_module(name)
