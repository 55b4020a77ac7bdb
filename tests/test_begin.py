"""The start of a run: only what is needed is read, large pictures are encoded in tiles, memory that
was freed is given back, and libraries are imported beside the photos."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.learners import load_backbone, make_learner
from tests.runs import Outcome, same_tensors, tensors_of
from trainer.errors import ModelError
from trainer.families import backbone as backbone_module
from trainer.families import diffusers_folder, early, stable_diffusion
from trainer.families.header import read_header
from trainer.families.weights import open_weights
from trainer.training import heap
from trainer.training.learner import Learner
from trainer.types import Prompts

Train = Callable[..., Outcome]
# Captions are dropped, so the empty text is needed too.
DROPPING = ("caption.dropout=0.5", "objective.prior_weight=0", "adapter.text_encoder=false")


# --- what is read of a base


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that are read from a base's files, in order."""
    names: list[str] = []
    plain = diffusers_folder.read_part

    def read_part(facts: Any, name: str, dtype: torch.dtype) -> Any:
        names.append(name)
        return plain(facts, name, dtype)

    monkeypatch.setattr(stable_diffusion, "read_part", read_part)
    return names


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_a_run_whose_photos_are_encoded_reads_the_unet_alone(
    train: Train, read: list[str], tmp_path: Path
) -> None:
    train(*DROPPING, output=tmp_path / "first").done()
    assert sorted(read) == ["text_encoder", "unet", "vae"]
    assert read[-1] == "unet"  # photos are encoded before it takes its memory
    read.clear()
    train(*DROPPING, output=tmp_path / "second").done()
    assert read == ["unet"]
    read.clear()
    train(*DROPPING, "data.cache=false", output=tmp_path / "third").done()
    assert sorted(read) == ["text_encoder", "unet", "vae"]
    first, *others = (tensors_of(tmp_path / name) for name in ("first", "second", "third"))
    assert all(same_tensors(first, other) for other in others)


@pytest.mark.usefixtures("own_cache")
def test_captions_that_vary_do_not_read_the_encoder_at_every_step(
    train: Train, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[str] = []
    plain = Learner._embedding

    def embedding(learner: Learner, text: str) -> Prompts:
        embedded.append(text)
        return plain(learner, text)

    monkeypatch.setattr(Learner, "_embedding", embedding)
    train("caption.tag_dropout=0.5", *DROPPING, output=tmp_path / "out").done()
    assert len(set(embedded)) > 1
    assert read.count("text_encoder") == 1


@pytest.mark.usefixtures("own_cache")
def test_a_trained_text_encoder_stays(train: Train, read: list[str], tmp_path: Path) -> None:
    drawing = ("preview.every_steps=2", "preview.scorer=plain", "adapter.text_encoder=true")
    train(*DROPPING, *drawing, output=tmp_path / "out").done()
    assert read.count("text_encoder") == read.count("unet") == 1


def test_what_the_cache_knows_is_what_the_learner_would_make(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(base)
    made = learner._embedding("")
    known = make_learner(base)
    known.know({"": Prompts(made.embeddings_BTD)})
    monkeypatch.setattr(known.backbone, "encode_prompts", None)
    assert torch.equal(known._embedding("").embeddings_BTD, made.embeddings_BTD)


# --- weights


def test_weights_are_read_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.randn(3, 5).half(),
        "b": torch.randn(2).bfloat16(),
        "c": torch.randn(4, 2, 3, 3),
        "d": torch.tensor(2.5, dtype=torch.float64),
        "e": torch.empty(0, 3),
        "f": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path)
    with open_weights(read_header(path)) as read:
        for name, tensor in tensors.items():
            found = read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float())


def test_numbers_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.int64)}, path)
    with open_weights(read_header(path)) as read, pytest.raises(ModelError, match="I64"):
        read("a")


def test_a_file_that_was_cut_off_meanwhile_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(300)}, path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with open_weights(header) as read, pytest.raises(ModelError, match="'a' is cut off"):
        read("a")


# --- large pictures


def test_large_pictures_are_encoded_in_tiles(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = load_backbone(base)
    seen: list[tuple[int, ...]] = []
    encoder = backbone._part("vae").encoder
    encoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.zeros(1, 4, 16, 24)
    with torch.no_grad():
        whole = backbone.encode_pixels(pixels, noise)
        assert seen == [(1, 3, 64, 96)]
        seen.clear()
        monkeypatch.setattr(backbone_module, "MOST_WHOLE_PIXELS", 64 * 96 - 1)
        tiled = backbone.encode_pixels(pixels, noise)
        assert torch.equal(tiled, backbone.encode_pixels(pixels, noise))
    assert max(height * width for _, _, height, width in seen) <= 32 * 32
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)  # hence a name of its own in the cache
    assert float((tiled - whole).abs().mean() / whole.abs().mean()) < 0.5


# --- memory and imports


def test_the_heap_is_told_when_weights_come_and_when_they_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, ...]] = []

    class Library:
        def mallopt(self, what: int, size: int) -> None:
            told.append((what, size))

        def malloc_trim(self, keep: int) -> None:
            told.append((keep,))

    monkeypatch.setattr(heap, "_glibc", Library)
    heap.keep_big_blocks_apart()
    assert told == [(-3, 2**20), (-1, 2**20)]
    told.clear()
    heap.keep_blocks_for_reuse()
    assert told == [(-3, 2**25), (-1, -1), (0,)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another heap")
def test_linux_has_the_calls() -> None:
    library = heap._glibc()
    if library is not None:
        assert library.malloc_trim(0) in (0, 1)
        assert callable(library.mallopt)


_STEPS = """
import ctypes, resource
from trainer.training import heap

heap.SETUP
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = library.memset.argtypes = None

def step():
    "200 MB are used and freed, as what a step keeps for its backward pass; pages touched anew."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [ctypes.c_void_p(library.malloc(2**20)) for _ in range(200)]
    for block in kept:
        library.memset(block, 1, ctypes.c_size_t(2**20))
    for block in reversed(kept):
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
print(step())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another heap")
@pytest.mark.parametrize(
    ("setup", "least", "most"),
    [("keep_blocks_for_reuse()", 0, 2_000), ("keep_big_blocks_apart()", 50_000, 60_000)],
)
def test_steps_touch_no_fresh_memory(setup: str, least: int, most: int) -> None:
    """200 MB are 51,200 pages, each of which the system clears for whoever asks anew."""
    if heap._glibc() is None or mmap.PAGESIZE != 4096:
        pytest.skip("another C library or other pages")
    script = _STEPS.replace("SETUP", setup)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert least <= int(done.stdout) <= most


def test_elsewhere_the_heap_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert heap._glibc() is None
    heap.keep_big_blocks_apart()
    heap.keep_blocks_for_reuse()


def test_libraries_are_imported_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "_threads", [])
    named: list[str] = []

    def import_module(name: str) -> None:
        named.append(name)
        raise ImportError(name)  # is told where it is needed

    monkeypatch.setattr(early, "import_module", import_module)
    early.wait()
    early.begin()
    early.begin()
    early.wait()
    assert named == list(early._MODULES)
