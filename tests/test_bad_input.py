"""What a person may get wrong: each ends in a clear message, and nothing of theirs is changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.runs import Outcome, files_in, state_of

Train = Callable[..., Outcome]


@pytest.fixture
def own(photos: Path, tmp_path: Path) -> Path:
    """A user's folder of photos, with something else in it."""
    folder = Path(shutil.copytree(photos, tmp_path / "home" / "anna"))
    (folder / "diary.md").write_text("private", encoding="utf-8")
    return folder


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """Explained in words, with its exit code and without a traceback."""
    assert outcome.code == code, outcome
    for word in words:
        assert word in outcome.err
    assert "Traceback" not in outcome.err
    assert "should not have" not in outcome.err
    # The last line says what to do.
    assert outcome.err.strip().splitlines()[-1].rstrip().endswith((".", "?", ")"))


# --- photos


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def text_named_jpg(folder: Path) -> None:
    (folder / "letter.jpg").write_text("Dear Anna, " * 50, encoding="utf-8")


def truncated_jpeg(folder: Path) -> None:
    path = folder / "cut.jpg"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-400])


def one_pixel(folder: Path) -> None:
    Image.new("RGB", (1, 1)).save(folder / "dot.png")


def nothing_in_the_file(folder: Path) -> None:
    (folder / "zero.png").touch()


def pictures_below(folder: Path) -> None:
    (folder / "sub").mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "sub" / path.name)


PHOTO_TROUBLE: dict[Callable[[Path], None], tuple[str, ...]] = {
    no_folder: ("anna", "Check the path of the photo folder."),
    empty_folder: ("anna", "it is empty", "Put photos into it"),
    text_named_jpg: ("letter.jpg", "is not a picture", "data.skip_bad=true"),
    truncated_jpeg: ("cut.jpg", "damaged or incomplete", "data.skip_bad=true"),
    one_pixel: ("dot.png", "1 x 1 px", "Use a larger version"),
    nothing_in_the_file: ("zero.png", "0 bytes"),
    pictures_below: ("3", "sub-folders", "data.recursive=true"),
}


@pytest.mark.parametrize("spoil", PHOTO_TROUBLE, ids=lambda spoil: spoil.__name__)
def test_trouble_with_photos(
    spoil: Callable[[Path], None], train: Train, own: Path, tmp_path: Path
) -> None:
    spoil(own)
    before = state_of(tmp_path)
    refused(train(folder=own), 1, *PHOTO_TROUBLE[spoil])
    assert state_of(tmp_path) == before


def test_all_bad_photos_are_listed_at_once(train: Train, own: Path) -> None:
    for spoil in (text_named_jpg, truncated_jpeg, one_pixel):
        spoil(own)
    refused(train(folder=own), 1, "3 of 6 photos", "letter.jpg", "cut.jpg", "dot.png")


def test_a_misspelt_folder_gets_a_suggestion(train: Train, own: Path) -> None:
    outcome = train(folder=own.with_name("ana"))
    assert outcome.code == 1
    assert "Did you mean" in outcome.err
    assert "anna" in outcome.err


def test_a_photo_instead_of_the_folder(train: Train, own: Path) -> None:
    refused_outcome = train(folder=own / "0.png")
    assert refused_outcome.code == 1
    assert "is a file, not a folder" in refused_outcome.err


def test_sidecars_that_are_no_captions(train: Train, own: Path) -> None:
    (own / "1.txt").write_bytes(b"x" * 2_000_000)
    refused(train(folder=own), 1, "1.txt")


