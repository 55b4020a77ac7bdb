"""What all tests share: one thread, caches in a temporary folder, a tiny base made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.runs import Outcome, run_cli, save_photos
from tests.tiny import save_tiny_base

torch.set_num_threads(1)

# The same examples every time, so that a change and nothing else can turn the suite red.
# `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("steady", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("explore", derandomize=False, deadline=None)
hypothesis.settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden anew from this run"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's own caches."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIKENESS_CACHE", str(folder))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        yield folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A run may set the number of threads (`run.threads`); the next test has one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base; never written to."""
    return save_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with v-prediction."""
    folder = tmp_path_factory.mktemp("v-bases") / "tiny-v"
    return save_tiny_base(folder, prediction="v_prediction")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, one of them not square, one with a caption; never written to."""
    return save_photos(tmp_path_factory.mktemp("sets") / "anna")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process: `cli("train", folder)` gives exit code and output."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run_cli(*arguments)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture
def train(
    cli: Callable[..., Outcome], base: Path, photos: Path, tmp_path: Path
) -> Callable[..., Outcome]:
    """A short run of the tiny base: `train("adapter.rank=2", "--resume", output=..., ...)`.

    What starts with "--" goes to the command line as it is, the rest are settings.
    """

    def call(
        *words: str, output: Path | None = None, folder: Path | None = None, model: Path = base
    ) -> Outcome:
        flags = [word for word in words if word.startswith("--")]
        quick = [] if any(flag.startswith("--resume") for flag in flags) else QUICK
        chosen = [f"--set={word}" for word in (*quick, *words) if not word.startswith("--")]
        return cli(
            *("train", folder or photos, "--base", model, "--output", output or tmp_path / "out"),
            *chosen,
            *flags,
        )

    return call


# Four steps of a second, without anything drawn.
QUICK = [
    "run.total_steps=4",
    "run.save_every_steps=2",
    "data.batch_size=2",
    "adapter.rank=2",
    "optimizer.learning_rate=0.01",
    "optimizer.text_encoder_learning_rate=0.01",
    "preview.every_steps=0",
    "preview.sampling_steps=2",
    "objective.prior_pictures=4",
]
