"""Entry point of ``python -m lorascope.cli``."""

import sys

from lorascope.cli.main import main

sys.exit(main())