# --- settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("adapter.rnk=4", ("adapter.rnk", "did you mean adapter.rank?")),
        ("adapter.rank=four", ("adapter.rank", "integer", "docs/settings.md")),
        ("run.total_steps=0", ("run.total_steps", "greater than or equal to 1")),
        ("data.bucket_step_px=12", ("data.bucket_step_px", "multiple of 8")),
        ("data.bucket_step_px=64", ("data.bucket_step_px", "data.resolution")),
        ("optimizer.name=adamx", ("adamx", "Did you mean 'adamw'?")),
        ("adapter.kind=lola", ("lola", "Did you mean 'lora'?")),
        ("preview.prompts=nowhere", ("preview.prompts = 'nowhere'", "face")),
        ("objective.prior_prompts=nowhere", ("'nowhere'", "prior")),
        ("run.kind=dog", ("run.kind", "'face' or 'style'")),
        ("seed", ("--set seed", "--set run.total_steps=800")),
    ],
)
def test_wrong_settings(
    wrong: str, words: tuple[str, ...], train: Train, own: Path, tmp_path: Path
) -> None:
    before = state_of(tmp_path)
    outcome = train(wrong, "preview.every_steps=2", folder=own)
    assert outcome.code == 2, outcome
    for word in words:
        assert word in outcome.err, outcome.err
    assert state_of(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("no such settings file", "mine.toml")),
        ("[adapter\nrank = 4", ("not valid TOML", "1: [adapter")),
        ("[adapter]\nalpha = '4'", ("adapter.alpha (mine.toml)", "number")),
        ("network_dim = 4", ("network_dim (mine.toml)", "here it is called adapter.rank")),
    ],
)
def test_a_wrong_settings_file(
    content: str | None, words: tuple[str, ...], train: Train, own: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    before = state_of(tmp_path)
    outcome = train(f"--config={path}", folder=own)
    assert outcome.code == 2
    for word in words:
        assert word in outcome.err
    assert state_of(tmp_path) == before


def test_a_prompts_file_with_a_mistake(train: Train, own: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("fine\nbad --w 3\n", encoding="utf-8")
    before = state_of(tmp_path)
    outcome = train("preview.every_steps=2", f"preview.prompts={path}", folder=own)
    refused(outcome, 1, "prompts.txt, line 2: bad --w 3")
    assert files_in(tmp_path) == {name for name, hash_ in before.items() if hash_ != "folder"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("setting", ["model.precision=fp16", "model.device=cuda"])
def test_what_the_machine_has_not(setting: str, train: Train, own: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    outcome = train(setting, "model.device=cpu" if "fp16" in setting else setting, folder=own)
    refused(outcome, 1, setting.partition("=")[0], "GPU")
    assert state_of(tmp_path) == before


# --- base and output


def test_a_base_that_is_none(train: Train, own: Path, base: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    refused(train(folder=own, model=tmp_path / "nothing"), 1, "no such base model", "nothing")
    refused(train(folder=own, model=own), 1, "not a base model in diffusers format", "anna")
    refused(train(folder=own, model=base / "model_index.json"), 1, "single file")
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_base_without_a_part(
    part: str, train: Train, own: Path, base: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    shutil.rmtree(model / part)
    refused(train(folder=own, model=model), 1, "is missing", part)
    assert not files_in(tmp_path / "out")


def test_an_output_below_a_file(train: Train, own: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    refused(train(folder=own, output=own / "0.png" / "out"), 1, "cannot be written", "--output")
    assert state_of(tmp_path) == before


def test_an_output_that_is_a_file(train: Train, own: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    refused(train(folder=own, output=own / "0.png"), 1, "is a file, not a folder", "--output")
    assert state_of(tmp_path) == before


def test_an_output_that_may_not_be_written(
    train: Train, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", denied)
    refused(train(folder=own), 1, "Permission denied", str(tmp_path / "out"), "--output")


def test_an_output_that_holds_a_file_of_the_name(train: Train, own: Path, tmp_path: Path) -> None:
    output = tmp_path / "loras"
    output.mkdir()
    (output / "anna.safetensors").write_bytes(b"precious")
    before = state_of(tmp_path)
    refused(train(folder=own, output=output), 1, "anna.safetensors", "--overwrite")
    assert state_of(tmp_path) == before


def test_the_photo_folder_may_hold_the_output(train: Train, own: Path) -> None:
    before = state_of(own)
    train(folder=own, output=own).done()
    after = state_of(own)
    assert {name: after[name] for name in before} == before
    assert "anna.safetensors" in after


def test_photos_stay_as_they_are_after_a_run(train: Train, own: Path) -> None:
    before = state_of(own)
    train(folder=own).done()
    assert state_of(own) == before


def test_a_cache_that_cannot_be_written_is_mentioned(
    train: Train, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()
    monkeypatch.setenv("LIKENESS_CACHE", str(blocked / "cache"))
    assert "cannot be written" in train(folder=own).done().out


def test_training_that_goes_astray_says_what_to_do(train: Train, own: Path, tmp_path: Path) -> None:
    from trainer.training.learner import Learner

    sound = Learner.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Learner, "loss", lambda self, n: sound(self, n) * (float("nan") if n >= 3 else 1)
        )
        outcome = train("run.total_steps=12", "run.tolerated_bad_steps=1", folder=own)
    refused(outcome, 1, "optimizer.learning_rate", "What was saved before")
    # What was saved before is whole, and the run goes on from there.
    assert "Going on from step" in train("--resume", folder=own).done().out
