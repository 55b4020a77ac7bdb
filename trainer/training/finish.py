"""The end of a run: contact sheet, report, and what was learned in one sentence."""

from __future__ import annotations

import importlib.metadata
import io
import platform

from PIL import Image

from trainer import __version__
from trainer.adapters.file import Verified, file_hashes
from trainer.adapters.sidecars import SidecarFacts, write_sidecars
from trainer.config.reader import to_toml
from trainer.data.decode import decode_upright
from trainer.report.page import (
    CurvePoint,
    FileFacts,
    PhotoRow,
    ReportData,
    ScoreRow,
    SettingRow,
    render_report,
)
from trainer.report.steps import BestStep, StepRow
from trainer.scoring import Scorer
from trainer.training.best import CLEARLY, LEAK, MOVED, StepScores, weights_of
from trainer.training.gallery import Gallery
from trainer.training.job import Job
from trainer.training.reports import read_metrics
from trainer.training.run_folder import write_text
from trainer.training.session import Session
from trainer.types import Photo

# More photos than these are counted, not shown.
SHEET_PHOTOS = 80
REPORT_PHOTOS = 300
THUMBNAIL_PX = 256


def write_sheet(gallery: Gallery) -> Image.Image:
    """Draw the contact sheet of all samples so far into the output folder."""
    job = gallery.session.job
    photos = [_small(job, photo.photo) for photo in job.photos[:SHEET_PHOTOS]]
    caption = job.config.caption
    sheet = gallery.sheet(
        title=f"{job.folder.name}: {caption.trigger} {caption.class_noun}",
        subtitle=f"{len(job.photos)} photos, trained on {base_title(job)}",
        photos=photos,
        more=len(job.photos) - len(photos),
    )
    sheet.save(job.folder.contact_sheet)
    return sheet


def write_cards(session: Session, gallery: Gallery | None, thumbnail: Image.Image | None) -> None:
    """The files that A1111 shows beside the LoRA files, where they are wanted."""
    job = session.job
    if not job.config.run.sidecars:
        return
    png = io.BytesIO()
    if thumbnail is not None:
        thumbnail.save(png, "PNG")
    caption = job.config.caption
    facts = SidecarFacts(
        description=_headline(job, gallery) + (f" It is {job.note}." if job.note else ""),
        family=job.facts.family if job.facts.fits_real else "",
        activation_text=f"{caption.trigger} {caption.class_noun}",
        notes=f"Made by Likeness {__version__} on {base_title(job)}.",
        preview_png=png.getvalue() or None,
    )
    for path in (job.folder.lora, job.folder.best_lora):
        if path.exists():
            write_sidecars(path, facts)


def learned(job: Job, gallery: Gallery | None) -> str:
    """What was learned, in plain words with its numbers."""
    if gallery is None:
        return "not measured: preview.every_steps is 0, so no samples were drawn"
    if gallery.scorer is None:
        return "not measured: no prompt in preview.prompts holds the trigger word"
    first, last, highest = _ends(gallery, gallery.scorer)
    caption = job.config.caption
    word = "likeness" if job.config.run.kind == "face" else "style"
    at_step = "" if last is gallery.scores[-1] else f" at step {last.step}"
    return (
        f"{word} of '{caption.trigger} {caption.class_noun}' {first.trigger:.2f} -> "
        f"{last.trigger:.2f}{at_step} (0 = other pictures, the nearest of them {highest:.2f}; "
        f"1 = your photos); without the trigger {first.plain:.2f} -> {last.plain:.2f}, "
        f"drift {last.drift:.2f}"
    )


def best_words(job: Job, gallery: Gallery | None) -> list[str]:
    """The lines on the best step: its file, why it is the best, and what may help next time."""
    best = _best_step(job, gallery)
    if not best.file:
        return [f"Best file  none: {best.reason}"]
    reason = [best.reason, *([f"Next time: {best.advice}"] if best.advice else [])]
    return [f"Best file  {best.file}", *(f"           {words}" for words in reason)]


