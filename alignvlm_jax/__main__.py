"""Runs the `alignvlm` command as `python -m alignvlm_jax`."""

import sys

from alignvlm_jax.cli import main

sys.exit(main())
