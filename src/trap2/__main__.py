"""`python -m trap2`."""

import sys

from trap2.cli import main

sys.exit(main())
