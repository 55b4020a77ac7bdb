"""What is to be said of a set as a whole: whether its photos are enough, and differ enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trainer.data.decode import shown
from trainer.doctor.findings import Finding, PhotoVerdict
from trainer.doctor.framing import face_share, turned
from trainer.doctor.given import Checkup
from trainer.doctor.rounds import Rounds
from trainer.types import Face

# With fewer photos a face is learned together with what else they share; a style needs more
# pictures than a face, to be told from what they show.
FEW_FACES = 5
SOME_FACES = 10
FEW_OF_A_STYLE = 10
# From so many photos on, what all of them share is no accident.
ENOUGH_TO_COMPARE = 5
SAME_BACKGROUND = 12  # of 255: colours of the border within this of their median
SAME_POSE = 0.08  # in distances between the eyes; see `turned`
CLOSE_UP_FROM = 0.6  # of the picture's shorter side
FAR_UP_TO = 0.25
# How often each photo is seen in a training that goes well, by experience; between these two
# nothing is said. A face is learned from fewer photos, each seen more often.
SEEN_OFTEN = {"face": 250, "style": 200}
SEEN_RARELY = {"face": 20, "style": 10}
SEEN_WELL = 100
NAMES_LISTED = 5


@dataclass(frozen=True, slots=True)
class Folder:
    """What the checks of the whole go by: the checkup, and the verdicts on the photos learned."""

    checkup: Checkup
    verdicts: Sequence[PhotoVerdict]
    rounds: Rounds

    @property
    def usable(self) -> list[PhotoVerdict]:
        return [verdict for verdict in self.verdicts if verdict.level != "bad"]

    @property
    def faces(self) -> list[tuple[Face, PhotoVerdict]]:
        """The largest face of each photo that has one."""
        return [
            (verdict.facts.faces[0], verdict)
            for verdict in self.usable
            if verdict.facts and verdict.facts.faces
        ]

    @property
    def of_face(self) -> bool:
        return self.checkup.kind == "face"


def judge_whole(folder: Folder) -> tuple[Finding, ...]:
    """The findings on the photos that are learned, by every check in turn."""
    return tuple(finding for check in CHECKS for finding in check(folder))


def too_few(folder: Folder) -> Iterator[Finding]:
    count = len(folder.usable)
    fix = "Add photos of other places, light, clothes and expressions."
    if count == 0:
        fix = "See what is said of each of them."
        yield Finding("no_photos", "bad", "None of the photos can be used.", fix)
    elif folder.of_face and count < FEW_FACES:
        what = f"There {_are(count)}: too few to tell the face from the rest of the pictures."
        yield Finding("few_photos", "warning", what, fix)
    elif folder.of_face and count < SOME_FACES:
        what = f"There {_are(count)}; {SOME_FACES} to 20 give a better likeness."
        yield Finding("few_photos", "note", what, fix)
    elif not folder.of_face and count < FEW_OF_A_STYLE:
        what = f"There {_are(count)}: too few to tell the style from what they show."
        yield Finding("few_photos", "warning", what, "Add pictures of other things in this style.")


def one_pose(folder: Folder) -> Iterator[Finding]:
    turns = [turn for face, _ in folder.faces if (turn := turned(face)) is not None]
    if not folder.of_face or len(turns) < ENOUGH_TO_COMPARE:
        return
    middle = _median(turns)
    if all(abs(turn - middle) <= SAME_POSE for turn in turns):
        what = "All faces are turned the same way."
        fix = "Add some from the left, the right and the front, or only this pose is learned."
        yield Finding("one_pose", "warning", what, fix)


def one_background(folder: Folder) -> Iterator[Finding]:
    colours = [verdict.facts.background for verdict in folder.usable if verdict.facts]
    if not folder.of_face or len(colours) < ENOUGH_TO_COMPARE:
        return
    middle = [_median(channel) for channel in zip(*colours, strict=True)]
    if all(
        abs(value - mean) <= SAME_BACKGROUND
        for colour in colours
        for value, mean in zip(colour, middle, strict=True)
    ):
        what = "All photos have a background of the same colour."
        fix = "Add photos from other places, or name the background in every caption."
        yield Finding("one_background", "warning", what, fix)


def one_distance(folder: Folder) -> Iterator[Finding]:
    shares = [face_share(face, crop) for face, v in folder.faces for crop in v.crops[:1]]
    if not folder.of_face or len(shares) < ENOUGH_TO_COMPARE:
        return
    if min(shares) >= CLOSE_UP_FROM:
        fix = "Add some that show the upper body."
        yield Finding("one_distance", "note", "All photos are close-ups.", fix)
    elif max(shares) <= FAR_UP_TO:
        what = "No photo is a close-up: the faces are small in all of them."
        yield Finding("one_distance", "note", what, "Add some that show little but the face.")


def same_captions(folder: Folder) -> Iterator[Finding]:
    captioned = [verdict.captioned for verdict in folder.usable if verdict.captioned]
    if len(captioned) < 2 or len({c.texts for c in captioned}) > 1:
        return
    what = f"All photos have the same caption: '{shown(captioned[0].text)}'."
    fix = "Write what each photo shows into a .txt file beside it; 'likeness caption' does it."
    yield Finding("same_captions", "note" if folder.of_face else "warning", what, fix)


def without_captions(folder: Folder) -> Iterator[Finding]:
    for checked in folder.checkup.subjects:
        if checked.mostly_without_caption:
            bare, number = checked.without_caption, len(checked.captioned)
            used = shown(bare[0].text)
            what = f"{len(bare)} of {number} photos have no caption: '{used}' is used."
            fix = "Write what each shows into a .txt file beside it; 'likeness caption' does it."
            yield Finding("no_captions", "note", what, fix)


def no_triggers(folder: Folder) -> Iterator[Finding]:
    for checked in folder.checkup.subjects:
        if checked.written and all(checked.lacks_trigger(sidecar) for sidecar in checked.written):
            what = f"No caption file names the trigger word '{shown(checked.trigger)}'."
            yield Finding("no_trigger", "note", what, "It is added to each in the training.")


def unused_folders(folder: Folder) -> Iterator[Finding]:
    scans = [checked.scan for checked in folder.checkup.sets]
    files = [*(photo.path for scan in scans for photo in scan.photos)]
    files += [problem.path for scan in scans for problem in scan.problems]
    used = {path.resolve() for path in {file.parent for file in files}}
    paths = [path for scan in scans for path in scan.below if path.resolve() not in used]
    if paths:
        names = ", ".join(folder.checkup.name(path) for path in paths[:NAMES_LISTED])
        more = f" and {len(paths) - NAMES_LISTED} more" if len(paths) > NAMES_LISTED else ""
        what = f"Pictures in sub-folders are not used: {names}{more}."
        fix = "To train on them too, set data.recursive=true or name the folder in data.sets."
        yield Finding("unused_folders", "warning", what, fix)


def orphans(folder: Folder) -> Iterator[Finding]:
    paths = [path for checked in folder.checkup.sets for path in checked.orphans]
    if not paths:
        return
    names = ", ".join(folder.checkup.name(path) for path in paths[:NAMES_LISTED])
    if len(paths) > NAMES_LISTED:
        names += f" and {len(paths) - NAMES_LISTED} more"
    what = f"Text without a photo of the same name: {names}."
    yield Finding("orphan_caption", "note", what, "If it is a caption, rename it like its photo.")


def seen_too_often(folder: Folder) -> Iterator[Finding]:
    """The steps that lead to a photo being seen so often that it is learned by heart."""
    seen, limit = folder.rounds.seen, SEEN_OFTEN.get(folder.checkup.kind)
    if seen and limit and max(seen.values()) > limit:
        what = (
            f"Photos are seen {max(seen.values()):,.0f} times each: they may be learned by heart."
        )
        steps = _steps_for(folder, max(seen.values()))
        yield Finding("seen_often", "warning", what, f"Add photos, or {steps}.")


def seen_too_rarely(folder: Folder) -> Iterator[Finding]:
    seen, limit = folder.rounds.seen, SEEN_RARELY.get(folder.checkup.kind)
    if seen and limit and min(seen.values()) < limit:
        what = f"Photos are seen only {min(seen.values()):,.0f} times each: little will be learned."
        steps = _steps_for(folder, min(seen.values()))
        yield Finding("seen_rarely", "note", what, f"{steps[0].upper()}{steps[1:]}.")


CHECKS: tuple[Callable[[Folder], Iterator[Finding]], ...] = (
    too_few,
    one_pose,
    one_background,
    one_distance,
    same_captions,
    without_captions,
    no_triggers,
    unused_folders,
    orphans,
    seen_too_often,
    seen_too_rarely,
)


def _are(count: int) -> str:
    return "is one photo" if count == 1 else f"are {count} photos"


def _steps_for(folder: Folder, seen: float) -> str:
    """What to set the steps to so that photos are seen about `SEEN_WELL` times, in two digits."""
    steps = folder.checkup.total_steps * SEEN_WELL / seen
    digits = max(0, len(str(int(steps))) - 2)
    rounded = max(1, round(steps / 10**digits) * 10**digits)
    return f"set run.total_steps to about {rounded}"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
