"""What must be equal for a run to go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.reader import build_config, override_layer
from trainer.training.job import Job, differences, resume_facts
from trainer.training.run_folder import RunFolder
from trainer.types import Box, Bucketed, Captioned, Face, Photo, Size

HERE, THERE = Face(Box(1, 2, 30, 40), 0.9), Face(Box(9, 2, 38, 40), 0.9)
PHOTO = Photo(Path("a.png"), Size(64, 64), "ab" * 32)
PLAIN = Bucketed(Captioned(PHOTO, ("ohwx",), "template"), Size(64, 64), Size(64, 64), 0, 0)


def facts_with(face: Face, face_weight: float) -> dict[str, Any]:
    resolved = build_config([override_layer([("data.face_weight", face_weight)], "test")])
    job = Job(
        source=Path(),
        config=resolved.config,
        origins=resolved.origins,
        facts=None,  # type: ignore[arg-type]
        folder=RunFolder(Path(), "a"),
        photos=(PLAIN.captioned,),
        pictures=(replace(PLAIN, faces=(face,)),),
        class_pictures=(),
        styles={},
        command="",
    )
    return resume_facts(job, "base", ())


def test_faces_found_elsewhere_make_another_run_where_they_weigh_more() -> None:
    assert facts_with(HERE, 3.0)["photos"] != facts_with(THERE, 3.0)["photos"]
    assert facts_with(HERE, 3.0)["photos"] == facts_with(replace(HERE, score=0.8), 3.0)["photos"]


def test_faces_found_elsewhere_change_nothing_where_all_weigh_alike() -> None:
    assert facts_with(HERE, 1.0) == facts_with(THERE, 1.0)


def test_a_setting_that_a_checkpoint_did_not_know_was_as_it_is_by_default() -> None:
    now = facts_with(HERE, 1.0)
    before = {**now, "settings": {k: v for k, v in now["settings"].items() if k != "model.compile"}}
    assert differences(before, now) == []
    asked = {**now, "settings": {**now["settings"], "model.compile": True}}
    assert differences(before, asked) == ["model.compile: was False, now True"]


def test_another_number_format_is_not_another_base() -> None:
    now = {**facts_with(HERE, 1.0), "precision": "fp32"}
    before = {**now, "precision": "fp16", "base": "of fp16"}
    assert differences(before, now) == ["the number format of the base: was fp16, now fp32"]
    del before["precision"]
    assert differences(before, now) == ["the base model: its files have changed"]
