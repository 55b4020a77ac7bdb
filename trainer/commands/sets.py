"""The sets of photos that a folder and the settings name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.config.reader import Resolved
from trainer.data.sets import PhotoSet, find_sets


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
    given = {name: origin for name, origin in resolved.origins.items() if _typed(origin)}
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
    return find_sets(
        main,
        further,
        trigger_given="caption.trigger" in given,
        class_given="caption.class_noun" in given,
    )


def _typed(origin: str) -> bool:
    """Whether a person chose a value, not a preset or a default."""
    return origin != "default" and not origin.startswith("preset ")
