"""What is to be said of each photo: one small function for each check.

Levels: "bad" keeps the photo out, "warning" can spoil the training, "note" is good to know. What a
basic face detector says is never more than a note: it misses many faces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.data.decode import shown
from trainer.data.photos import PhotoProblem
from trainer.data.quality import Sharpness
from trainer.doctor.findings import Finding, Level, PhotoFacts, PhotoVerdict
from trainer.doctor.framing import cut_by_crop, cut_by_frame, face_share
from trainer.doctor.given import CheckedSet, Checkup
from trainer.doctor.sidecars import Sidecar
from trainer.doctor.twins import Twin
from trainer.types import Bucketed, Captioned, Face, Photo

# Trained at less than this share of the resolution's area, a photo counts as too small (a bucket
# of full size has more); at less than the second (half the side), as far too small.
SMALL_AREA = 0.7
FAR_TOO_SMALL_AREA = 0.25
ENLARGED_FROM = 1.05
ENLARGED_MUCH_FROM = 1.5
# Underexposed is what is dark on the whole with hardly anything bright in it, and the other way
# round: a portrait before a black wall is neither. (Photographs darkened to a fifth and brightened
# threefold are found by these; drawings before white are not.)
DARK_MEAN = 35
DARK_BRIGHT_BELOW = 0.02
BRIGHT_MEAN = 220
BRIGHT_FROM = 0.6
BRIGHT_DARK_BELOW = 0.05
# Other faces count from this share of the largest one's height on.
OTHER_FACE = 1 / 3
SMALL_FACE = 0.10
# What one pass of a text encoder reads: 77 tokens, of which two mark beginning and end.
CHUNK_TOKENS = 75


@dataclass(frozen=True, slots=True)
class Patient:
    """A photo with all that is known of it; fields are None or empty where nothing is.

    never_triggered: no caption of its set names the trigger word, which is then said once of all.
    alone_without_caption: it gets the template, where most photos of its set have captions.
    """

    photo: Photo
    checked: CheckedSet
    checkup: Checkup
    captioned: Captioned | None
    crops: tuple[Bucketed, ...]
    facts: PhotoFacts | None
    sidecar: Sidecar | None
    tokens: int | None
    twin: Twin | None
    lost: PhotoProblem | None
    never_triggered: bool
    alone_without_caption: bool

    @property
    def faces(self) -> tuple[Face, ...]:
        """Those that count: by size at least a third of the largest. () unless faces matter."""
        if self.facts is None or not self.facts.faces or not self.shows_face:
            return ()
        least = OTHER_FACE * self.facts.faces[0].box.height
        return tuple(face for face in self.facts.faces if face.box.height >= least)

    @property
    def shows_face(self) -> bool:
        """Whether the photo is to show the face that is learned."""
        return self.checkup.kind == "face" and self.checked.role == "subject"

    @property
    def face_level(self) -> Level:
        return "warning" if self.checkup.faces_certain else "note"

    @property
    def by_whom(self) -> str:
        return "" if self.checkup.faces_certain else " (basic detector)"


Check = Callable[[Patient], Iterator[Finding]]


def judge_problem(problem: PhotoProblem, checked: CheckedSet) -> PhotoVerdict:
    """The verdict on a file that cannot be read as a photo."""
    return PhotoVerdict(problem.path, checked.name, (_unreadable(problem),))


def judge(patient: Patient) -> PhotoVerdict:
    """The verdict on a photo, by every check in turn."""
    return PhotoVerdict(
        path=patient.photo.path,
        set_name=patient.checked.name,
        findings=tuple(finding for check in CHECKS for finding in check(patient)),
        photo=patient.photo,
        captioned=patient.captioned,
        facts=patient.facts,
        crops=patient.crops,
        tokens=patient.tokens,
    )


def _unreadable(problem: PhotoProblem) -> Finding:
    return Finding("unreadable", "bad", problem.reason, problem.fix)


def lost(patient: Patient) -> Iterator[Finding]:
    if patient.lost:
        yield _unreadable(patient.lost)


def bad_caption(patient: Patient) -> Iterator[Finding]:
    sidecar = patient.sidecar
    if sidecar and sidecar.problem:
        what = f"has a caption that cannot be used: {sidecar.problem.rstrip('.')}"
        yield Finding("bad_caption", "bad", what, sidecar.fix)


def notices(patient: Patient) -> Iterator[Finding]:
    for notice in patient.photo.notices:
        yield Finding("notice", "note", notice.rstrip("."), "")


def too_small(patient: Patient) -> Iterator[Finding]:
    if not patient.crops or not patient.checkup.resolutions:
        return
    photo, wanted = patient.photo.size, max(patient.checkup.resolutions)
    crop = max(patient.crops, key=lambda crop: crop.bucket.area)
    times = max(crop.resized.width / photo.width, crop.resized.height / photo.height)
    fix = "Use a larger version, if there is one."
    if times >= ENLARGED_FROM:
        level: Level = "warning" if times >= ENLARGED_MUCH_FROM else "note"
        what = f"has {photo} px and would be enlarged {times:.1f} times to train at {crop.bucket}"
        yield Finding("enlarged", level, what, fix)
    elif crop.bucket.area < SMALL_AREA * wanted**2:
        level = "warning" if crop.bucket.area < FAR_TOO_SMALL_AREA * wanted**2 else "note"
        what = f"has {photo} px, too few for {wanted}: it will be trained at {crop.bucket}"
        yield Finding("small", level, what, fix)


def blurred(patient: Patient) -> Iterator[Finding]:
    facts = patient.facts
    if facts and Sharpness(facts.sharpness, facts.reblur).blurred:
        what = "has a blurred face" if facts.faces else "is blurred"
        fix = "Use a sharper photo: blur is learned too."
        yield Finding("blurred", "warning", what, fix)


def badly_exposed(patient: Patient) -> Iterator[Finding]:
    facts = patient.facts
    if facts is None:
        return
    what = "has a face that is" if facts.faces else "is"
    if facts.mean < DARK_MEAN and facts.bright < DARK_BRIGHT_BELOW:
        text = f"{what} underexposed (mean brightness {facts.mean / 255:.0%})"
        yield Finding("underexposed", "warning", text, "Brighten it, or use another photo.")
    elif facts.mean > BRIGHT_MEAN and facts.bright > BRIGHT_FROM and facts.dark < BRIGHT_DARK_BELOW:
        text = f"{what} overexposed ({facts.bright:.0%} nearly white)"
        yield Finding("overexposed", "warning", text, "Use a photo with more detail in the light.")


def twins(patient: Patient) -> Iterator[Finding]:
    twin = patient.twin
    if twin is None:
        return
    name = patient.checkup.name(twin.other.path)
    other = f"the mirror image of {name}" if twin.mirrored else name
    keep = "Keep one of them, or it counts twice."
    if twin.kinship == "equal":
        yield Finding("duplicate", "warning", f"is the same file as {other}", keep)
    elif twin.kinship == "duplicate":
        yield Finding("duplicate", "warning", f"shows the same as {other}", keep)
    elif twin.kinship == "near":
        yield Finding("near_duplicate", "warning", f"shows nearly the same as {other}", keep)
    else:
        fix = "Keep both only if they differ in what matters."
        yield Finding("similar", "note", f"is similar to {other}", fix)


def how_many_faces(patient: Patient) -> Iterator[Finding]:
    if not patient.shows_face or patient.facts is None or patient.facts.faces is None:
        return
    count = len(patient.faces)
    if count == 0:
        fix = "If there is none, remove the photo."
        certain = patient.checkup.faces_certain
        what = "has no face that could be found" if certain else "no face found (basic detector)"
        yield Finding("no_face", patient.face_level, what, fix)
    elif count > 1:
        verb = "shows" if patient.checkup.faces_certain else "may show"
        fix = "Crop it to the one person, or use another photo."
        what = f"{verb} {count} faces{patient.by_whom}"
        yield Finding("several_faces", patient.face_level, what, fix)


def small_face(patient: Patient) -> Iterator[Finding]:
    if not patient.faces or not patient.crops:
        return
    share = max(face_share(patient.faces[0], crop) for crop in patient.crops)
    if share < SMALL_FACE:
        what = f"has a small face, {share:.0%} of the picture's height{patient.by_whom}"
        fix = "Crop the photo closer to the person."
        yield Finding("small_face", patient.face_level, what, fix)


def cut_face(patient: Patient) -> Iterator[Finding]:
    if not patient.faces:
        return
    face = patient.faces[0]
    if cut_by_frame(face, patient.photo):
        what = f"has a face that the photo's edge cuts off{patient.by_whom}"
        fix = "Use a photo that shows the whole head."
        yield Finding("cut_by_frame", patient.face_level, what, fix)
    for crop in patient.crops:
        if cut_by_crop(face, crop):
            what = f"has a face that is cut when cropped to {crop.bucket}{patient.by_whom}"
            fix = "Crop the photo around the face yourself, to a shape nearer to a square."
            yield Finding("cut_by_crop", patient.face_level, what, fix)
            return


def too_long(patient: Patient) -> Iterator[Finding]:
    tokens, longest = patient.tokens, patient.checkup.longest_tokens
    if tokens is None or tokens <= CHUNK_TOKENS:
        return
    if tokens > longest:
        what = f"has a caption of {tokens} tokens, of which the first {longest} are read"
        yield Finding("long_caption", "warning", what, "Shorten it to what matters.")
    else:
        parts = -(-tokens // CHUNK_TOKENS)
        what = f"has a caption of {tokens} tokens, read in {parts} parts"
        yield Finding("long_caption", "note", what, "")


def caption(patient: Patient) -> Iterator[Finding]:
    captioned, sidecar = patient.captioned, patient.sidecar
    if captioned is None or patient.checked.role != "subject":
        return
    used = f"'{shown(captioned.text)}' is used"
    if sidecar and not sidecar.text:
        what = f"has an empty caption file, {shown(sidecar.path.name)}; {used}"
        yield Finding("empty_caption", "warning", what, "Write into it what the photo shows.")
    elif patient.alone_without_caption:
        what = f"has no caption, while others have; {used}"
        fix = "Write what it shows into a .txt file of the same name."
        yield Finding("no_caption", "note", what, fix)
    elif sidecar and not patient.never_triggered and patient.checked.lacks_trigger(sidecar):
        what = f"has a caption without the trigger word '{shown(patient.checked.trigger)}'"
        yield Finding("no_trigger", "note", what, "It is added in the training.")


CHECKS: tuple[Check, ...] = (
    lost,
    bad_caption,
    too_small,
    blurred,
    badly_exposed,
    twins,
    how_many_faces,
    small_face,
    cut_face,
    caption,
    too_long,
    notices,
)
