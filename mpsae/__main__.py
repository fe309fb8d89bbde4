"""`python -m mpsae` is the command line."""

import sys

from mpsae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
