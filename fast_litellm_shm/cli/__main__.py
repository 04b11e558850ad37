"""``python -m fast_litellm_shm.cli``."""

import sys

from fast_litellm_shm.cli import main

sys.exit(main())
