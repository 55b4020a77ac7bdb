"""The files of the two networks: given by path, or downloaded once and known by their checksum."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError, ModelError
from trainer.untrusted import read_bounded

# The larger of the two has 39 MB.
_MOST_BYTES = 500_000_000


@dataclass(frozen=True, slots=True)
class FaceModels:
    """Where the two files come from.

    detector, recognizer: paths; "" takes the copy that was downloaded. download: fetch what is
    missing. both: the recognizer is needed as well.
    """

    detector: str = ""
    recognizer: str = ""
    download: bool = False
    both: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """A file as OpenCV's model zoo publishes it, and the setting that names another copy."""

    title: str
    repository: str
    file: str
    sha256: str
    setting: str


YUNET = Published(
    title="YuNet",
    repository="opencv/face_detection_yunet",
    file="face_detection_yunet_2023mar.onnx",
    sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
    setting="data.face_detector_file",
)
SFACE = Published(
    title="SFace",
    repository="opencv/face_recognition_sface",
    file="face_recognition_sface_2021dec.onnx",
    sha256="0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
    setting="data.face_recognizer_file",
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The content of a file, so that what is loaded is what was checked; OpenCV itself would also
    not open a path with letters outside the system's code page on Windows."""

    content: bytes
    path: Path


def read_model(published: Published, given: str, *, download: bool) -> ModelFile | None:
    """The file given by path, as it is; else the downloaded copy; None where there is none.

    Args:
        given: a path, or "".
        download: fetch it where there is no copy or a damaged one.

    Raises:
        ModelError: the given file is not there, the copy is not the published file, or the
            download failed.
    """
    if given:
        return _given(published, Path(given).expanduser())
    copy = _fetch(published, local_files_only=True)
    if copy and _is_published(published, copy):
        return copy
    if not download:
        if copy:
            raise _not_the_published(published, copy.path)
        return None
    fetched = _fetch(published, force_download=copy is not None)
    if fetched is None or not _is_published(published, fetched):
        raise _not_the_published(published, fetched.path if fetched else None)
    return fetched


def require_given(models: FaceModels) -> None:
    """See that the files that were named are there, whether or not they will be needed.

    Raises:
        ModelError: one is not.
    """
    for published, given in ((YUNET, models.detector), (SFACE, models.recognizer)):
        if given and not Path(given).expanduser().is_file():
            raise ModelError(
                f"{published.title}'s file cannot be read: it is not there.",
                where=str(Path(given).expanduser()),
                fix=f"Correct {published.setting}, or leave it empty.",
            )


def missing_model(published: Published) -> ConfigError:
    """What to do where `read_model` finds none."""
    return ConfigError(
        f"{published.title}'s file is not there.",
        where=published.setting,
        fix="Set data.face_download=true to download it once, or give its path: "
        f"{published.setting}=PATH/{published.file}",
    )


def unusable_model(published: Published, file: ModelFile, reason: str) -> ModelError:
    """The file was read, but OpenCV cannot run it as the network it should be."""
    return ModelError(
        f"{published.title}'s file cannot be used: {reason}",
        where=str(file.path),
        fix=f"Give {published.file} as OpenCV's model zoo publishes it, or leave "
        f"{published.setting} empty and set data.face_download=true.",
    )


def _given(published: Published, path: Path) -> ModelFile:
    try:
        return ModelFile(read_bounded(path, _MOST_BYTES), path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{published.title}'s file cannot be read: {getattr(error, 'strerror', '') or error}",
            where=str(path),
            fix=f"Correct {published.setting}, or leave it empty and set data.face_download=true.",
        ) from error


def _fetch(
    published: Published, *, local_files_only: bool = False, force_download: bool = False
) -> ModelFile | None:
    """The copy in the hub's cache; None where there is none and only that was asked for."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # Connections also fail with the errors of the HTTP library, which is not always the same one.
    problems: tuple[type[BaseException], ...] = (
        OSError,
        RuntimeError,
        EntryNotFoundError,
        *HfHubHTTPError.__bases__,
    )

    try:
        path = Path(
            hf_hub_download(
                published.repository,
                published.file,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )
        return ModelFile(path.read_bytes(), path)
    except problems as error:
        if local_files_only:
            return None
        raise ModelError(
            f"{published.title}'s file could not be downloaded: {error}",
            where=f"{published.repository}, {published.file}",
            fix="Check the connection and run again; or download it elsewhere and give its path: "
            f"{published.setting}=PATH/{published.file}",
        ) from error


def _is_published(published: Published, file: ModelFile) -> bool:
    return hashlib.sha256(file.content).hexdigest() == published.sha256


def _not_the_published(published: Published, path: Path | None) -> ModelError:
    return ModelError(
        f"The downloaded copy of {published.title}'s file is damaged or another one (its checksum "
        "is wrong); it is not used.",
        where=str(path or published.file),
        fix="Delete it and run again with data.face_download=true, or give the path of a good one: "
        f"{published.setting}=PATH/{published.file}",
    )
