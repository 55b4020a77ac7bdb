"""The readers, called as the commands call them, each with one input in a file of its own."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import category

from hypothesis import strategies as st

from tests.fuzz import inputs, seeds
from tests.fuzz.seeds import BASE_NAMES, LORA_NAMES
from trainer.adapters.convert import convert
from trainer.adapters.forms import FORMS
from trainer.adapters.outside import CONFIG_NAME
from trainer.adapters.sidecars import SidecarFacts, write_sidecars
from trainer.commands import inspect
from trainer.config.reader import build_config, override_layer, parse_override, read_toml
from trainer.data.cache import TensorCache
from trainer.data.cache_folder import list_entries
from trainer.data.caption_variants import CaptionStyle, vary
from trainer.data.captions import caption_photos
from trainer.data.decode import decode_with_alpha, measure, read_mask
from trainer.doctor.facts import FactStore
from trainer.errors import TrainerError
from trainer.families.detect import inspect_base
from trainer.training.preview import PreviewDefaults, read_prompts
from trainer.training.reports import read_metrics
from trainer.types import Photo, Size

# What no output may hold, whatever is in a file.
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_KEY = "0" * 64
_PROMPTS = PreviewDefaults(Size(64, 64), seed=0, guidance=6.0, steps=20, side_step_px=8)
_MEGAPIXELS = 4.0

Run = Callable[[Any, Path], object]


@dataclass(frozen=True, slots=True)
class Target:
    """A reader.

    draw: what it is given. run: reads it, with a folder for its file. share: how many of 1,000
    inputs are its; quick readers get most.
    """

    draw: st.SearchStrategy[Any]
    run: Run
    share: int


def try_one(target: Target, given: Any, folder: Path) -> bool:
    """Whether a reader took an input; every error but the project's own comes through."""
    said = ""
    try:
        target.run(given, folder)
    except TrainerError as error:
        said = str(error)
    assert not STEERING.search(said), f"steers the terminal: {said!r}"
    return not said


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _settings(content: bytes, folder: Path) -> None:
    build_config([read_toml(_written(folder, "settings.toml", content), "settings.toml")])


def _override(text: str, _folder: Path) -> None:
    build_config([override_layer([parse_override(text)], "--set")])


def _captions(content: bytes, folder: Path) -> None:
    _written(folder, "a.txt", content)
    draw = random.Random(content)
    style = CaptionStyle(
        trigger="ohwx",
        class_noun="person",
        prefix=draw.choice(("", "photo of {trigger}")),
        separator=draw.choice((",", ", ", " ", "|")),
        shuffle_tags=draw.random() < 0.5,
        tag_dropout=draw.choice((0.0, 0.5)),
        wildcards=draw.random() < 0.7,
    )
    photo = Photo(folder / "a.png", Size(64, 64), _KEY)
    (captioned,) = caption_photos(
        [photo],
        trigger="ohwx",
        class_noun="person",
        style=style,
        several_lines=draw.random() < 0.5,
    )
    for step in range(2):
        text = vary(captioned.texts, style, 0, step, "a")
        assert not any(category(character) in ("Cc", "Cs") for character in text)


def _prompts(content: bytes, folder: Path) -> None:
    for prompt in read_prompts(
        _written(folder, "prompts.txt", content), "ohwx", "person", _PROMPTS
    ):
        assert prompt.size.area <= 2048**2
        prompt.without("ohwx")


def _inspect(content: bytes, folder: Path) -> None:
    path = _written(folder, "a.safetensors", content)
    for as_json in (False, True):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            inspect.run(path, as_json=as_json)
        assert not STEERING.search(out.getvalue())
        assert not as_json or json.loads(out.getvalue())


def _convert(content: bytes, folder: Path) -> None:
    path = _written(folder, "a.safetensors", content)
    draw = random.Random(content)
    form = draw.choice(FORMS)
    made = folder / ("made" if form == "peft" else "made.safetensors")
    family = draw.choice(("", "sd1", "sd2", "sdxl"))
    convert(path, made, to=form, family=family, overwrite=made.exists())


def _base(content: bytes, folder: Path) -> None:
    draw = random.Random(content)
    path = _written(folder, "base.safetensors", content)
    if draw.random() < 0.8:  # as if the weights were there; most systems store no zeros
        with path.open("rb+") as file:
            file.truncate(2**28)
    inspect_base(path, prediction=draw.choice(("auto", "epsilon")))


def _pickle(content: bytes, folder: Path) -> None:
    from trainer.families.checkpoints import open_checkpoint

    path = _written(folder, "base.ckpt", content)
    for tensor in open_checkpoint(path).values():
        tensor.numel()
    inspect_base(path)


def _picture(content: bytes, folder: Path) -> None:
    path = _written(folder, "a.png", content)
    size = measure(path, maximum_megapixels=_MEGAPIXELS).size
    decode_with_alpha(path, at_least=Size(16, 16))
    read_mask(path, size, maximum_megapixels=_MEGAPIXELS)


def _folder(given: tuple[str, bytes], folder: Path) -> None:
    """A base in diffusers' format of which one JSON file is altered."""
    place, content = given
    files = tiny_configurations()
    for name, kept in files.items():
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == place or not path.is_file():
            path.write_bytes(content if name == place else kept)
    try:
        inspect_base(folder / "model")
    finally:
        (folder / "model" / place).write_bytes(files[place])


