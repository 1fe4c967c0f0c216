"""Runs several commands of `distill-sd` in one process, a line each, so that the libraries are loaded once.

torchrun --nproc-per-node 2 commands.py "encode --teacher ..." "teacher-cache ..."
"""

import shlex
import sys

from pipeline.cli import main

if __name__ == "__main__":
    for line in sys.argv[1:]:
        main(shlex.split(line), standalone_mode=False)
