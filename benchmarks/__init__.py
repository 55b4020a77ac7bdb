"""Measurements: quality of what is trained, speed and memory."""
