"""Encoded pictures whose numbers are not finite: named with their photo, before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trainer.data.decode import shown
from trainer.errors import DeviceError
from trainer.types import Bucketed, CachedSample

_MOST_LINES = 10
_FIX = "Set model.precision=fp32; if it is that already, copy or download the base again."


def only_finite(
    photos: Sequence[Bucketed],
    samples: Sequence[CachedSample],
    *,
    skip_bad: bool,
    say: Callable[[str], None],
) -> dict[Bucketed, CachedSample]:
    """The samples by their pictures, if all of their numbers are finite.

    Args:
        photos, samples: side by side.
        skip_bad: leave out the others and say so.
        say: shows a sentence to the user.

    Raises:
        DeviceError: some are not, or all; it names their photos.
    """
    good, lines = {}, []
    for photo, sample in zip(photos, samples, strict=True):
        if what := not_finite(sample):
            lines.append(f"{shown(photo.captioned.photo.path)}: its {what} are not finite numbers")
        else:
            good[photo] = sample
    lines = list(dict.fromkeys(lines))
    if not lines:
        return good
    more = len(lines) - _MOST_LINES
    where = "\n".join([*lines[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])])
    if good and skip_bad:
        say(f"Left out, since the base cannot encode them:\n{where}")
        return good
    out = "\nOr train without them: --set data.skip_bad=true" if good else ""
    raise DeviceError(
        f"The base cannot encode {len(lines)} of the photos.", where=where, fix=_FIX + out
    )


def require_finite(samples: Sequence[CachedSample]) -> None:
    """Make sure of the same for pictures that the base itself has drawn.

    Raises:
        DeviceError: one is not.
    """
    for sample in samples:
        if what := not_finite(sample):
            raise DeviceError(
                f"The base cannot draw '{shown(sample.text)}': the {what} are not finite numbers.",
                fix=_FIX,
            )


def not_finite(sample: CachedSample) -> str:
    """What of a sample is not finite, in words; "" if all of it is."""
    if not torch.isfinite(sample.latents_Chw).all():
        return "latents"
    embeddings = [t for t in (sample.prompt_TD, sample.pooled_P) if t is not None]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in embeddings):
        return "caption's embeddings"
    return ""
