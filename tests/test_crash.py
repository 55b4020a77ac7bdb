"""Killed and stopped at random moments, a run loses nothing and ends as it would have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and looks into /proc")
def test_nothing_is_lost_by_kill_or_signal() -> None:
    """The script's own figures are 200 kills and 50 signals."""
    command = [sys.executable, "-m", "tests.crash", "--kills", "20", "--signals", "8"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing lost") == 28
