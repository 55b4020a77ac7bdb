"""A checkup of photos -> the diagnosis: what is to be said of each of them, and of all together.

Nothing is read or measured here: equal input gives an equal diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from trainer.data.listing import natural_key
from trainer.data.photos import PhotoProblem
from trainer.doctor.findings import Diagnosis, PhotoVerdict
from trainer.doctor.given import CheckedSet, Checkup
from trainer.doctor.rounds import plan_rounds
from trainer.doctor.twins import Twin, find_twins
from trainer.doctor.verdicts import Patient, judge, judge_problem
from trainer.doctor.whole import Folder, judge_whole
from trainer.types import Bucketed

__all__ = ["CheckedSet", "Checkup", "diagnose"]


def diagnose(checkup: Checkup) -> Diagnosis:
    """Judge every photo, and the set as a whole.

    Every picture of the folders, readable or not, gets exactly one verdict: set by set, in natural
    order of their names.
    """
    photos = [photo for checked in checkup.sets for photo in checked.scan.photos]
    twins = find_twins(photos, checkup.facts)
    lost = {problem.path: problem for problem in checkup.lost}
    count = cache(checkup.count_tokens) if checkup.count_tokens else None
    verdicts: list[PhotoVerdict] = []
    learned: list[PhotoVerdict] = []
    for checked in checkup.sets:
        found = [judge_problem(problem, checked) for problem in checked.scan.problems]
        found += [judge(patient) for patient in _patients(checked, checkup, twins, lost, count)]
        found.sort(key=lambda verdict: natural_key(verdict.path))
        verdicts += found
        learned += found if checked.role == "subject" else []
    rounds = plan_rounds(checkup)
    return Diagnosis(
        folder=checkup.folder,
        photos=tuple(verdicts),
        whole=judge_whole(Folder(checkup, learned, rounds)),
        buckets=rounds.buckets,
        steps=rounds.steps,
        faces_by=checkup.faces_by,
    )


def _patients(
    checked: CheckedSet,
    checkup: Checkup,
    twins: Mapping[Path, Twin],
    lost: Mapping[Path, PhotoProblem],
    count: Callable[[str], int] | None,
) -> Iterator[Patient]:
    """The photos of a set, each with all that is known of it."""
    captioned = {item.photo.path: item for item in checked.captioned}
    crops: dict[Path, list[Bucketed]] = {}
    for crop in checked.crops:
        crops.setdefault(crop.captioned.photo.path, []).append(crop)
    never_triggered = all(checked.lacks_trigger(sidecar) for sidecar in checked.written)
    few_without = bool(checked.written) and not checked.mostly_without_caption
    for photo in checked.scan.photos:
        item = captioned.get(photo.path)
        yield Patient(
            photo=photo,
            checked=checked,
            checkup=checkup,
            captioned=item,
            crops=tuple(crops.get(photo.path, ())),
            facts=checkup.facts.get(photo.digest),
            sidecar=checked.sidecars.get(photo.path),
            tokens=max(count(text) for text in item.texts) if item and count else None,
            twin=twins.get(photo.path),
            lost=lost.get(photo.path),
            never_triggered=never_triggered,
            alone_without_caption=bool(few_without and item and item.origin == "template"),
        )