def _best_step(job: Job, gallery: Gallery | None) -> BestStep:
    if gallery is None or gallery.scorer is None:
        why = learned(job, gallery).removeprefix("not measured: ")
        return BestStep(None, "", f"the steps were not compared ({why})")
    choice = gallery.choice
    totals = choice.totals if choice else {}
    rows = tuple(
        StepRow(
            step=row.step,
            likeness=row.trigger,
            plain=row.plain,
            drift=row.drift,
            following=row.following,
            copying=row.copying,
            copies=f"{row.copies} of {row.samples}",
            total=totals.get(row.step),
        )
        for row in gallery.scores
    )
    word = "Style" if job.config.run.kind == "style" else "Likeness"
    formula = weights_of(job.config.run.kind).words
    if choice is None:
        why = "every step has samples of one colour, so something is wrong with the training"
        return BestStep(None, "", why, word=word, formula=formula, rows=rows)
    return BestStep(
        choice.best.step,
        str(job.folder.best_lora),
        choice.reason,
        choice.advice,
        word,
        formula,
        rows,
    )


def write_report(
    session: Session, gallery: Gallery | None, verified: Verified, sheet: Image.Image | None
) -> None:
    """Write report.html; the LoRA file still has its unfinished name."""
    job = session.job
    scored = gallery is not None and gallery.scorer is not None
    config = job.config
    notes = [f"This file is {job.note}."] if job.note else []
    rows = read_metrics(job.folder.metrics)
    curve = [CurvePoint(r["step"], r["loss"], r["rate"]) for r in rows if r["loss"] is not None]
    seconds = sum(row["seconds"] for row in rows)
    saved = config.run.save_every_steps
    page = render_report(
        ReportData(
            title=job.folder.name,
            headline=_headline(job, gallery),
            summary=f"{len(job.photos)} photos, {config.run.total_steps} steps, "
            f"{seconds / 60:.1f} minutes of training on {base_title(job)}.",
            trigger=config.caption.trigger,
            example_prompt=_example_prompt(session),
            file=_file_facts(session, verified),
            contact_sheet=sheet,
            scores=_score_rows(job, gallery),
            best=_best_step(job, gallery) if scored else None,
            scores_note="" if scored else f"The score was {learned(job, gallery)}.",
            notes=(*notes, *session.guard.words(), *(gallery.words if gallery else ())),
            good=_is_good(gallery),
            curve=tuple(curve),
            saved_steps=tuple(range(saved, config.run.total_steps + 1, saved)),
            photos=_photo_rows(job),
            more_photos=max(0, len(job.photos) - REPORT_PHOTOS),
            settings=_setting_rows(job),
            settings_toml=to_toml(config),
            versions=versions(),
            command=job.command,
        )
    )
    write_text(job.folder.report, page)


def base_title(job: Job) -> str:
    """The base by the name that a person knows it by."""
    return "the Likeness embedded base" if job.facts.embedded else f"the base '{job.facts.name}'"


