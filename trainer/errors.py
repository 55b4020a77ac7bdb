"""Every error a user may see.

    TrainerError            exit code 1
    ├── UsageError          exit code 2: the command line or a setting is wrong
    │   └── ConfigError     one or more settings are wrong; all of them are listed
    ├── DataError           a photo, caption, prompts file or photo folder
    ├── ModelError          a base model that cannot be used
    ├── FileFormatError     a LoRA file or checkpoint that cannot be used
    ├── OutputError         the output folder cannot be written or holds a run already
    ├── DeviceError         the device or precision asked for is not to be had
    └── TeamError           another process of the run has ended, or differs
    Stopped                 exit code 130 or 143: stopped by the user, after saving

Each says what happened, where (the file or setting), and what to do.
"""

from __future__ import annotations

from trainer.untrusted import printable


class TrainerError(Exception):
    """An error that is explained to the user without a traceback.

    Args:
        what: what happened, in one sentence.
        where: the file, folder or setting it is about; several lines are allowed.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {line}" for line in self.where.splitlines()]
        if self.fix:
            lines.append(self.fix)
        return printable("\n".join(lines))


class UsageError(TrainerError):
    """The command line is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """Settings are wrong; `where` holds one line for each."""


class DataError(TrainerError):
    """A photo, a caption, a prompts file or a photo folder cannot be used."""


class ModelError(TrainerError):
    """A base model cannot be used."""


class FileFormatError(TrainerError):
    """A LoRA file or a checkpoint cannot be used."""


class OutputError(TrainerError):
    """The output folder cannot be used."""


class DeviceError(TrainerError):
    """The device, precision or attention backend asked for is not to be had."""


class TeamError(TrainerError):
    """Of the processes that train together, one has ended or differs from the others.

    Args:
        exit_code: that of the process that ended first.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "", exit_code: int = 1) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code


class Stopped(Exception):
    """The user stopped the run; everything done so far has been saved.

    Args:
        signal_number: the signal that asked for the stop (2 for Ctrl-C, 15 for SIGTERM).
        message: what was saved and how to go on.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
        self.message = message
