"""The CuTe-DSL backend: declared; it has no kernels yet."""

from ..declared import Declared

_declared = Declared(
    "the CuTe-DSL backend has no kernels yet", packages={"cutlass": "nvidia-cutlass-dsl"}
)

availability = _declared.availability
unsupported = _declared.unsupported
forward = _declared.forward
backward = _declared.backward
info = _declared.info