def versions() -> dict[str, str]:
    """Versions of everything that decides what a run computes."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow")
    return {
        "likeness": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _ends(gallery: Gallery, scorer: Scorer) -> tuple[StepScores, StepScores, float]:
    """First scores, those of the best step, and the highest score of any picture of the class.

    Where no step could be chosen, the last one stands for the best.
    """
    choice = gallery.choice
    best = choice.best if choice else gallery.scores[-1]
    return gallery.scores[0], best, max(scorer.others_scores)


def _is_good(gallery: Gallery | None) -> bool:
    if gallery is None or gallery.scorer is None:
        return True
    first, last, highest = _ends(gallery, gallery.scorer)
    return last.trigger > highest + CLEARLY and last.plain - first.plain <= LEAK


def _headline(job: Job, gallery: Gallery | None) -> str:
    name = f"'{job.config.caption.trigger} {job.config.caption.class_noun}'"
    if gallery is None or gallery.scorer is None:
        return f"{name} was trained; what it learned was not measured."
    first, last, highest = _ends(gallery, gallery.scorer)
    if last.trigger > highest + CLEARLY:
        if last.plain - first.plain > LEAK:
            return f"{name} now looks like your photos, and so do prompts without the trigger."
        if last.drift > MOVED:
            return f"{name} now looks like your photos; other prompts do not, though they changed."
        return f"{name} now looks like your photos, and other prompts stayed as they were."
    if last.trigger > first.trigger + CLEARLY:
        return f"{name} looks more like your photos than before, but is not there yet."
    return f"{name} was hardly learned: more steps, a higher rate or more photos may help."


def _score_rows(job: Job, gallery: Gallery | None) -> tuple[ScoreRow, ...]:
    if gallery is None or gallery.scorer is None:
        return ()
    first, last, highest = _ends(gallery, gallery.scorer)
    kind = "Likeness" if job.config.run.kind == "face" else "Style"
    count = len(gallery.scorer.others_scores)
    return (
        ScoreRow(
            name=f"{kind} with the trigger word",
            sentence=f"Samples with the trigger went from {first.trigger:.2f} to "
            f"{last.trigger:.2f}; the nearest of {count} other pictures reaches {highest:.2f}.",
            before=first.trigger,
            after=last.trigger,
            mark=highest,
            mark_name="nearest other picture",
        ),
        ScoreRow(
            name=f"{kind} without the trigger word",
            sentence=f"The same prompts without the trigger went from {first.plain:.2f} to "
            f"{last.plain:.2f}; they should stay where they were.",
            before=first.plain,
            after=last.plain,
        ),
        ScoreRow(
            name="Drift of everything else",
            sentence=f"Prompts without the trigger moved by {last.drift:.2f} of what another "
            "seed changes; less is better.",
            before=0.0,
            after=last.drift,
            low="unchanged",
            high="as different as another seed",
        ),
    )


def _example_prompt(session: Session) -> str:
    caption = session.job.config.caption
    triggered = [prompt.text for prompt in session.prompts if prompt.triggered]
    return triggered[0] if triggered else f"{caption.trigger} {caption.class_noun}"


def _file_facts(session: Session, verified: Verified) -> FileFacts:
    job = session.job
    hashes = file_hashes(job.folder.unfinished_lora)
    named = {
        "SHA-256": hashes.sha256,
        "AutoV2": hashes.autov2,
        "AutoV3": hashes.autov3[:12],
        **({"AutoV1": hashes.autov1} if hashes.autov1 else {}),
    }
    return FileFacts(
        path=str(job.folder.lora),
        size_bytes=job.folder.unfinished_lora.stat().st_size,
        hashes=named,
        verified=True,
        verification=f"Read back after writing: all {verified.matched} tensors match the base's "
        "key table.",
        facts={
            "rank": str(job.config.adapter.rank),
            "alpha": f"{job.config.adapter.alpha:g}",
            "layers": job.config.adapter.targets
            + (" and text encoder" if job.config.adapter.text_encoder else ""),
            "family": session.backbone.names.version,
        },
    )


def _photo_rows(job: Job) -> tuple[PhotoRow, ...]:
    return tuple(
        PhotoRow(
            name=picture.captioned.photo.path.name,
            image=_small(job, picture.captioned.photo),
            caption=picture.captioned.text,
            origin=picture.captioned.origin,
            bucket=str(picture.bucket),
            size=str(picture.captioned.photo.size),
        )
        for picture in job.plain_pictures[:REPORT_PHOTOS]
    )


def _small(job: Job, photo: Photo) -> Image.Image:
    """The photo as a thumbnail: many of them have to fit into memory."""
    image = decode_upright(photo.path, background=job.config.data.background_rgb)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return image


def _setting_rows(job: Job) -> tuple[SettingRow, ...]:
    return tuple(
        SettingRow(f"{section}.{name}", str(value), job.origins.get(f"{section}.{name}", ""))
        for section, values in job.config.model_dump(exclude_none=True).items()
        for name, value in values.items()
    )
