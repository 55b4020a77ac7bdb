"""The sets of photos of one training: which folders there are, and how much each counts.

Besides a flat folder, sub-folders named as for sd-scripts are understood (`10_ohwx man`: each
photo ten times an epoch, trigger `ohwx`, class `man`), and further folders from the settings.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from trainer.data.decode import shown
from trainer.data.listing import SYSTEM_FILES, list_folder, natural_key
from trainer.errors import ConfigError, DataError

Role = Literal["subject", "class"]

# Above this a number at the beginning of a name is a year; the settings allow no more either.
MAXIMUM_REPEATS = 1000
_NUMBERED = re.compile(r"([0-9]{1,4})_\s*(\S.*)")
# What cannot stand in a trigger word, since it means something else in a prompt.
_NO_TRIGGER = re.compile(r"[,{}()<>:\[\]]")


@dataclass(frozen=True, slots=True)
class PhotoSet:
    """Photos that are captioned and counted alike.

    name: of its own, for messages. role: "subject" is learned, "class" shows the class in general.
    repeats: how often each photo comes in an epoch. weight: the set's share of the training beside
    the other sets of its role; None: its photos count as those of the others.
    """

    name: str
    folder: Path
    role: Role
    repeats: int
    weight: float | None
    recursive: bool
    flip: bool
    trigger: str
    class_noun: str
    template: str


def find_sets(
    main: PhotoSet, further: Sequence[PhotoSet], *, trigger_given: bool, class_given: bool
) -> tuple[PhotoSet, ...]:
    """All sets of a training, those of the main folder first.

    If the main folder has no photos of its own but sub-folders named `N_trigger class` or
    `N_trigger`, each of these is a set that takes the place of the main one: its repeats are N
    times the main set's, its trigger the first word after the number and its class the others,
    just as they are written. It is not so when the main set is `recursive`: then all photos below
    the folder are one set. Sub-folders that `further` names are theirs; a main folder that holds
    nothing else is no set.

    Args:
        main: the folder that the training is about.
        further: the sets of the settings.
        trigger_given, class_given: the user chose the main set's trigger or class, which are then
            kept whatever the sub-folders are named.

    Raises:
        ConfigError: a folder is used twice, or there is no set to learn from.
        DataError: a folder is missing or cannot be listed, or photos are in a sub-folder that is
            not named as the others are.
    """
    own = list_folder(main.folder, recursive=False).pictures
    for photo_set in further:
        list_folder(photo_set.folder, recursive=False)  # it must be there
    sets = (main, *further)
    if not own and not main.recursive:
        sets = (*_below(main, further, trigger_given, class_given), *further)
    _require_once(sets)
    if all(photo_set.role == "class" for photo_set in sets):
        raise ConfigError(
            "There are only class sets: pictures of the class in general, none of what is to be "
            "learned.",
            where="data.sets",
            fix="Give a folder with photos of the subject, or set role = 'subject' in one set.",
        )
    return _named_apart(sets)


def balanced(sets: Sequence[PhotoSet], counts: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """How often the photos of each set come in an epoch, and what each weighs in the loss.

    Where any set of a role has a weight, the sets of that role are trained in proportion to their
    weights, and a set without one has the weight 1. The repeats are whole numbers as near as may
    be to that, never less than the set's own; the loss weights, which are 1 on average over an
    epoch, make it exact.

    Args:
        sets: of one training.
        counts: how many photos of each are trained, 1 or more.

    Returns:
        (repeats, weight) of each set, in their order; its own repeats and 1 where no set of its
        role has a weight.

    Raises:
        ValueError: a set without photos.
    """
    if min(counts, default=1) < 1:
        raise ValueError("a set without photos cannot be balanced")
    shares: dict[int, tuple[int, float]] = {}
    for role in ("subject", "class"):
        numbers = [n for n, photo_set in enumerate(sets) if photo_set.role == role]
        chosen = _balanced([sets[n] for n in numbers], [counts[n] for n in numbers])
        shares |= dict(zip(numbers, chosen, strict=True))
    return tuple(shares[n] for n in range(len(sets)))


def _balanced(sets: Sequence[PhotoSet], counts: Sequence[int]) -> list[tuple[int, float]]:
    if all(photo_set.weight is None for photo_set in sets):
        return [(photo_set.repeats, 1.0) for photo_set in sets]
    # Exact fractions: equal shares give weights of exactly 1.
    wanted = [
        Fraction(1 if s.weight is None else s.weight) / count
        for s, count in zip(sets, counts, strict=True)
    ]
    scale = max(s.repeats / share for s, share in zip(sets, wanted, strict=True))
    exact = [scale * share for share in wanted]
    repeats = [
        min(round(number), max(MAXIMUM_REPEATS, s.repeats))
        for number, s in zip(exact, sets, strict=True)
    ]
    shown_in_all = sum(r * count for r, count in zip(repeats, counts, strict=True))
    norm = shown_in_all / sum(number * count for number, count in zip(exact, counts, strict=True))
    return [(r, float(norm * number / r)) for r, number in zip(repeats, exact, strict=True)]


def _below(
    main: PhotoSet, further: Sequence[PhotoSet], trigger_given: bool, class_given: bool
) -> tuple[PhotoSet, ...]:
    """What takes the place of a main folder that has no photos of its own; itself if nothing."""
    folders = _sub_folders(main.folder)
    free = [f for f in folders if not any(f.samefile(other.folder) for other in further)]
    sets, others = [], []
    for folder in free:
        named = _NUMBERED.fullmatch(folder.name)
        if not named or not 1 <= int(named[1]) <= MAXIMUM_REPEATS:
            others.append(folder)
            continue
        trigger, _, class_noun = (part.strip() for part in named[2].partition(" "))
        sets.append(
            replace(
                main,
                name=folder.name,
                folder=folder,
                repeats=int(named[1]) * main.repeats,
                trigger=main.trigger if trigger_given else _trigger(trigger, folder),
                class_noun=class_noun if class_noun and not class_given else main.class_noun,
            )
        )
    left_out = [path for path in others if list_folder(path, recursive=True).pictures]
    if sets:
        _require_none(left_out)
        return tuple(sets)
    return () if len(free) < len(folders) and not left_out else (main,)


def _sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, in natural order; links are not followed."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    names = [n for n in names if not n.startswith(".") and n.casefold() not in SYSTEM_FILES]
    return [folder / name for name in sorted(names, key=lambda name: natural_key(Path(name)))]


def _trigger(word: str, folder: Path) -> str:
    if not _NO_TRIGGER.search(word):
        return word
    raise DataError(
        f"The folder name '{shown(folder.name)}' gives the trigger word '{shown(word)}', which has "
        "a character that means something else in a prompt.",
        where=shown(folder.absolute()),
        fix="Rename the folder to something like '10_ohwx person', or give --trigger.",
    )


def _require_none(left_out: Sequence[Path]) -> None:
    """No photos may be passed over because of their folder's name."""
    if left_out:
        raise DataError(
            "Some sub-folders have a number of repeats in their name ('10_ohwx person'), and some "
            "that hold photos do not.",
            where="\n".join(shown(path.absolute()) for path in left_out),
            fix="Rename these alike (such as '1_ohwx person') or move them elsewhere, or run with "
            "--set data.recursive=true to take all photos as one set.",
        )


