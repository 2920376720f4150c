"""`python -m hfprune` is the console command `hfprune`."""

import sys

from hfprune.cli import main

sys.exit(main())
