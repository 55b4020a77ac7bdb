"""The quality bench: its plan, its sets, what it measures, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality import Configuration, read_plan
from benchmarks.quality_rows import Row
from benchmarks.quality_table import read_rows
from benchmarks.sets import FaceSet, all_sets
from pretraining.looks import HELD_OUT_HAIR_STYLE, HELD_OUT_MARK, HELD_OUT_SKIN, sample_identity
from trainer.scoring import SCORERS


def test_the_plan_in_the_repository_is_one_that_was_asked_for() -> None:
    plan = read_plan(quality.ROOT / "benchmarks" / "quality.toml")
    names = [configuration.name for configuration in plan.configurations]
    assert len(names) == len(set(names)) >= 20
    assert len(plan.seeds) >= 3
    assert set(plan.sets) <= set(all_sets())
    different = {configuration.settings for configuration in plan.configurations}
    assert len(different) == len(names)


def test_settings_of_a_plan_are_those_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        'seeds = [1]\nsets = ["zia"]\n[configurations.a]\n'
        '"optimizer.learning_rate" = 1e-3\n"adapter.text_encoder" = false\n',
        encoding="utf-8",
    )
    (only,) = read_plan(path).configurations
    assert only.settings == ("optimizer.learning_rate=0.001", "adapter.text_encoder=false")


@pytest.mark.parametrize("name", list(all_sets()))
def test_unseen_pictures_score_as_the_subject_and_others_do_not(name: str) -> None:
    chosen = all_sets()[name]
    photos = chosen.photos()
    assert len(photos) == 14
    scorer = SCORERS.load(chosen.score).fit(photos, chosen.others(24))
    unseen, others = scorer.score(chosen.unseen(12)), scorer.score(chosen.others(48)[24:])
    assert np.mean(unseen) > 0.6
    assert abs(np.mean(others)) < 0.3


def test_the_faces_have_looks_that_pretraining_never_shows() -> None:
    known = [sample_identity(seed) for seed in range(3000)]
    for chosen in all_sets().values():
        if isinstance(chosen, FaceSet):
            identity = chosen.identity
            held_out = {HELD_OUT_SKIN, HELD_OUT_HAIR_STYLE, HELD_OUT_MARK}
            assert held_out & {identity.skin, identity.hair_style, identity.mark}
            assert identity not in known


def test_the_looks_of_the_subject_are_found_in_its_pictures_and_not_in_others() -> None:
    for name in ("zia", "otto"):
        chosen = all_sets()[name]
        assert isinstance(chosen, FaceSet)
        own = quality.looks_found(chosen.unseen(12), chosen.identity)
        assert own > quality.looks_found(chosen.others(12), chosen.identity) + 0.3


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, results = tmp_path / "plan.toml", tmp_path / "results" / "q.csv"
    plan.write_text(
        'seeds = [0, 1]\nsets = ["zia"]\n[configurations.preset]\n[configurations.other]\n'
        '"adapter.rank" = 4\n',
        encoding="utf-8",
    )
    asked: list[tuple[str, int]] = []

    def run(chosen: object, configuration: Configuration, seed: int) -> list[Row]:
        asked.append((configuration.name, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        kinds = ("last", "best")
        return [Row("zia", configuration.name, seed, kind, 400, *[0.5] * 9) for kind in kinds]

    monkeypatch.setattr(quality, "run", run)
    words = ["quality", "--plan", str(plan), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        quality.main()
    quality.main()
    every = [("preset", 0), ("preset", 1), ("other", 0), ("other", 1)]
    assert asked == [*every[:3], *every[2:]]
    with results.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    written = [(row["configuration"], int(row["seed"])) for row in rows]
    assert written == [run for run in every for _ in ("last", "best")]


def test_of_a_run_made_again_the_newer_row_stands_in_the_table(tmp_path: Path) -> None:
    head = "set,configuration,seed,checkpoint,likeness\n"
    old, new = tmp_path / "quality_cpu_2026-11-22.csv", tmp_path / "quality_cpu_2026-11-23.csv"
    old.write_text(head + "zia,preset,0,last,0.7\nzia,preset,1,last,0.8\n", encoding="utf-8")
    new.write_text(head + "zia,preset,0,last,0.9\nzia,preset,0,best,0.95\n", encoding="utf-8")
    for paths in ((old, new), (new, old)):
        rows = read_rows(paths)
        assert [(row["seed"], row["likeness"]) for row in rows] == [("0", "0.9"), ("1", "0.8")]
