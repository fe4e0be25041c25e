"""`python -m fastkd`, as launchers start it: the command `fastkd`."""

import sys

from fastkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
