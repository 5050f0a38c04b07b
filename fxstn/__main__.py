"""`python -m fxstn` is the command `fxstn`."""

import sys

from fxstn.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
