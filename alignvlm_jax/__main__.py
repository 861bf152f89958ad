"""`python -m alignvlm_jax` is the `alignvlm` command."""

import sys

from alignvlm_jax.cli import main

sys.exit(main())
