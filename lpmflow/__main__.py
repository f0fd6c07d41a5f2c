"""`python -m lpmflow` is the command `lpmflow`."""

import sys

from lpmflow.cli import main

sys.exit(main())
