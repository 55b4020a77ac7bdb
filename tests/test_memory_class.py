"""Memory classes: which leads to what, that it fits, and that what was set stays as it was set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.saved_bytes import SIZES, Way, kept_bytes
from tests.models import components_of
from tests.runs import Outcome
from tests.strategies import unhurried
from trainer.adapters.targets import TEXT_TARGETS, UNET_TARGETS, select_layers
from trainer.commands.fitting import fitted, require_gpu
from trainer.commands.preflight import in_words
from trainer.commands.sets import SO_FAR
from trainer.config.settings import ModelSettings, OptimizerSettings, TrainConfig
from trainer.errors import ConfigError, DeviceError
from trainer.families import AttentionFacts, BaseFacts
from trainer.families.streaming import blocks_of
from trainer.training import memory_class
from trainer.training.device import Device
from trainer.training.job import FREE_ON_RESUME, Job
from trainer.training.memory import KEPT_VALUES
from trainer.training.memory_class import (
    CHOSEN,
    CLASSES,
    GIB,
    KEPT,
    PLAIN_LAYERS,
    RELEASED,
    SHARES,
    Choice,
    Work,
    choose,
    need,
    room_of,
)
from trainer.training.preflight import Preflight
from trainer.training.run_folder import RunFolder
from trainer.types import Bucketed, Captioned, Photo, Size

DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"
# Family, side of the picture in px, and whether the text encoders are trained.
ROWS = (
    ("sd1", 512, True),
    ("sd1", 768, True),
    ("sd2", 768, True),
    ("sdxl", 1024, False),
    ("sdxl", 1024, True),
)
GPU = Device(torch.device("cuda"), "bf16", "sdpa")
WORKS = st.builds(
    Work,
    family=st.sampled_from(sorted(RELEASED)),
    latents=st.sampled_from([32**2, 64**2, 96**2, 128**2, 4 * 128**2]),
    rank=st.sampled_from([4, 16, 128]),
    targets=st.sampled_from(sorted(UNET_TARGETS)),
    text_targets=st.sampled_from(["", "attention"]),
    text_there=st.booleans(),
    value_bytes=st.sampled_from([2, 4]),
    plain_layers=st.booleans(),
)
FIXED = st.fixed_dictionaries(
    {},
    optional={
        "model.weights": st.sampled_from(["same", "int8", "fp8", "nf4"]),
        "model.checkpointing": st.booleans(),
        "model.checkpoint_share": st.sampled_from([0.3, 1.0]),
        "model.stream_blocks": st.booleans(),
        "optimizer.name": st.sampled_from(["adamw", "adamw8bit"]),
    },
)


def work(family: str, side: int, *, text: bool = True) -> Work:
    targets = "attention" if text else ""
    return Work(family, (side // 8) ** 2, text_targets=targets, text_there=text)


# --- the table


def test_the_document_says_what_each_class_leads_to(update_golden: bool) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    start, end = "<!-- table -->\n", "<!-- end of table -->"
    assert start in text
    before, _, rest = text.partition(start)
    fresh = before + start + "\n".join(table()) + "\n" + end + rest.partition(end)[2]
    if update_golden:
        DOCUMENT.write_text(fresh, encoding="utf-8")
    else:
        assert text == fresh, "pytest tests/test_memory_class.py --update-golden"


def table() -> Iterator[str]:
    yield f"| base, px, text encoders | {' | '.join(CLASSES)} |"
    yield "| --- |" + " --- |" * len(CLASSES)
    for family, side, text in ROWS:
        todo = work(family, side, text=text)
        cells = [f"{family} {side} {'trained' if text else 'frozen'}"]
        for gib in CLASSES.values():
            choice, fits = choose(todo, room_of(gib), {})
            assert fits
            cells.append(f"{choice.words}: {need(todo, choice).all / GIB:.1f} GB")
        yield f"| {' | '.join(cells)} |"


# --- what holds of every choice


@unhurried
@given(WORKS, FIXED)
def test_a_larger_class_never_chooses_a_slower_set(todo: Work, fixed: dict[str, Any]) -> None:
    last = float("inf")
    for gib in (*CLASSES.values(), 1000):
        choice, fits = choose(todo, room_of(gib), fixed)
        if fits:
            assert need(todo, choice).all <= room_of(gib)
            assert choice.slower <= last
            last = choice.slower
        else:
            assert last == float("inf")
    if not fixed:
        assert choice == Choice()


@unhurried
@given(WORKS, FIXED, st.sampled_from(sorted(CLASSES.values())))
def test_what_is_set_stays(todo: Work, fixed: dict[str, Any], gib: int) -> None:
    choice, _ = choose(todo, room_of(gib), fixed)
    # A share counts only where there is checkpointing.
    counting = fixed.keys() - (set() if choice.share else {"model.checkpoint_share"})
    assert {name: choice.settings[name] for name in counting} == {
        name: fixed[name] for name in counting
    }


@unhurried
@given(WORKS)
def test_whatever_saves_memory_saves_some(todo: Work) -> None:
    whole = need(todo, Choice())
    text = todo.text_there
    for choice, part in (
        (Choice(weights="int8"), "frozen"),
        (Choice(weights="nf4"), "frozen"),
        (Choice(stream=True), "frozen"),
        (Choice(share=0.5), "kept"),
        (Choice(optimizer="adamw8bit"), "trained"),
    ):
        assert getattr(need(todo, choice), part) < getattr(whole, part)
        assert need(todo, choice).all < whole.all
    assert (need(replace(todo, text_there=False), Choice()).frozen < whole.frozen) == text


def test_what_fits_nowhere_is_the_smallest_there_is() -> None:
    todo = replace(work("sdxl", 1024), latents=64 * 128**2)
    choice, fits = choose(todo, room_of(4), {})
    assert not fits
    assert choice == Choice("nf4", 1.0, True, "adamw8bit")


# --- the numbers it counts with


@pytest.mark.parametrize("family", RELEASED)
def test_the_numbers_are_those_of_the_published_configurations(family: str) -> None:
    released, models = RELEASED[family], components_of(family)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in models.items()}
    assert released.unet == counts.pop("unet")
    assert released.text == sum(counts.values())
    for targets in UNET_TARGETS:
        assert released.by_rank[targets] == by_rank(models["unet"], "unet", targets)
    for targets in TEXT_TARGETS:
        found = sum(by_rank(models[name], name, targets) for name in counts)
        assert released.text_by_rank[targets] == found


@pytest.mark.parametrize("family", RELEASED)
def test_the_streamed_blocks_are_those_that_are_counted(family: str) -> None:
    """What stays on the device, and the largest that comes to it."""
    sizes = [
        sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d))
        for block in blocks_of(components_of(family)["unet"])
    ]
    assert max(sizes) == RELEASED[family].block
    assert RELEASED[family].unet - sum(sizes) == RELEASED[family].in_place


def by_rank(model: nn.Module, component: str, targets: str) -> int:
    total = 0
    for path in select_layers(model, component, targets):
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        total += weight[0].numel() + weight.shape[0]
    return total


NAMES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}


def counted(family: str, targets: str, way: Way) -> float:
    """Values by latent and by channel of the first block."""
    side = SIZES[NAMES[family]]
    kept = kept_bytes(NAMES[family], side, targets, way)
    return kept / ((side // 8) ** 2 * 320 * 2)


def test_a_kept_value_is_the_one_that_is_counted() -> None:
    assert KEPT["sd1"][0][2] == pytest.approx(counted("sd1", "attention", Way(share=0.5)), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", KEPT)
def test_all_kept_values_are_those_that_are_counted(family: str) -> None:
    plain = Way(frozen=False, norms=False, gates=False)
    for targets, row in zip(("attention", "all"), KEPT[family], strict=True):
        shares = [counted(family, targets, Way(share=share)) for share in SHARES]
        assert row == pytest.approx(shares, rel=0.1)
        assert counted(family, targets, plain) < row[0] * PLAIN_LAYERS * 1.01


def test_more_targets_keep_more_and_more_checkpointing_less() -> None:
    for family, (alone, every) in KEPT.items():
        assert all(few < many for few, many in zip(alone, every, strict=True))
        for row in (alone, every):
            assert list(row) == sorted(row, reverse=True)
        # The stock layers' estimate, which full memory is explained by, is more.
        assert alone[0] < KEPT_VALUES[family] < alone[0] * PLAIN_LAYERS * 1.05


# --- jobs


def a_job(tmp_path: Path, **model: Any) -> Job:
    """A job on SDXL, with these settings of the model given by the user."""
    optimizer = {k: model.pop(k) for k in ("name",) if k in model}
    config = TrainConfig(model=ModelSettings(**model), optimizer=OptimizerSettings(**optimizer))
    origins = {
        f"{section}.{name}": "default"
        for section, values in config.model_dump().items()
        for name in values
    }
    origins |= {f"model.{name}": "command line" for name in model}
    origins |= {f"optimizer.{name}": "command line" for name in optimizer}
    photo = Photo(tmp_path / "a.png", Size(1024, 1024), "0")
    captioned = Captioned(photo, ("a",), "template")
    facts = BaseFacts(
        family="sdxl",
        name="base",
        folder=tmp_path,
        resolution=1024,
        bucket_step_px=64,
        width=2048,
        pixels_per_latent=8,
        prediction="epsilon",
        fits_real=True,
        embedded=False,
        attention=AttentionFacts(heads=10, head_width=64, latents_per_token=2),
    )
    return Job(
        source=tmp_path,
        config=config,
        origins=origins,
        facts=facts,
        folder=RunFolder(tmp_path, "a"),
        photos=(captioned,),
        pictures=(Bucketed(captioned, Size(1024, 1024), Size(1024, 1024), 0, 0),),
        class_pictures=(),
        styles={},
        command="",
    )


def chosen_of(job: Job) -> dict[str, Any]:
    config = job.config
    values = {f"model.{name}": value for name, value in config.model.model_dump().items()}
    values["optimizer.name"] = config.optimizer.name
    return {name: values[name] for name in CHOSEN}


def test_a_class_becomes_settings_with_their_origin(tmp_path: Path) -> None:
    job, words = fitted(a_job(tmp_path, memory="8gb"), GPU)
    choice, _ = choose(work("sdxl", 1024), room_of(8), {})
    assert chosen_of(job) == choice.settings
    assert choice.share > 0
    assert job.origins["model.checkpointing"] == "memory class 8gb"
    assert job.config.data == a_job(tmp_path).config.data
    begun = f"Memory    8gb: {choice.words}, the quickest that fits; a step takes about "
    assert words.startswith(begun)
    # The same once more: nothing is left to choose.
    assert fitted(job, GPU)[0].config == job.config


def test_what_the_user_has_set_is_not_chosen(tmp_path: Path) -> None:
    job, _ = fitted(a_job(tmp_path, memory="6gb", weights="same", name="adamw"), GPU)
    assert (job.config.model.weights, job.config.optimizer.name) == ("same", "adamw")
    assert job.config.model.stream_blocks
    job, words = fitted(a_job(tmp_path, memory="4gb", checkpointing=False, fast="off"), GPU)
    assert not job.config.model.checkpointing
    assert not job.config.model.stream_blocks  # PyTorch's own layers cannot
    assert "That is too much: lower data.resolution" in words


def test_auto_takes_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 5.9
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (int(free * GIB), 24 * GIB))
    small, words = fitted(a_job(tmp_path), GPU)
    assert small.config.model.weights == "int8"
    assert small.origins["model.weights"] == "memory class auto"
    assert "of 5.5 GB" in words  # in quarters of a GB, less what is lost
    # Of processes that train together all choose alike, by the size of the card.
    assert fitted(a_job(tmp_path), GPU, processes=2)[0].config == a_job(tmp_path).config
    free = 23.0
    assert fitted(a_job(tmp_path), GPU)[0].config == a_job(tmp_path).config


def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path: Path) -> None:
    """Unless a class is named for it: then what computes the same may change."""
    begun, _ = fitted(a_job(tmp_path, memory="24gb"), GPU)
    saved = replace(begun, origins=dict.fromkeys(begun.origins, SO_FAR))
    assert fitted(saved, GPU)[0].config == begun.config
    smaller = begun.config.model_copy(
        update={"model": begun.config.model.model_copy(update={"memory": "8gb"})}
    )
    origins = {**saved.origins, "model.memory": "command line"}
    later, _ = fitted(replace(saved, config=smaller, origins=origins), GPU)
    changed = {name for name in CHOSEN if chosen_of(later)[name] != chosen_of(begun)[name]}
    assert changed
    assert changed <= FREE_ON_RESUME


def test_off_and_processors_choose_nothing(tmp_path: Path) -> None:
    assert fitted(a_job(tmp_path, memory="off"), GPU) == (a_job(tmp_path, memory="off"), "")
    here = Device(torch.device("cpu"), "fp32", "sdpa")
    assert fitted(a_job(tmp_path), here) == (a_job(tmp_path), "")
    require_gpu(a_job(tmp_path).config, here)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"memory": "8gb"}, DeviceError, "The memory class 8gb is that of an NVIDIA GPU"),
        ({"stream_blocks": True}, DeviceError, "Blocks are streamed to an NVIDIA GPU"),
        ({"stream_blocks": True, "fast": "off"}, ConfigError, "cannot be streamed"),
    ],
)
def test_what_is_for_a_gpu_is_refused_without_one(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    config = a_job(tmp_path, **settings).config
    with pytest.raises(error, match=words):
        require_gpu(config, Device(torch.device("cpu"), "fp32", "sdpa"))


def test_a_small_base_is_estimated_by_its_files(tmp_path: Path) -> None:
    job = a_job(tmp_path, memory="4gb")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(bytes(1000))
    job = replace(job, facts=replace(job.facts, fits_real=False))
    whole, small = (memory_class.work_of(j, GPU) for j in (a_job(tmp_path), job))
    assert whole.size == 1
    assert small.size == pytest.approx(500 / RELEASED["sdxl"].unet)
    assert need(small, Choice()).frozen < 2000  # text encoders too


@pytest.mark.slow
def test_a_run_is_made_with_what_was_chosen_and_goes_on_with_it(
    train: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor stands for the GPU here: all is chosen for it, and streaming does nothing."""

    def on_gpu(job: Job, device: Device, processes: int) -> tuple[Job, str]:
        return fitted(job, GPU, processes)

    monkeypatch.setattr("trainer.commands.decide.fitted", on_gpu)
    monkeypatch.setattr("trainer.commands.decide.require_gpu", lambda config, device: None)
    monkeypatch.setattr("trainer.commands.fitting.room_of", lambda gib: 1.0)
    settings = ("model.memory=4gb", "model.weights=same")
    first = train(*settings, "run.stop_at_step=2").done()
    assert "Memory    4gb: AdamW in 8 bits, all of the blocks checkpointed, blocks str" in first.out
    text = (tmp_path / "out" / "settings.toml").read_text(encoding="utf-8")
    assert 'name = "adamw8bit"  # memory class 4gb' in text
    assert "stream_blocks = true  # memory class 4gb" in text
    assert 'weights = "same"  # command line' in text
    later = train("--resume").done()
    assert "Going on from step 2." in later.out
    assert "Memory    4gb: AdamW in 8 bits, all" in later.out


# --- measured


@pytest.mark.parametrize(
    ("step", "sample", "words"),
    [
        (6.0, 5.0, "memory class 8gb: holds, 6.0 GB of the 7.0 GB"),
        (6.0, 7.5, "memory class 8gb: holds in training, but samples take 7.5 GB"),
        (7.2, 7.5, "memory class 8gb: does not hold, 7.5 GB of the 7.0 GB .* a smaller one"),
    ],
)
def test_preflight_says_whether_the_class_holds(step: float, sample: float, words: str) -> None:
    found = Preflight(
        bucket="1 of 1024x1024 px",
        step_seconds=1.0,
        step_peak=int(step * GIB),
        sample_seconds=2.0,
        sample_peak=int(sample * GIB),
        samples=3,
        run_seconds=100.0,
        total=8 * GIB,
        on_gpu=True,
    )
    for name in ("8gb", "auto"):
        text = "\n".join(in_words(found, name))
        assert re.search(words.replace("8gb", name), text)
    assert "memory class" not in "\n".join(in_words(found, "off"))
    assert "memory class" not in "\n".join(in_words(replace(found, on_gpu=False), "8gb"))
