"""python -m halfbyte is the command halfbyte."""

import sys

from halfbyte.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