def _require_once(sets: Sequence[PhotoSet]) -> None:
    """No photo may be in two sets."""
    for earlier, later in itertools.combinations(sets, 2):
        outer, inner = earlier, later
        if later.folder.resolve() in earlier.folder.resolve().parents:
            outer, inner = later, earlier
        if outer.folder.samefile(inner.folder):
            problem = "is used for two sets of photos"
        elif outer.recursive and outer.folder.resolve() in inner.folder.resolve().parents:
            problem = "is inside the folder of another set, which takes its sub-folders too"
        else:
            continue
        raise ConfigError(
            f"The folder '{shown(inner.folder)}' {problem}: its photos would count twice.",
            where=f"data.sets: {shown(outer.folder)}, {shown(inner.folder)}",
            fix="Leave one of them out, or set recursive = false for the outer one.",
        )


def _named_apart(sets: Iterable[PhotoSet]) -> tuple[PhotoSet, ...]:
    """The sets with names that differ: the second "holiday" becomes "holiday (2)"."""
    named: list[PhotoSet] = []
    taken: set[str] = set()
    for photo_set in sets:
        name, number = photo_set.name, 1
        while name in taken:
            number += 1
            name = f"{photo_set.name} ({number})"
        taken.add(name)
        named.append(replace(photo_set, name=name))
    return tuple(named)
