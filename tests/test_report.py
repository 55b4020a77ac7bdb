"""The report page: complete, escaped, and sufficient to itself."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.report.curves import Series, line_chart, nice_axis, series_chart, smooth
from trainer.report.page import (
    THUMBNAIL_BYTES,
    CurvePoint,
    FileFacts,
    PhotoRow,
    ReportData,
    ScoreRow,
    SettingRow,
    megabytes,
    render_report,
    scale_percent,
    thumbnail_uri,
)
from trainer.report.steps import BestStep, StepRow

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what a page holds, and checks that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def picture(seed: int, side: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def report() -> ReportData:
    curve = tuple(CurvePoint(n, 0.1 + 0.05 * math.cos(n), 1e-4 * n) for n in range(1, 31))
    return ReportData(
        title="zia-run",
        headline="It learned the look of zia.",
        summary="14 photos, 300 steps.",
        trigger="zia",
        example_prompt="zia avatar at the beach",
        file=FileFacts(
            path=r"C:\runs\zia-1\zia.safetensors",
            size_bytes=349_184,
            hashes={"SHA-256": "ab" * 32, "AutoV3": "abcdef123456"},
            verified=True,
            verification="All 182 tensors match.",
            facts={"Rank": "8, alpha 8"},
        ),
        base="the Likeness embedded base",
        contact_sheet=picture(1, 200),
        scores=(
            ScoreRow("With the trigger word", "It rose.", 0.03, 0.78, 0.41, "Highest of any other"),
            ScoreRow("Drift", "Hardly moved.", None, 0.18, low="unchanged", high="another seed"),
        ),
        best=BestStep(
            step=200,
            file=r"C:\runs\zia-1\zia-best.safetensors",
            reason="Step 200 is the best of 3: likeness 0.92.",
            advice="After step 200 more training only copies your photos.",
            word="Likeness",
            formula="likeness minus the rest",
            rows=(
                StepRow(0, 0.03, -0.01, 0.0, 0.91, 0.0, "0 of 7", None),
                StepRow(100, 0.71, 0.02, 0.11, 0.89, 0.0, "0 of 7", 0.63),
                StepRow(200, 0.92, 0.04, 0.13, 0.88, 0.0, "0 of 7", 0.79),
                StepRow(300, 0.94, 0.09, 0.16, 0.82, 3 / 7, "3 of 7", 0.26),
            ),
        ),
        scores_note="Scored on 24 samples.",
        notes=("It fits no real SD 1.5.", "3 files were skipped."),
        curve=curve,
        saved_steps=(10, 20),
        photos=(PhotoRow("01.png", picture(2), "a red hat", "sidecar", "48x64", "640x512"),),
        settings=(SettingRow("adapter.rank", "8", "configs/face.toml"),),
        settings_toml="[adapter]\nrank = 8\n",
        versions={"PyTorch": "2.13.0"},
        command="python train.py datasets/zia",
    )


def test_the_page_is_well_formed_and_says_everything() -> None:
    page = Page(render_report(report()))
    assert page.open == []
    for word in (
        *("zia-run", "It learned the look of zia.", "14 photos, 300 steps.", "zia avatar at the"),
        *(r"C:\runs\zia-1\zia.safetensors", "341 kB (349,184 bytes)", "ab" * 32, "abcdef123456"),
        *("All 182 tensors match.", "8, alpha 8", "the Likeness embedded base"),
        *("With the trigger word", "It rose.", "0.03", "0.78", "Highest of any other: 0.41"),
        *("Hardly moved.", "0.18", "0 = unchanged", "1 = another seed", "Scored on 24 samples."),
        *("It fits no real SD 1.5.", "3 files were skipped.", "saved at step 10"),
        *("01.png", "a red hat", "sidecar", "48x64", "640x512"),
        *("adapter.rank", "configs/face.toml", "[adapter] rank = 8", "PyTorch", "2.13.0"),
        *("python train.py datasets/zia", "zia avatar at the beach <lora:zia-best:1>"),
        *("Take step 200", "Step 200 is the best of 3: likeness 0.92.", "likeness minus the rest"),
        *("Next time: After step 200 more training only copies", "3 of 7", "91 %", "0.79"),
        *(r"C:\runs\zia-1\zia-best.safetensors", "choose zia-best.safetensors ."),
        *("step 300: copies 0.43", "step 200: with the trigger 0.92", "The last step has a file"),
        *("ComfyUI/models/loras", "stable-diffusion-webui/models/Lora", "learning rate"),
    ):
        assert word in page.text, word


def test_every_text_field_reaches_the_page() -> None:
    shown = render_report(report())
    for field in fields(ReportData):
        value = getattr(report(), field.name)
        if isinstance(value, str) and value:
            marked = f"marked-{field.name}"
            change: dict[str, Any] = {field.name: marked}
            assert marked in render_report(replace(report(), **change)), field.name
            assert marked not in shown


def test_the_page_asks_for_nothing_from_outside() -> None:
    html = render_report(report())
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/jpeg;base64,"), (tag, name)
    assert not re.search(r"@import|url\(|https?://", html)


def test_pictures_can_be_read_from_the_page() -> None:
    sources = [a["src"] for tag, a in Page(render_report(report())).tags if tag == "img"]
    sizes = []
    for source in sources:
        assert source is not None
        data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        sizes.append(Image.open(io.BytesIO(data)).size)
    assert sizes == [(200, 200), (160, 160)]


def test_foreign_text_is_shown_and_never_run() -> None:
    base = report()
    texts: dict[str, Any] = {
        field.name: EVIL
        for field in fields(ReportData)
        if isinstance(getattr(base, field.name), str)
    }
    evil = replace(
        base,
        **texts,
        file=replace(
            base.file,
            path=f"runs/{EVIL}.safetensors",
            verification=EVIL,
            hashes={EVIL: EVIL},
            facts={EVIL: EVIL},
        ),
        notes=(EVIL,),
        scores=(ScoreRow(EVIL, EVIL, 0.0, 1.0, 0.5, EVIL, EVIL, EVIL),),
        best=BestStep(
            1,
            *(EVIL,) * 5,
            rows=(
                StepRow(0, 0.0, 0.0, 0.0, None, 0.0, EVIL, None),
                StepRow(1, 1.0, 0.0, 0.0, None, 0.0, EVIL, 1.0),
            ),
        ),
        photos=(PhotoRow(EVIL, picture(3), EVIL, EVIL, EVIL, EVIL),),
        settings=(SettingRow(EVIL, EVIL, EVIL),),
        versions={EVIL: EVIL},
    )
    html = render_report(evil)
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    assert "alert('x')" in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    harmless = [tag for tag, _ in Page(render_report(base)).tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(harmless)


def test_a_run_without_previews_makes_a_page_too() -> None:
    bare = ReportData(
        "zia", "Trained.", "2 steps", "zia", "zia", report().file, scores_note="No previews."
    )
    page = Page(render_report(bare))
    assert page.open == []
    assert "No previews." in page.text
    assert not [tag for tag, _ in page.tags if tag in {"img", "svg"}]


def best(**changes: Any) -> ReportData:
    """The report with another part on the best step."""
    given = report().best
    assert given is not None
    return replace(report(), best=replace(given, **changes))


def test_the_best_step_that_is_the_last_needs_no_second_file() -> None:
    rows = best().best
    assert rows is not None
    page = Page(render_report(best(rows=rows.rows[:3])))
    assert "Take step 200, the last" in page.text
    assert "It holds the same weights as" in page.text
    assert "The last step has a file" not in page.text


def test_without_a_best_step_the_last_file_is_the_one_to_use() -> None:
    page = Page(render_report(best(step=None, file="", advice="", reason="All are blank.")))
    assert "Which step to take" in page.text
    assert "All are blank." in page.text
    assert "<lora:zia:1>" in page.text
    assert "Next time" not in page.text
    assert page.open == []


def test_what_was_not_read_is_not_shown() -> None:
    given = report().best
    assert given is not None
    rows = tuple(replace(row, following=None) for row in given.rows)
    assert "rompts followed" in Page(render_report(report())).text
    assert "rompts followed" not in Page(render_report(best(rows=rows))).text


def test_the_best_step_is_marked_in_table_and_charts() -> None:
    html = render_report(report())
    assert html.count('<tr class="chosen">') == 1
    assert html.count('class="best"') == 2
    # Dots of the best step: two lines in one chart, three in the other.
    assert html.count(' chosen" cx=') == 5


def test_series_have_a_line_a_legend_and_a_dot_for_each_value() -> None:
    first = Series("one", [0, 10, 20], [0.0, 0.5, 2.0])
    second = Series("two", [10, 20], [0.1, math.nan])
    chart = series_chart([first, second], label="share", best=10)
    page = Page(chart)
    dots = [a for tag, a in page.tags if tag == "circle" and "cx" in a and a["cx"] != "13"]
    assert len(dots) == 4
    assert "step 20: one 2.00" in page.text
    assert "step 10: two 0.10" in page.text
    assert page.text.endswith("one two")
    assert 'aria-label="share"' in chart
    # The mark stands where the dots of its step do.
    (mark,) = [a for tag, a in page.tags if a.get("class") == "best"]
    assert {a["cx"] for a in dots if "chosen" in (a["class"] or "")} == {mark["x1"]}
    assert 'class="best"' not in series_chart([first], label="share", best=None)
    assert series_chart([second], label="share", best=10) == ""
    assert series_chart([], label="share", best=None) == ""


def test_a_failed_check_looks_different() -> None:
    failed = replace(report(), file=replace(report().file, verified=False))
    assert "✓" in Page(render_report(report())).text
    assert "✗" in Page(render_report(failed)).text


def test_thumbnails_are_small_even_for_noise() -> None:
    for side in (16, 64, 1500):
        assert len(thumbnail_uri(picture(4, side))) < THUMBNAIL_BYTES * 4 / 3 + 40
    assert thumbnail_uri(Image.new("RGBA", (30, 50))).startswith("data:image/jpeg")


def test_file_sizes_read_well() -> None:
    assert megabytes(349_184) == "341 kB"
    assert megabytes(151_000_000) == "144.0 MB"


def test_the_scale_holds_every_score() -> None:
    assert (scale_percent(-9), scale_percent(-0.25)) == (0.0, 0.0)
    assert (scale_percent(0.5), scale_percent(9)) == (50.0, 100.0)
    assert scale_percent(0) == pytest.approx(16.7)


def test_loss_curve_has_raw_and_smooth_line_and_marks() -> None:
    steps = list(range(1, 101))
    values = [1 / step for step in steps]
    chart = line_chart(steps, values, label="loss", smoothed=True, marks=(50, 100, 900))
    assert chart.count("<polyline") == 2
    assert chart.count('class="mark"') == 2
    assert 'aria-label="loss"' in chart
    assert ">loss</text>" in chart
    assert ">step</text>" in chart
    assert line_chart(steps, values, label="rate", smoothed=False).count("<polyline") == 1


def test_a_short_run_has_whole_steps_on_its_axis() -> None:
    chart = line_chart([1, 2, 3], [1.0, 2.0, 1.5], label="loss", smoothed=False)
    below = re.findall(r'text-anchor="middle">(\d+)</text>', chart)
    assert below == ["1", "2", "3"]


def test_curves_leave_out_what_is_not_a_number() -> None:
    chart = line_chart([1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0], label="loss", smoothed=False)
    assert "nan" not in chart
    assert "inf" not in chart
    assert line_chart([1, 2], [1.0, math.nan], label="loss", smoothed=True) == ""
    assert line_chart([], [], label="loss", smoothed=True) == ""


def test_smoothing_starts_at_the_first_value_and_keeps_constants() -> None:
    assert smooth([4.0])[0] == pytest.approx(4.0)
    assert smooth([2.0] * 20) == pytest.approx([2.0] * 20)
    # By hand: 0.9 * (0.1 * 1) + 0.1 * 3 = 0.39; divided by 1 - 0.9 ** 2 = 0.19.
    assert smooth([1.0, 3.0], keep=0.9)[1] == pytest.approx(0.39 / 0.19)


@given(
    low=st.floats(-1e6, 1e6), width=st.floats(1e-6, 1e6) | st.just(0.0), wanted=st.integers(2, 10)
)
def test_axes_hold_their_values_with_few_round_marks(low: float, width: float, wanted: int) -> None:
    axis = nice_axis(low, low + width, wanted)
    slack = 1e-6 * (axis.high - axis.low) + 1e-9
    assert axis.low - slack <= low <= low + width <= axis.high + slack
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= wanted + 4
    assert list(axis.ticks) == sorted(set(axis.ticks))
