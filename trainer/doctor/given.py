"""What the doctor judges by: plain values, gathered from the settings and the folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.data.caption_text import mentions
from trainer.data.decode import shown
from trainer.data.photos import PhotoProblem, PhotoScan
from trainer.doctor.findings import PhotoFacts
from trainer.doctor.sidecars import Sidecar
from trainer.types import Bucketed, Captioned


@dataclass(frozen=True, slots=True)
class CheckedSet:
    """One set of photos.

    name, folder, role, trigger: of the set. scan: what its folder holds.
    captioned: its photos with their texts; one whose caption cannot be read is left out.
    crops: their plain training pictures (without flips and versions), in any order.
    sidecars: by the photo's path; empty where sidecars are not used.
    orphans: caption files without a photo.
    """

    name: str
    folder: Path
    role: Literal["subject", "class"]
    trigger: str
    scan: PhotoScan
    captioned: tuple[Captioned, ...]
    crops: tuple[Bucketed, ...]
    sidecars: Mapping[Path, Sidecar] = field(default_factory=dict)
    orphans: tuple[Path, ...] = ()

    @property
    def written(self) -> tuple[Sidecar, ...]:
        """The caption files with something in them."""
        return tuple(sidecar for sidecar in self.sidecars.values() if sidecar.text)

    @property
    def without_caption(self) -> tuple[Captioned, ...]:
        """The photos that get the template, where others have captions of their own."""
        if not self.written:
            return ()
        return tuple(item for item in self.captioned if item.origin == "template")

    @property
    def mostly_without_caption(self) -> bool:
        """So that it is said once of all instead of many times."""
        return 2 * len(self.without_caption) > len(self.captioned)

    def lacks_trigger(self, sidecar: Sidecar) -> bool:
        """Whether a caption does not name the trigger word, which the training then adds."""
        text, trigger = sidecar.text, self.trigger
        return bool(trigger) and "{trigger}" not in text and not mentions(text, trigger)


@dataclass(frozen=True, slots=True)
class Checkup:
    """Everything a diagnosis follows from.

    folder: of the main set. kind: what is learned, "face" or "style".
    facts: by the photo's digest. lost: photos that could not be read again after the scan.
    resolutions: in pixels of a square's side. batch_size, accumulate_steps, total_steps: of the
    training, whose every step takes `accumulate_steps` batches.
    faces_by: what looked for faces, in a sentence. faces_certain: `FaceFinder.certain`.
    count_tokens: of a text, by the base's tokenizer; None where it is not at hand.
    longest_tokens: what the base reads of a caption.
    """

    folder: Path
    kind: str
    sets: tuple[CheckedSet, ...]
    facts: Mapping[str, PhotoFacts]
    resolutions: tuple[int, ...]
    batch_size: int
    total_steps: int
    accumulate_steps: int = 1
    lost: tuple[PhotoProblem, ...] = ()
    faces_by: str = ""
    faces_certain: bool = False
    count_tokens: Callable[[str], int] | None = None
    longest_tokens: int = 75

    @property
    def subjects(self) -> tuple[CheckedSet, ...]:
        """The sets that are learned, not those of the class."""
        return tuple(checked for checked in self.sets if checked.role == "subject")

    def name(self, path: Path) -> str:
        """A file's name for a message, within the folder where it is in there."""
        inside = path.is_relative_to(self.folder)
        return shown((path.relative_to(self.folder) if inside else path).as_posix())
