"""Training sizes, repeats, steps and epochs, spelled out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.data.decode import shown
from trainer.doctor.findings import BucketRow
from trainer.doctor.given import CheckedSet, Checkup
from trainer.types import Bucketed, Size


@dataclass(frozen=True, slots=True)
class Rounds:
    """How the training goes over the photos.

    buckets: every training size. steps: sentences. seen: how often a photo of each set that is
    learned is seen in all, by the set's name.
    """

    buckets: tuple[BucketRow, ...]
    steps: tuple[str, ...]
    seen: Mapping[str, float]


def plan_rounds(checkup: Checkup) -> Rounds:
    """Count what the training will do with the photos."""
    learned = [checked for checked in checkup.subjects if checked.crops]
    rows = _rows([crop for checked in learned for crop in checked.crops], checkup.batch_size)
    batches = sum(row.batches for row in rows)
    if not batches:
        return Rounds((), (), {})
    epochs = checkup.total_steps * checkup.accumulate_steps / batches
    seen = {checked.name: epochs * _pictures(checked) / _photos(checked) for checked in learned}
    sentences = [
        _epoch_sentence(learned, rows, checkup.batch_size),
        _steps_sentence(checkup, epochs, seen),
        *(_class_sentence(c) for c in checkup.sets if c.role == "class" and c.crops),
    ]
    return Rounds(rows, tuple(sentences), seen)


def _rows(crops: Sequence[Bucketed], batch_size: int) -> tuple[BucketRow, ...]:
    by_size: dict[Size, list[Bucketed]] = {}
    for crop in crops:
        by_size.setdefault(crop.bucket, []).append(crop)
    return tuple(_row(size, found, batch_size) for size, found in sorted(by_size.items()))


def _row(size: Size, crops: Sequence[Bucketed], batch_size: int) -> BucketRow:
    photos = sum(crop.repeats for crop in crops)
    batches = -(-photos // batch_size)
    return BucketRow(
        size=size,
        photos=photos,
        batches=batches,
        short=batches * batch_size - photos,
        enlarged=sum(_enlarged(crop) for crop in crops),
        cropped=sum(1 - size.area / crop.resized.area for crop in crops) / len(crops),
    )


def _enlarged(crop: Bucketed) -> bool:
    """Whether the picture is larger than the photo; by a pixel it may be by rounding."""
    photo = crop.captioned.photo.size
    return crop.resized.width > photo.width + 1 or crop.resized.height > photo.height + 1


def _pictures(checked: CheckedSet) -> int:
    """Training pictures of a set in an epoch."""
    return sum(crop.repeats for crop in checked.crops)


def _photos(checked: CheckedSet) -> int:
    return len({crop.captioned.photo.path for crop in checked.crops})


def _epoch_sentence(
    learned: Sequence[CheckedSet], rows: Sequence[BucketRow], batch_size: int
) -> str:
    """ "14 photos x 10 repeats = 140 pictures a round (epoch), in 35 batches of 4." """
    batches, pictures = sum(row.batches for row in rows), sum(row.photos for row in rows)
    of = "of up to" if any(row.short for row in rows) else "of"
    end = f"a round (epoch), in {_number(batches, 'batch', 'batches')} {of} {batch_size}."
    if len(learned) == 1:
        return f"{_product(learned[0])} {end}"
    parts = "; ".join(f"{shown(checked.name)}: {_product(checked)}" for checked in learned)
    return f"{parts}; together {_number(pictures, 'picture')} {end}"


def _product(checked: CheckedSet) -> str:
    photos, pictures = _photos(checked), _pictures(checked)
    factors = [_number(photos, "photo")]
    sizes, more = divmod(len(checked.crops), photos)
    if more:  # some are too small for all sizes
        factors = [f"{factors[0]} at {sizes} to {_sizes_at_most(checked)} sizes"]
    elif sizes > 1:
        factors.append(f"{sizes} sizes")
    repeats = checked.crops[0].repeats
    if repeats > 1:
        factors.append(f"{repeats:,} repeats")
    total = _number(pictures, "picture")
    return " x ".join(factors) + (f" = {total}" if more or len(factors) > 1 else "")


def _sizes_at_most(checked: CheckedSet) -> int:
    return max(Counter(crop.captioned.photo.path for crop in checked.crops).values())


def _steps_sentence(checkup: Checkup, epochs: float, seen: Mapping[str, float]) -> str:
    """ "400 steps = 11.4 epochs: each photo is seen about 114 times." """
    steps = _number(checkup.total_steps, "step")
    if checkup.accumulate_steps > 1:
        steps += f" of {checkup.accumulate_steps} batches each"
    start = f"{steps} = {_number(round(epochs, 1), 'epoch')}: "
    if len(seen) == 1:
        return f"{start}each photo is seen about {_times(next(iter(seen.values())))}."
    parts = ", ".join(f"of {shown(name)} about {_times(count)}" for name, count in seen.items())
    return f"{start}each photo is seen, {parts}."


def _class_sentence(checked: CheckedSet) -> str:
    name = shown(checked.name)
    return f"{_number(_photos(checked), 'photo')} of the class, from {name}, are trained on beside."


def _times(count: float) -> str:
    return _number(round(count) if count >= 2 else round(count, 1), "time")


def _number(count: float, word: str, many: str = "") -> str:
    return f"{count:,}".removesuffix(".0") + f" {word if count == 1 else many or word + 's'}"
