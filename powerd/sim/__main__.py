"""`python -m powerd.sim ...` is `powerd sim ...`."""

import sys

from powerd.sim.cli import main

sys.exit(main())
