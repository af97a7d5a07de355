"""``python -m fpt_fast``: the command line, for launchers that start a module (``torchrun -m``)."""

import sys

from fpt_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
