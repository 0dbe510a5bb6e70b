"""`python -m flexport`: the command line, where no script could be installed."""

from __future__ import annotations

import sys

from flexport.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
