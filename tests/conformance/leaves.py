"""The tensors of a case as leaves of autograd, and the results of a computation over them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flash_sparse_attn.spec.schema import ARGUMENTS, Case
from torch import Tensor

from .inputs import Inputs


class Leaves:
    """Copies of a case's tensors that require a gradient where the case asks for one.

    What is one tensor in the inputs stays one here, and its gradients add up. Strides stay.

    Args:
        case: the case.
        inputs: its inputs.
        dtype: dtype of every floating tensor, default its own.
        instead: tensors that take the place of those in `inputs`.
    """

    def __init__(
        self,
        case: Case,
        inputs: Inputs,
        dtype: torch.dtype | None = None,
        instead: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._inputs = inputs
        made: dict[int, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}
        for name, given in (inputs.tensors | dict(instead or {})).items():
            leaf = made.get(id(given))
            if leaf is None:
                leaf = given.detach()
                if dtype is not None and leaf.is_floating_point():
                    leaf = leaf.to(dtype)
                made[id(given)] = leaf
            self.tensors[name] = leaf
        for name in ARGUMENTS:
            leaf = self.tensors.get(name)
            if name in case.grads and not any(leaf is other for other in self._wanted.values()):
                self._wanted[name] = leaf.requires_grad_()

    def results(self, o: Tensor, lse: Tensor) -> dict[str, Tensor]:
        """By quantity: o, lse, and dq, dk, ... of what the case asks for, given do and dlse."""
        found = {"o": o.detach(), "lse": lse.detach()}
        if not self._wanted:
            return found
        outputs = [(o, self._inputs.do)]
        if self._inputs.dlse is not None:
            outputs.append((lse, self._inputs.dlse))
        # lse does not depend on v, and nothing depends on anything where there are no pairs.
        outputs = [(x, grad.to(x.dtype)) for x, grad in outputs if x.requires_grad]
        leaves = tuple(self._wanted.values())
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
        if outputs:
            results, given = zip(*outputs, strict=True)
            gradients = torch.autograd.grad(results, leaves, given, materialize_grads=True)
        return found | {f"d{name}": x for name, x in zip(self._wanted, gradients, strict=True)}
