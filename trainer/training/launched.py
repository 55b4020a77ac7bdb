"""A team of several processes, as torchrun and `accelerate launch` start them.

The launcher says in the environment who is who. What the processes agree on goes by gloo and main
memory; gradients on NVIDIA GPUs go by NCCL. A process that ends lets go of its connections, which
those who wait for it notice; a thread looks after those who are busy with something else. Whoever
fails first says why, and the others end without a word of their own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.errors import DeviceError, Stopped, TeamError, TrainerError
from trainer.training.stop import StopNow
from trainer.training.team import Team

# How long processes look for each other, and how long NCCL waits for one of them.
MEETING = timedelta(minutes=10)
# The longest that one may keep the others waiting: with photos, samples or a full disk.
PATIENCE = timedelta(days=2)
# Seconds between looks at the other processes, and that a busy one has to find out by itself.
LOOK_EVERY = 1.0
GRACE = 5.0
# Seconds in which the reason of a broken connection shows.
REASON_WITHIN = 3.0


class Launched(Team):
    """One of several processes; a context that all leave together, or all with an error.

    Args:
        say: shows a sentence to the user, from any thread.

    Raises:
        TeamError: the processes do not find each other.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        self.way_out = "Nothing is saved yet: start the same command again."
        self._local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self._local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._say = say
        self._over = threading.Event()
        self._leaving = False
        gpus = torch.cuda.device_count()
        if self._local_rank < gpus:
            torch.cuda.set_device(self._local_rank)
        try:
            store, _, _ = next(iter(rendezvous("env://", timeout=MEETING)))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo",
                store=PrefixStore("group", store),
                rank=self.rank,
                world_size=self.size,
                timeout=MEETING,
            )
            self._store = PrefixStore("team", store)
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise TeamError(
                f"Process {self.rank + 1} of {self.size} does not find the others.",
                where=str(error).strip().partition("\n")[0],
                fix="Start them with torchrun --nproc_per_node N train.py FOLDER; several machines "
                "must reach each other by the address given to it.",
            ) from error
        self._others = self._neighbours()
        self._watcher = threading.Thread(target=self._watch, name="team", daemon=True)

    def __enter__(self) -> Team:
        # A launcher sends it to those who are left when one of its processes has died.
        signal.signal(signal.SIGTERM, _stop_now)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the others, or end with them.

        Raises:
            TeamError: another process ended where this one did not.
            SystemExit: the user has been told already, or is by the leader.
        """
        # Here this process is about to end, and tells the user why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if error is None or (isinstance(error, Stopped) and self._leaving):
            try:
                self.wait("the end")
            except TeamError as lost:
                self._fail(lost)
                raise
            self._let_go()
            if isinstance(error, Stopped) and not self.leader:
                raise SystemExit(error.exit_code)
            return
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        if stopped and (self._gone() or self._left_word()):
            reason = self._reason("the start")
            self._fail(reason)
            raise reason from None
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Leave word for the others; end without one here if the user has been told."""
        self._over.set()
        code, words = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, TrainerError | Stopped):
            code, words = error.exit_code, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, words = 130, "Stopped."
        tells = self._tells(code, words)
        if not (torch.cuda.is_available() and dist.is_nccl_available()):
            self._let_go()  # NCCL would wait for those who are gone
        if not tells:
            raise SystemExit(code) from error

    def _let_go(self) -> None:
        """No thread may be there when the interpreter ends, which would abort."""
        self._over.set()
        self._watcher.join()
        del self._group
        dist.destroy_process_group()

    @property
    def command(self) -> str:
        more = "... " if self._local_size < self.size else ""
        return f"torchrun {more}--nproc_per_node {self._local_size} train.py"

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """In one message. A parameter that got a gradient nowhere keeps none, as in a process
        alone; all have come together when it has been asked who has which, so NCCL, which neither
        waits for long nor ends quietly, begins everywhere at once."""
        counts = self._whole(
            torch.tensor([p.grad is not None for p in parameters], dtype=torch.int)
        )
        moved = [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]
        if not moved:
            return
        gradients = [
            torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.flatten()
            for p in moved
        ]
        flat = self.sum(torch.cat(gradients))
        sums = flat.split([parameter.numel() for parameter in moved])
        for parameter, total in zip(moved, sums, strict=True):
            parameter.grad = total.view_as(parameter)

    def sum(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return self._whole(tensor.detach().cpu()).to(tensor.device)
        total = tensor.detach().clone()
        with self._together("the numbers of a step"):
            dist.all_reduce(total)
        return total

    def stop(self, number: int) -> int:
        highest = torch.tensor([number])
        with self._together("the end of a step"):
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        self._leaving = bool(highest)
        return int(highest)

    def _whole(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in main memory."""
        total = tensor.clone()
        with self._together("a step"):
            dist.all_reduce(total, group=self._group)
        return total

    def told(self, text: str) -> str:
        return self._texts(text)[0]

    def wait(self, for_what: str) -> None:
        with self._together(for_what):
            dist.barrier(group=self._group)

    def require_alike(self, what: str, text: str) -> None:
        first, *others = self._texts(text)
        odd = [str(rank + 2) for rank, other in enumerate(others) if other != first]
        if odd:
            raise TeamError(
                f"The processes do not agree on {what}.",
                where=f"process {', '.join(odd)} of {self.size} has not what the first one has",
                fix="All machines need the same version, and the same photos, base and output "
                "folder under the same paths.",
            )

    def require_device(self, device: torch.device) -> None:
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and self._local_size > gpus:
            raise DeviceError(
                f"{self._local_size} processes were started for {gpus} GPUs.",
                where="--nproc_per_node",
                fix=f"Start {gpus}, or set model.device=cpu.",
            )

    def _texts(self, text: str) -> list[str]:
        """The text of every process, by rank."""
        data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        with self._together("the start"):
            longest = torch.tensor([len(data)])
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self._group)
        padded = torch.zeros(int(longest), dtype=torch.uint8)
        padded[: len(data)] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with self._together("the start"):
            dist.all_gather(gathered, padded, group=self._group)
        return [bytes(item.tolist()).rstrip(b"\0").decode() for item in gathered]

    @contextmanager
    def _together(self, for_what: str) -> Iterator[None]:
        """A broken connection becomes the reason for it."""
        try:
            yield
        except RuntimeError as error:
            raise self._reason(for_what) from error

    def _reason(self, for_what: str) -> TeamError:
        """Why another process is gone: what it has left word of, or that it was killed."""
        until = time.monotonic() + REASON_WITHIN
        gone: list[int] = []
        while not gone and time.monotonic() < until:
            if left := self._left_word():
                return left
            gone = self._gone()
            time.sleep(0.1)
        # One that failed is seen to be gone only after it left word; look once more.
        if left := self._left_word():
            return left
        who = f"Process {gone[0] + 1}" if gone else "A process"
        return TeamError(
            f"{who} of {self.size} ended without a word: it was killed, or ran out of memory.",
            where=f"the others were waiting for it: {for_what}",
            fix=self.way_out,
        )

    def _tells(self, code: int, words: str) -> bool:
        """Leave word of an error; whether it is for this process to tell the user, once for each
        machine."""
        try:
            word = json.dumps({"code": code, "words": words})
            self._store.compare_set("end", "", word)
            return bool(self._store.add(f"told on {socket.gethostname()}", 1) == 1)
        except RuntimeError:  # whoever kept the words is gone as well
            return True

    def _left_word(self) -> TeamError | None:
        try:
            if not self._store.check(["end"]):
                return None
            end = json.loads(self._store.get("end"))
        except RuntimeError:
            return None
        return TeamError(end["words"], exit_code=end["code"])

    def _neighbours(self) -> dict[int, psutil.Process]:
        """The other processes on this machine that can be seen from here, by rank."""
        me = psutil.Process()
        mine = {"host": socket.gethostname(), "pid": me.pid, "since": me.create_time()}
        others = {}
        for rank, text in enumerate(self._texts(json.dumps(mine))):
            its = json.loads(text)
            # In a container a number may be another process's, or nobody's.
            if rank != self.rank and its["host"] == mine["host"] and psutil.pid_exists(its["pid"]):
                process = psutil.Process(its["pid"])
                if abs(process.create_time() - its["since"]) < 1.0:
                    others[rank] = process
        return others

    def _gone(self) -> list[int]:
        """The ranks of neighbours that run no more."""
        return [rank for rank, process in self._others.items() if not _runs(process)]

    def _watch(self) -> None:
        """End a process that is busy, or waits where a broken connection does not show."""
        while not self._over.wait(LOOK_EVERY):
            if not self._gone():
                continue
            if self._over.wait(GRACE):
                return
            reason = self._reason("the next step")
            if self._tells(reason.exit_code, str(reason)):
                self._say(f"\n{reason}")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(reason.exit_code)


def _stop_now(number: int, frame: FrameType | None) -> None:
    raise StopNow


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
