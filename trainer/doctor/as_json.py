"""The diagnosis as JSON, for other programs.

One object. A field that is not known is null; fields may be added without a new `version`.

    version     1
    folder      the photo folder, as it was given, with forward slashes (as are all paths)
    counts      {"ok", "note", "warning", "bad"}: how many photos have this level
    photos      a list, in the order of their names:
        path        of the file
        set         name of its set of photos
        level       the worst level of its findings: "ok", "note", "warning" or "bad"
        findings    a list of {"code", "level", "what", "fix"}; `code` is stable, the rest is for
                    people; `what` goes on from the file's name
        size        [width, height] in pixels, upright; null where the file cannot be used
        digest      SHA-256 of the file, in hex
        mask        path of the mask beside it
        notices     what was unusual in reading it, a list of clauses
        captions    the texts it is trained on, a list; null where the file cannot be used
        origin      where they come from: "sidecar", "captioner", "template"
        tokens      number of tokens of its caption
        facts       what was measured (see PhotoFacts): {"sharpness", "reblur", "dark", "bright",
                    "mean", "hash", "mirrored_hash" (16 hex digits each), "background" [r, g, b],
                    "faces"}; `faces` is null where nothing looked for them, else a list of
                    {"box", "score", "landmarks"}, the largest face first; a box is
                    [left, top, right, bottom] in pixels of the upright photo
        crops       how it is trained, one for each resolution: resized to `resized` [width,
                    height], then cropped at `left`, `top` to `bucket` [width, height]
    whole       findings on all photos together; `what` is a sentence
    buckets     a list of {"size", "photos", "batches", "short", "enlarged", "cropped"}, see
                BucketRow
    steps       sentences on repeats, steps and epochs
    faces_by    what looked for faces, a sentence
"""

from __future__ import annotations

import json
import math
from typing import Any

from trainer.doctor.findings import (
    LEVELS,
    BucketRow,
    Diagnosis,
    Finding,
    PhotoFacts,
    PhotoVerdict,
)
from trainer.types import Bucketed, Face, Size

VERSION = 1


def as_json(diagnosis: Diagnosis) -> str:
    """The diagnosis as JSON text in ASCII; its fields are described above."""
    everything = {
        "version": VERSION,
        "folder": diagnosis.folder.as_posix(),
        "counts": {level: diagnosis.count(level) for level in LEVELS},
        "photos": [_photo(verdict) for verdict in diagnosis.photos],
        "whole": [_finding(finding) for finding in diagnosis.whole],
        "buckets": [_bucket(row) for row in diagnosis.buckets],
        "steps": list(diagnosis.steps),
        "faces_by": diagnosis.faces_by,
    }
    return json.dumps(everything, indent=2, allow_nan=False)


def _photo(verdict: PhotoVerdict) -> dict[str, Any]:
    photo, captioned, facts = verdict.photo, verdict.captioned, verdict.facts
    return {
        "path": verdict.path.as_posix(),
        "set": verdict.set_name,
        "level": verdict.level,
        "findings": [_finding(finding) for finding in verdict.findings],
        "size": _size(photo.size) if photo else None,
        "digest": photo.digest if photo else None,
        "mask": photo.mask.as_posix() if photo and photo.mask else None,
        "notices": list(photo.notices) if photo else [],
        "captions": list(captioned.texts) if captioned else None,
        "origin": captioned.origin if captioned else None,
        "tokens": verdict.tokens,
        "facts": _facts(facts) if facts else None,
        "crops": [_crop(crop) for crop in verdict.crops],
    }


def _finding(finding: Finding) -> dict[str, str]:
    return {
        "code": finding.code,
        "level": finding.level,
        "what": finding.what,
        "fix": finding.fix,
    }


def _facts(facts: PhotoFacts) -> dict[str, Any]:
    return {
        "sharpness": _number(facts.sharpness),
        "reblur": _number(facts.reblur),
        "dark": _number(facts.dark),
        "bright": _number(facts.bright),
        "mean": _number(facts.mean),
        # Not as numbers: JavaScript and others round integers beyond 2**53.
        "hash": f"{facts.hash:016x}",
        "mirrored_hash": f"{facts.mirrored_hash:016x}",
        "background": [_number(value) for value in facts.background],
        "faces": None if facts.faces is None else [_face(face) for face in facts.faces],
    }


def _face(face: Face) -> dict[str, Any]:
    box = face.box
    return {
        "box": [box.left, box.top, box.right, box.bottom],
        "score": _number(face.score),
        "landmarks": [[_number(x), _number(y)] for x, y in face.landmarks],
    }


def _crop(crop: Bucketed) -> dict[str, Any]:
    return {
        "bucket": _size(crop.bucket),
        "resized": _size(crop.resized),
        "left": crop.left,
        "top": crop.top,
    }


def _bucket(row: BucketRow) -> dict[str, Any]:
    return {
        "size": _size(row.size),
        "photos": row.photos,
        "batches": row.batches,
        "short": row.short,
        "enlarged": row.enlarged,
        "cropped": _number(row.cropped),
    }


def _size(size: Size) -> list[int]:
    return [size.width, size.height]


def _number(value: float) -> float | None:
    """JSON has no infinity and no "not a number"."""
    return float(value) if math.isfinite(value) else None
