"""`python train.py FOLDER` is `likeness train FOLDER`."""

import sys

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
