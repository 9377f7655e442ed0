"""`python -m willows_kd`, the same as `willows-kd`; this is what `accelerate launch` starts."""

import sys

from willows_kd.cli import main

sys.exit(main())
