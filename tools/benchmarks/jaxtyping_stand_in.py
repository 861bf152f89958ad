"""Provides the names of jaxtyping where it is not installed, for programs that need jax and flax only.

The library uses the names in annotations only, such as `Float[Array, "B L"]`. Import this module before the library.
"""

import importlib.util
import sys
import types


class _Annotation:
    def __class_getitem__(cls, item):
        return cls


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Annotation


if importlib.util.find_spec("jaxtyping") is None:
    sys.modules["jaxtyping"] = _StandIn("jaxtyping")
