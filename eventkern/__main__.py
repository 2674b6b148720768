"""`python -m eventkern` is the command `eventkern`."""

import sys

from eventkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