def _records(given: tuple[int, bytes], folder: Path) -> None:
    """What runs keep and read back: damaged, it counts as not there."""
    which, content = given
    match which:
        case 0:
            for row in read_metrics(_written(folder, "metrics.jsonl", content)):
                assert isinstance(row["step"], int)
        case 1:
            _written(folder, "card.json", content)
            facts = SidecarFacts(description="", family="sd1", activation_text="ohwx")
            write_sidecars(folder / "card.safetensors", facts)
            assert json.loads((folder / "card.json").read_text("utf-8"))["activation text"]
        case 2:
            cache_folder = folder / "cache"
            cache_folder.mkdir(exist_ok=True)
            _written(cache_folder, f"{_KEY}.safetensors", content)
            list_entries(cache_folder)
            TensorCache(cache_folder).get(_KEY)
        case 3:
            store = FactStore(folder / "facts")
            path = store._path(folder / "facts", _KEY)  # where it looks is its own affair
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            store.get(_KEY, "nothing")
        case _:
            (folder / "peft").mkdir(exist_ok=True)
            _written(folder / "peft", CONFIG_NAME, content)
            lora = _written(folder / "peft", "adapter_model.safetensors", _peft_file())
            with contextlib.redirect_stdout(io.StringIO()):
                inspect.run(lora)


def _checkpoint(number: int, folder: Path) -> None:
    """A checkpoint whose state.json was altered by somebody who knows how it is sealed."""
    from trainer.training.checkpoint_files import STATE, seal_of
    from trainer.training.state import newest_checkpoint, restore, save_checkpoint

    place, learner = folder / "checkpoints", _learner()
    path = place / "step-000003" / STATE
    if not path.is_file():
        facts = {"adapter.rank": 2, "photos": ["a", "b"]}
        save_checkpoint(place, learner, 3, facts, keep=1, guard={"bad": 0})
    whole = path.read_bytes()
    state = json.loads(whole)
    del state["seal"]
    altered = json.loads(inputs.json_like(state, 4 * number + 1, share=0.15))
    if isinstance(altered, dict):
        altered["seal"] = seal_of(altered)
    text = json.dumps(altered).encode()
    try:
        path.write_bytes(inputs.altered(text, number) if number % 5 == 0 else text)
        checkpoint, notices = newest_checkpoint(place)
        assert checkpoint or notices
        if checkpoint:
            restore(learner, checkpoint)
    finally:
        path.write_bytes(whole)


@cache
def _learner() -> Any:
    import tempfile

    from tests.learners import make_learner
    from tests.tiny import save_tiny_base

    with tempfile.TemporaryDirectory() as made:
        return make_learner(save_tiny_base(Path(made) / "tiny"))


@cache
def _peft_file() -> bytes:
    import torch
    from safetensors.torch import save

    name = f"base_model.model.{seeds.DOTTED}.attn1.to_q"
    return save(
        {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    )


@cache
def tiny_configurations() -> Mapping[str, bytes]:
    """The JSON files of the tiny base."""
    import tempfile

    from tests.tiny import save_tiny_base

    with tempfile.TemporaryDirectory() as made:
        base = save_tiny_base(Path(made) / "tiny")
        return {
            name: content
            for name, content in seeds.configurations(base).items()
            if "tokenizer" not in name
        }


def _one_of_the_configurations() -> st.SearchStrategy[tuple[str, bytes]]:
    numbers = st.integers(0, 2**48)

    def made(number: int) -> tuple[str, bytes]:
        files = tiny_configurations()
        name = random.Random(number).choice(sorted(files))
        return name, inputs.json_like(json.loads(files[name]), number)

    return numbers.map(made)


_RECORDS: tuple[Any, ...] = (
    {"step": 1, "loss": 0.5, "rate": 1e-4, "grad_norm": 1.0, "keys": ["a"]},
    {"description": "x", "notes": "y", "negative text": "z"},
    {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": 4}, "alpha_pattern": {}, "use_rslora": True},
    {"check": "0" * 64, "digest": _KEY, "faces": [{"box": [1, 2, 3, 4]}], "hash": 3},
)

_LORAS = st.one_of(
    inputs.headers(LORA_NAMES),
    inputs.lora_files(),
    inputs.tables_of(seeds.loras),
    inputs.files(seeds.loras),
)
_BASES = st.one_of(
    inputs.headers(BASE_NAMES), inputs.tables_of(seeds.bases), inputs.files(seeds.bases)
)

TARGETS: dict[str, Target] = {
    "settings file": Target(
        st.one_of(inputs.tables(), inputs.files(seeds.settings)), _settings, 90
    ),
    "--set": Target(inputs.overrides(), _override, 140),
    "captions": Target(inputs.encoded_texts(), _captions, 200),
    "prompts file": Target(inputs.encoded_texts(), _prompts, 260),
    "LoRA inspected": Target(_LORAS, _inspect, 60),
    "LoRA converted": Target(_LORAS, _convert, 40),
    "base file": Target(_BASES, _base, 100),
    "pickle": Target(inputs.files(seeds.pickles), _pickle, 10),
    "picture": Target(inputs.files(seeds.pictures), _picture, 50),
    "base folder": Target(_one_of_the_configurations(), _folder, 20),
    "checkpoint": Target(st.integers(0, 2**40), _checkpoint, 8),
    "records": Target(st.tuples(st.integers(0, 4), inputs.json_files(_RECORDS)), _records, 30),
}
