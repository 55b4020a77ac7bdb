"""No file of anybody's makes a reader fail, hang, or fill the memory."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import atheris_run
from tests.fuzz.bounds import TookTooLong, peak_bytes, time_bound
from tests.fuzz.cases import CASES, alpha_alone
from tests.fuzz.targets import TARGETS, try_one
from trainer.adapters.convert import convert
from trainer.adapters.forms import FORMS, Form
from trainer.data.caption_variants import CaptionStyle, vary
from trainer.errors import FileFormatError

ROOT = Path(__file__).resolve().parent.parent.parent
# Beyond what a case is itself, for those that ask for much more.
CASE_BYTES = 300_000_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where inputs are written; each one replaces the one before."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.filterwarnings("ignore")  # of Pillow and PyTorch, on damaged files
@pytest.mark.parametrize("name", TARGETS)
def test_every_reader_withstands_damaged_files(name: str, place: Path) -> None:
    target = TARGETS[name]

    @settings(max_examples=30, suppress_health_check=list(HealthCheck))
    @given(target.draw)
    def give(content: object) -> None:
        with time_bound():
            try_one(target, content, place)

    give()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_what_broke_a_reader_once(case: str, place: Path) -> None:
    name, make = CASES[case]
    content = make()
    before = peak_bytes()
    with time_bound():
        try_one(TARGETS[name], content, place)
    assert peak_bytes() - before < CASE_BYTES


@given(st.sampled_from(["{", "}", "{a|", "|", "\\{", "{|}"]), st.integers(1, 200_000))
@settings(max_examples=12)
def test_a_caption_of_brackets_comes_to_an_end(piece: str, times: int) -> None:
    style = CaptionStyle(trigger="ohwx", wildcards=True)
    with time_bound():
        vary([piece * times + "}" * times], style, 0, 0, "a")


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_without_a_layer_is_not_converted(form: Form, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    source.write_bytes(alpha_alone())
    with pytest.raises(FileFormatError, match="no layer"):
        convert(source, tmp_path / "made.safetensors", to=form, family="sd1")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_what_takes_too_long_is_noticed() -> None:
    def work() -> None:
        started = time.process_time()
        with time_bound(0.05):
            while time.process_time() - started < 1:
                pass

    with pytest.raises(TookTooLong):
        work()


def test_an_error_of_another_kind_comes_through(place: Path) -> None:
    """The readers' table itself: what is not the project's own error is not taken for one."""
    from dataclasses import replace

    def broken(_content: object, _folder: Path) -> None:
        raise KeyError("shape")

    with pytest.raises(KeyError):
        try_one(replace(TARGETS["captions"], run=broken), b"", place)


def test_a_large_header_is_refused_before_there_is_memory_for_it(place: Path) -> None:
    content = CASES["a header of 2^60 bytes"][1]()
    tracemalloc.start()
    try_one(TARGETS["LoRA inspected"], content, place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.slow
def test_a_hundred_thousand_inputs() -> None:
    command = [sys.executable, "-m", "tests.fuzz.run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    total = re.search(r"^([\d,]+) inputs, peak memory (\d+) MB", done.stdout, re.MULTILINE)
    assert total is not None
    assert int(total[1].replace(",", "")) >= 100_000
    assert int(total[2]) < 1000


@pytest.mark.slow
@pytest.mark.skipif(not atheris_run.installed(), reason="atheris is not installed")
@pytest.mark.parametrize("name", atheris_run.READERS)
def test_atheris_finds_nothing_in_a_few_seconds(name: str) -> None:
    assert atheris_run.search(name, seconds=5) == 0
