"""Distil a teacher into a smaller student: `python model_distillation.py --help`."""

import sys

from willows_kd.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
