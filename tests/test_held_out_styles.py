"""The style preset on styles that are in none of the repository's sets."""

from __future__ import annotations

import os

import pytest

from benchmarks.quality import Configuration, run
from benchmarks.sets import all_sets

# Drawn by code that neither pretraining nor the repository's own set uses.
HELD_OUT_STYLES = ("blueprint", "sunset")


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD_OUT_STYLES)
def test_the_style_preset_learns_other_styles_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are followed as the base follows them, in what can be read in true drawings."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    last, _ = run(all_sets()[name], Configuration("preset", ()), seed=0)
    assert last.likeness >= 0.7, last
    assert last.leak <= 0.2, last
    assert last.drift <= 0.25, last
    assert last.style_true >= 0.9, last
    assert last.style_following >= last.style_base - 0.1, last
    assert last.copying == 0, last
