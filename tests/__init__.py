"""Tests. What libraries read when they are imported is set here, before any of them is."""

import os

for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait without spinning: a busy machine would be slowed down by them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
