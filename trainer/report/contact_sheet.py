"""One picture that shows what was learned: rows are prompts, columns are training steps.

Small samples (the embedded base draws 64 px) are enlarged by a whole number, large ones reduced,
so that every cell has about the same width whatever the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainer.types import Size
from trainer.untrusted import printable, shortened

CELL_PX = 224  # the width aimed at for a cell; a whole multiple of a small sample comes near it
MIN_CELL_PX = 96
SHEET_PX = 2200  # cells get narrower rather than let a sheet with many steps grow beyond this
PROMPT_PX = 210
MARGIN_PX = 44
GAP_PX = 14
STRIP_GAP_PX = 10
THUMBNAIL_PX = (62, 104)  # smallest and largest side of a photo in the strip
MAX_STRIP_LINES = 2
CORNER_PX = 10
TEXT_CHARACTERS = 300  # of a prompt or title, so that a book of a prompt makes no mile of a sheet

PAPER = (250, 249, 247)
INK = (32, 33, 36)
SOFT_INK = (112, 114, 120)
LINE = (222, 220, 215)
EMPTY = (242, 240, 236)
MARKED = (214, 235, 228)
MARKED_INK = (31, 111, 92)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One prompt and its samples, one for each column; None where there is no sample."""

    prompt: str
    images: Sequence[Image.Image | None]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things stand, in pixels."""

    width: int
    cell_width: int
    row_heights: tuple[int, ...]

    @property
    def room(self) -> int:
        """Width between the margins."""
        return self.width - 2 * MARGIN_PX

    def column_left(self, column: int) -> int:
        return MARGIN_PX + PROMPT_PX + GAP_PX + column * (self.cell_width + GAP_PX)


def contact_sheet(
    rows: Sequence[SheetRow],
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    reference: Sequence[Image.Image] = (),
    more: int = 0,
    marked: int | None = None,
) -> Image.Image:
    """Draw the sheet as an RGB picture; the same input always gives the same pixels.

    Args:
        rows: the prompts, from top to bottom. A row with fewer samples than columns is filled up
            with empty frames.
        columns: the heading of each column ("before training", "step 100").
        reference: the photos trained on, shown as a strip above; what does not fit is counted.
        more: photos besides these, which are only counted.
        marked: the number of a column, from 0, that stands out from the others.

    Raises:
        ValueError: a row has more samples than there are columns.
    """
    for row in rows:
        if len(row.images) > len(columns):
            raise ValueError(f"{len(row.images)} samples for {len(columns)} columns: {row.prompt}")
    layout = _plan(rows, columns)
    head = _head(layout, title, subtitle)
    strip = _reference_strip(layout, reference, more)
    table = _table(layout, rows, columns, marked)
    blocks = [block for block in (head, strip, table) if block is not None]
    height = 2 * MARGIN_PX + sum(block.height for block in blocks)
    sheet = Image.new("RGB", (layout.width, height), PAPER)
    top = MARGIN_PX
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def fit(image: Image.Image, width_px: int) -> Image.Image:
    """Bring a sample to about `width_px`: enlarged by a whole number, or reduced to it."""
    picture = image.convert("RGB")
    if picture.width > width_px:
        height = max(1, round(picture.height * width_px / picture.width))
        return picture.resize((width_px, height), Image.Resampling.LANCZOS)
    factor = max(1, width_px // picture.width)
    return _enlarge(picture, factor)


def _enlarge(picture: Image.Image, factor: int) -> Image.Image:
    """Enlarge by a whole number.

    Bicubic keeps the edges of small drawn pictures firmer than Lanczos (no ringing around them)
    and shows no pixel blocks as nearest neighbour does.
    """
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _plan(rows: Sequence[SheetRow], columns: Sequence[str]) -> _Layout:
    count = max(1, len(columns))
    room = (SHEET_PX - 2 * MARGIN_PX - PROMPT_PX) // count - GAP_PX
    cell = max(MIN_CELL_PX, min(CELL_PX, room))
    samples = [image for row in rows for image in row.images if image is not None]
    if samples:
        cell = max(fit(image, cell).width for image in samples)
    heights = tuple(
        max((fit(image, cell).height for image in row.images if image is not None), default=cell)
        for row in rows
    )
    width = 2 * MARGIN_PX + PROMPT_PX + count * (cell + GAP_PX)
    return _Layout(width, cell, heights)


def _head(layout: _Layout, title: str, subtitle: str) -> Image.Image:
    title_font, subtitle_font = _font(34), _font(18)
    title_lines = wrap(_shown(title), title_font, layout.room)
    subtitle_lines = wrap(_shown(subtitle), subtitle_font, layout.room)
    height = 42 * len(title_lines) + 26 * len(subtitle_lines) + 24
    block = Image.new("RGB", (layout.width, height), PAPER)
    pen = ImageDraw.Draw(block)
    top = 0
    for line in title_lines:
        pen.text((MARGIN_PX, top), line, INK, title_font)
        top += 42
    top += 4
    for line in subtitle_lines:
        pen.text((MARGIN_PX, top), line, SOFT_INK, subtitle_font)
        top += 26
    return block


def _reference_strip(
    layout: _Layout, photos: Sequence[Image.Image], more: int
) -> Image.Image | None:
    if not photos:
        return None
    total = len(photos) + more
    smallest, largest = THUMBNAIL_PX
    most = max(1, (layout.room + STRIP_GAP_PX) // (smallest + STRIP_GAP_PX))
    lines = min(MAX_STRIP_LINES, math.ceil(total / most))
    per_line = min(most, math.ceil(total / lines))
    side = min(largest, (layout.room + STRIP_GAP_PX) // per_line - STRIP_GAP_PX)
    step = side + STRIP_GAP_PX
    places = [
        (MARGIN_PX + column * step, 32 + line * step)
        for line in range(lines)
        for column in range(per_line)
    ]
    block = Image.new("RGB", (layout.width, 32 + lines * step + 18), PAPER)
    ImageDraw.Draw(block).text((MARGIN_PX, 0), "your photos", SOFT_INK, _font(16))
    shown = total if total <= len(places) else len(places) - 1
    shown = min(shown, len(photos))
    for photo, place in zip(photos[:shown], places, strict=False):
        _paste_rounded(block, _square(photo, side), place)
    if shown < total:
        _empty_frame(block, places[shown], Size(side, side), f"+{total - shown}")
    return block


def _table(
    layout: _Layout, rows: Sequence[SheetRow], columns: Sequence[str], marked: int | None
) -> Image.Image:
    heading_font, prompt_font = _font(18), _font(18)
    headings = [wrap(heading, heading_font, layout.cell_width) for heading in columns]
    heading_height = 26 * max((len(lines) for lines in headings), default=1) + 12
    prompts = [wrap(_shown(row.prompt), prompt_font, PROMPT_PX - GAP_PX) for row in rows]
    heights = [
        max(height, 25 * len(lines))
        for height, lines in zip(layout.row_heights, prompts, strict=True)
    ]
    total = heading_height + sum(heights) + GAP_PX * max(0, len(rows) - 1)
    block = Image.new("RGB", (layout.width, total), PAPER)
    pen = ImageDraw.Draw(block)
    if marked is not None:
        left = layout.column_left(marked) - GAP_PX // 2
        box = (left, 0, left + layout.cell_width + GAP_PX - 1, total - 1)
        pen.rectangle(box, MARKED)
    for column, lines in enumerate(headings):
        ink = MARKED_INK if column == marked else SOFT_INK
        for number, line in enumerate(lines):
            pen.text((layout.column_left(column), 26 * number), line, ink, heading_font)
    top = heading_height
    for row, lines, height in zip(rows, prompts, heights, strict=True):
        text_top = top + max(0, (height - 25 * len(lines)) // 2)
        for number, line in enumerate(lines):
            pen.text((MARGIN_PX, text_top + 25 * number), line, INK, prompt_font)
        _draw_cells(block, layout, row, len(columns), (top, height))
        top += height + GAP_PX
    return block


def _draw_cells(
    block: Image.Image, layout: _Layout, row: SheetRow, count: int, span: tuple[int, int]
) -> None:
    top, height = span
    images = [*row.images, *([None] * (count - len(row.images)))]
    for column, image in enumerate(images):
        left = layout.column_left(column)
        if image is None:
            _empty_frame(block, (left, top), Size(layout.cell_width, height), "no sample")
            continue
        sample = fit(image, layout.cell_width)
        inset_left = left + (layout.cell_width - sample.width) // 2
        inset_top = top + (height - sample.height) // 2
        _paste_rounded(block, sample, (inset_left, inset_top))


def _shown(text: str) -> str:
    """As much of a text as there is room for."""
    return shortened(printable(text), TEXT_CHARACTERS)


def wrap(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Break a text into lines no wider than `width_px`; a word that is too long is cut."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        candidate = f"{line} {word}".strip()
        if font.getlength(candidate) <= width_px:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width_px and len(line) > 1:
            fits = next(n for n in range(len(line) - 1, 0, -1) if _fits(line[:n], font, width_px))
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line] if line else lines


def _fits(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> bool:
    return len(text) == 1 or font.getlength(text) <= width_px


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)  # with a size, Pillow's own outline font
    return font


def _square(image: Image.Image, side_px: int) -> Image.Image:
    return ImageOps.fit(image.convert("RGB"), (side_px, side_px), Image.Resampling.LANCZOS)


def _rounded_mask(size: tuple[int, int]) -> Image.Image:
    """Corners drawn four times too large and reduced, as Pillow draws without smoothing."""
    large = Image.new("L", (size[0] * 4, size[1] * 4), 0)
    box = (0, 0, large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, CORNER_PX * 4, 255)
    return large.resize(size, Image.Resampling.BOX)


def _paste_rounded(block: Image.Image, picture: Image.Image, at: tuple[int, int]) -> None:
    block.paste(picture, at, _rounded_mask(picture.size))


def _empty_frame(block: Image.Image, at: tuple[int, int], size: Size, text: str) -> None:
    frame = Image.new("RGB", (size.width, size.height), LINE)
    inner = Image.new("RGB", (size.width - 4, size.height - 4), EMPTY)
    frame.paste(inner, (2, 2), _rounded_mask(inner.size))
    pen = ImageDraw.Draw(frame)
    pen.text((size.width / 2, size.height / 2), text, SOFT_INK, _font(16), anchor="mm")
    _paste_rounded(block, frame, at)
