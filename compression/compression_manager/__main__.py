"""`python -m compression_manager` is the command `compression-manager`."""

import sys

from compression_manager.cli import main

sys.exit(main())
