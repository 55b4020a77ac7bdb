"""One folder, one run: a lock that the system itself gives up when its process dies.

    out/.lock       who holds the folder, in JSON, for the words; the lock on the file counts

The lock is that of the operating system (flock; on Windows a locked byte), so that no process
number has to be guessed about after a crash. Network folders pass it on between machines where
their server can; where a file system knows no locks at all, a notice says so and the run goes on.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import OutputError
from trainer.untrusted import read_json

LOCK_FILE = ".lock"
# Behind everything that is written: on Windows a locked byte cannot be read by others.
_LOCKED_BYTE = 2**30
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: BinaryIO) -> None:
        """Raises OSError if another has it."""
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _try_lock(file: BinaryIO) -> None:
        """Raises OSError if another has it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """Inside `with FolderLock(folder) as lock:` no other run writes to the folder.

    Attributes:
        notices: what the user should know: a dead run's lock was taken over, or there are none.

    Raises:
        OutputError: another run holds the folder, or the lock cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.notices: list[str] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> FolderLock:
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self) -> None:
        """Take the lock, or take it once more where the folder was deleted and made anew.

        Raises:
            OutputError: as above.
        """
        if self._file is not None and _is_the_file(self._file, self.path):
            return
        self.release()
        try:
            self._take()
        except OSError as error:
            raise OutputError(
                f"The output folder cannot be locked: {error.strerror or error}",
                where=str(self.path),
                fix="Give a folder you may write to after --output.",
            ) from error

    def release(self) -> None:
        """Give the lock up and remove its file; nothing happens without one."""
        file, self._file = self._file, None
        if file is None:
            return
        mine = _is_the_file(file, self.path)
        if sys.platform == "win32":  # an open file cannot be removed there
            file.close()
        try:
            if mine:
                self.path.unlink(missing_ok=True)
        except OSError:  # the folder is gone or may only be read by now: an empty promise stays
            pass
        finally:
            file.close()

    def _take(self) -> None:
        while self._file is None:
            file = self.path.open("a+b")
            try:
                self._lock(file)
                # Whoever gave the lock up may have removed the file between the two lines.
                if _is_the_file(file, self.path):
                    self._sign(file)
                    self._file = file
            finally:
                if self._file is None:
                    file.close()

    def _lock(self, file: BinaryIO) -> None:
        try:
            _try_lock(file)
        except OSError as error:
            if error.errno in _HELD:
                raise _held(self.path) from error
            if error.errno not in _NO_LOCKS:
                raise
            self.notices.append(
                "The file system of the output folder knows no locks: take care that no second "
                "run is started in it."
            )

    def _sign(self, file: BinaryIO) -> None:
        """Write down who holds the lock; whoever stands there is dead."""
        if before := _holder(self.path):
            self.notices.append(
                f"The run that held this folder is gone ({_words(before)}): its lock is taken over."
            )
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        file.truncate(0)
        file.write(json.dumps(holder).encode())
        file.flush()


def _held(path: Path) -> OutputError:
    holder = _holder(path)
    return OutputError(
        "Another run is writing to this folder"
        + (f": {_words(holder)}." if holder else ", or another program holds its lock."),
        where=str(path.parent),
        fix="Wait until it has finished, stop it, or give another folder after --output.",
    )


def _holder(path: Path) -> dict[str, Any]:
    """Who stands in a lock file; empty where nothing can be told."""
    try:
        holder = read_json(path)
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    """ "process 41 on studio, since ..."; shortened, as anybody may have written the file."""
    pid, host, since = (str(holder.get(name, "?"))[:60] for name in ("pid", "host", "since"))
    return f"process {pid} on {host}, since {since}"


def _is_the_file(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one that lies at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
