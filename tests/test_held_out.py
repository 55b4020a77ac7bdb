"""The face preset on avatars that are in none of the repository's sets: it is tuned to no one."""

from __future__ import annotations

import os

import pytest

from benchmarks.quality import Configuration, run
from benchmarks.sets import HELD_OUT_AVATARS, all_sets


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HELD_OUT_AVATARS))
def test_the_face_preset_learns_other_avatars_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed each, held to what the mean of five is for the main set."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    last, best = run(all_sets()[name], Configuration("preset", ()), seed=0)
    for row in (last, best):
        assert row.likeness >= 0.7, row
        assert row.leak <= 0.2, row
        assert row.drift <= 0.25, row
        assert row.following >= row.base_following - 0.1, row
        assert row.copying == 0, row
