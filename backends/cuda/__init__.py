"""The CUDA backend: declared; it has no kernels yet (see CMakeLists.txt for where they go)."""

from ..declared import Declared

_declared = Declared("the CUDA backend has no kernels yet", packages={})

availability = _declared.availability
unsupported = _declared.unsupported
forward = _declared.forward
backward = _declared.backward
info = _declared.info
