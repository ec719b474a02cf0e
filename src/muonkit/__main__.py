"""`python -m muonkit` is the `muonkit` command."""

import sys

from muonkit._cli import main

if __name__ == "__main__":
    sys.exit(main())
