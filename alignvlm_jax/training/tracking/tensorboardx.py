"""Imports tensorboardX without torch, which it imports where it is installed, only to name a type.

The import of torch takes a second of the start-up of `alignvlm train`.
"""

import sys

_is_first = "torch" not in sys.modules
if _is_first:
    sys.modules["torch"] = None  # makes its import fail
try:
    from tensorboardX import SummaryWriter
    from tensorboardX.record_writer import register_writer_factory
finally:
    if _is_first:
        del sys.modules["torch"]

__all__ = ["SummaryWriter", "register_writer_factory"]
