"""The contact sheet: sizes, missing samples, and the same pixels every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from trainer.report.contact_sheet import CELL_PX, MARKED, SheetRow, contact_sheet, fit, wrap

RED, BLUE = (220, 40, 40), (30, 60, 200)


def plain(colour: tuple[int, int, int], width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def share_of(colour: tuple[int, int, int], sheet: Image.Image) -> int:
    """How many pixels have exactly this colour."""
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def test_samples_appear_enlarged_by_a_whole_number() -> None:
    rows = [SheetRow("a red one", [plain(RED), plain(BLUE)])]
    sheet = contact_sheet(rows, ["before training", "step 300"], title="zia")
    for colour in (RED, BLUE):
        assert 0.98 * 192**2 < share_of(colour, sheet) <= 192**2  # 64 px x 3, rounded corners
    columns = np.asarray(sheet)
    red_x = np.nonzero((columns == RED).all(axis=-1).any(axis=0))[0]
    blue_x = np.nonzero((columns == BLUE).all(axis=-1).any(axis=0))[0]
    assert red_x.max() < blue_x.min()


def test_same_input_same_pixels() -> None:
    rows = [SheetRow("zia avatar, at the beach", [plain(RED), None])]
    first, second = (
        contact_sheet(rows, ["before", "after"], title="zia", reference=[plain(BLUE)])
        for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()
    assert first.mode == "RGB"


def test_missing_samples_are_empty_frames() -> None:
    full = contact_sheet([SheetRow("p", [plain(RED)] * 3)], ["a", "b", "c"], title="t")
    for images in ([plain(RED), None, plain(RED)], [plain(RED), plain(RED)]):
        sheet = contact_sheet([SheetRow("p", images)], ["a", "b", "c"], title="t")
        assert sheet.size == full.size
        assert share_of(RED, sheet) == pytest.approx(share_of(RED, full) * 2 / 3)
    empty = contact_sheet([SheetRow("p", [None])], ["a"], title="t")
    assert min(empty.size) > CELL_PX


def test_more_samples_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples for 1 columns: the prompt"):
        contact_sheet([SheetRow("the prompt", [None, None])], ["a"], title="t")


def test_every_row_and_the_photos_make_it_taller() -> None:
    one = contact_sheet([SheetRow("p", [plain(RED)])], ["a"], title="t")
    two = contact_sheet([SheetRow("p", [plain(RED)])] * 2, ["a"], title="t")
    strip = contact_sheet([SheetRow("p", [plain(RED)])], ["a"], title="t", reference=[plain(BLUE)])
    assert two.height > one.height + 190
    assert strip.height > one.height
    assert share_of(BLUE, strip) > 50**2


def test_photos_that_do_not_fit_are_counted_not_drawn() -> None:
    rows = [SheetRow("p", [plain(RED)] * 4)]
    columns = ["a", "b", "c", "d"]
    forty = contact_sheet(rows, columns, title="t", reference=[plain(BLUE)] * 40)
    four_hundred = contact_sheet(rows, columns, title="t", reference=[plain(BLUE)] * 400)
    assert forty.size == four_hundred.size
    assert share_of(BLUE, forty) == share_of(BLUE, four_hundred) > 20 * 50**2


def test_many_columns_stay_within_bounds() -> None:
    row = SheetRow("p", [plain(RED, 512, 512)] * 12)
    sheet = contact_sheet([row], [f"step {n}" for n in range(12)], title="t")
    assert sheet.width <= 2200
    assert share_of(RED, sheet) > 12 * 0.95 * 96**2


def test_shapes_are_kept() -> None:
    assert fit(plain(RED, 64, 96), 224).size == (192, 288)
    assert fit(plain(RED, 1024, 512), 224).size == (224, 112)
    assert fit(plain(RED, 3000, 1), 224).size == (224, 1)
    assert fit(Image.new("RGBA", (64, 64)), 224).mode == "RGB"
    tall = contact_sheet([SheetRow("p", [plain(RED, 64, 128), plain(BLUE)])], ["a", "b"], title="t")
    assert share_of(RED, tall) > 1.9 * share_of(BLUE, tall)


def test_a_long_prompt_makes_its_row_taller() -> None:
    prompt = "zia avatar wearing a striped shirt and a very tall hat " * 8
    short = contact_sheet([SheetRow("p", [plain(RED)])], ["a"], title="t")
    long = contact_sheet([SheetRow(prompt, [plain(RED)])], ["a"], title="t")
    assert long.height > short.height
    assert share_of(RED, long) == share_of(RED, short)


@given(text=st.text(max_size=80), width=st.integers(20, 300))
def test_wrapping_loses_no_letter_and_keeps_the_width(text: str, width: int) -> None:
    font = ImageFont.load_default(16)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = wrap(text, font, width)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(len(line) == 1 or font.getlength(line) <= width for line in lines)


def test_headings_and_titles_are_drawn() -> None:
    row = [SheetRow("", [plain(RED)])]
    with_text = contact_sheet(row, ["step 100"], title="zia", subtitle="14 photos")
    without = contact_sheet(row, [""], title="zia", subtitle="")
    assert with_text.height > without.height


def test_a_marked_column_stands_out_behind_its_samples() -> None:
    rows = [SheetRow("p", [plain(RED), plain(BLUE)])] * 2
    sheet = contact_sheet(rows, ["a", "b"], title="t", marked=1)
    unmarked = contact_sheet(rows, ["a", "b"], title="t")
    assert sheet.size == unmarked.size
    pixels = np.asarray(sheet)
    marked_x = np.nonzero((pixels == MARKED).all(axis=-1).any(axis=0))[0]
    blue_x = np.nonzero((pixels == BLUE).all(axis=-1).any(axis=0))[0]
    red_x = np.nonzero((pixels == RED).all(axis=-1).any(axis=0))[0]
    assert red_x.max() < marked_x.min() < blue_x.min() < blue_x.max() < marked_x.max()
    assert share_of(BLUE, sheet) == share_of(BLUE, unmarked)
