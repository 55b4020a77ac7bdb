"""The sets of photos that a folder and the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.config.reader import Resolved, replace_values
from trainer.data.sets import PhotoSet, find_sets
from trainer.errors import DataError

# The origin of settings that a run which goes on was started with.
SO_FAR = "the run so far"
_BY_FOLDER = "the folder's name"


def photo_sets(source: Path, resolved: Resolved) -> tuple[PhotoSet, ...]:
    """The sets in their order: those of the main folder, then those of `data.sets`.

    Raises:
        ConfigError: a folder is used twice, or there is no set to learn from.
        DataError: a folder is missing or cannot be listed.
    """
    data, caption = resolved.config.data, resolved.config.caption
    main = PhotoSet(
        name=source.resolve().name,
        folder=source,
        role="subject",
        repeats=data.repeats,
        weight=data.weight,
        recursive=data.recursive,
        flip=data.flip,
        trigger=caption.trigger,
        class_noun=caption.class_noun,
        template=caption.template,
    )
    further = [
        replace(
            main,
            name=Path(kept.folder).name,
            folder=Path(kept.folder).expanduser(),
            role=kept.role,
            repeats=kept.repeats,
            weight=kept.weight,
            recursive=main.recursive if kept.recursive is None else kept.recursive,
            flip=main.flip if kept.flip is None else kept.flip,
            trigger="" if kept.role == "class" else kept.trigger or main.trigger,
            class_noun=kept.class_noun or main.class_noun,
            template=kept.template or ("{class}" if kept.role == "class" else main.template),
        )
        for kept in data.sets
    ]
    trigger_given, class_given = _given(main, further, resolved)
    return find_sets(main, further, trigger_given=trigger_given, class_given=class_given)


def with_words_of(source: Path, resolved: Resolved) -> Resolved:
    """The settings with the trigger and class that a sub-folder's name gives ("10_ohwx man").

    They are what samples, scores and the LoRA file go by; of several sub-folders the first counts.

    Raises:
        ConfigError, DataError: as `photo_sets`; or the name makes no trigger.
    """
    first = photo_sets(source, resolved)[0]
    caption = resolved.config.caption
    found = {"caption.trigger": first.trigger, "caption.class_noun": first.class_noun}
    known = {"caption.trigger": caption.trigger, "caption.class_noun": caption.class_noun}
    if first.role == "class" or first.folder.parent != source or found == known:
        return resolved
    if any(Path(kept.folder).expanduser() == first.folder for kept in resolved.config.data.sets):
        return resolved  # the main folder holds nothing of its own
    changed = {name: value for name, value in found.items() if value != known[name]}
    return replace_values(resolved, changed, _BY_FOLDER)


def _given(main: PhotoSet, further: Sequence[PhotoSet], resolved: Resolved) -> tuple[bool, bool]:
    """Whether a person chose the trigger and the class, which then stand above folder names.

    A run that goes on knows its words, not who chose them: they were the folder's if its name
    gives the same.
    """
    trigger, class_noun = (
        resolved.origins[name] for name in ("caption.trigger", "caption.class_noun")
    )
    given = _typed(trigger), _typed(class_noun)
    if SO_FAR not in (trigger, class_noun):
        return given
    try:
        first = find_sets(main, further, trigger_given=False, class_given=False)[0]
    except DataError:  # the folder's name makes no trigger, so another one was given
        return given
    return (
        given[0] and not (trigger == SO_FAR and first.trigger == main.trigger),
        given[1] and not (class_noun == SO_FAR and first.class_noun == main.class_noun),
    )


def _typed(origin: str) -> bool:
    """Whether a person chose a value, not a preset, a default or a folder's name."""
    return origin not in ("default", _BY_FOLDER) and not origin.startswith("preset ")
