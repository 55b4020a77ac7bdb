"""`likeness train` in several processes: what all of them do but the first, the leader.

They make the same session as the leader and the same steps. They print nothing and write nothing
but the cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.commands.decide import Request, decide
from trainer.commands.terminal import Terminal
from trainer.errors import Stopped
from trainer.training.loop import train
from trainer.training.session import open_session
from trainer.training.stop import StopSignal
from trainer.training.team import Team


def follow(request: Request, stop: StopSignal, team: Team) -> None:
    """Train with the leader until it is done.

    Raises:
        TrainerError: as in the leader.
        Stopped: all stop after the same step, and the leader saves it.
    """
    console = Terminal(quiet=True)
    # The leader looks through the photos first, and what it finds out about them is kept.
    root = Path(team.told(""))
    job = decide(replace(request, output=root), console, team.size)
    session = open_session(job, console, resume=request.resume, team=team)
    with stop.noted():
        for _ in train(session.learner, session.plan, session.start_step, session.guard, team):
            if number := team.stop(stop.number):
                raise Stopped(number, "")
