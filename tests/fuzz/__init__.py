"""Files that nobody would write, given to everything that reads a file.

`targets` calls the readers as the commands do, `inputs` draws what they are given, `cases` keeps
what once broke one, `bounds` holds the limits of time and memory. `python -m tests.fuzz.run` gives
all readers 100,000 inputs; `python -m tests.fuzz.atheris_run` looks for more, guided by coverage.
"""
