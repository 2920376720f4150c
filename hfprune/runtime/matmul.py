"""Float32 matrix products on a CPU by oneDNN.

PyTorch uses MKL for them. On an AMD EPYC with AVX-512, MKL reached 0.5 to 0.9 of oneDNN's rate, depending on the shape
(`benchmarks/scoring.py` measures a large one). Both compute in float32; results differ by rounding.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class OneDNN(TorchDispatchMode):
    """While active, oneDNN computes `mm` and `addmm` of float32 matrices, forward and backward."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Use oneDNN where it fits; pass on everything else."""
        kwargs = kwargs or {}
        if function is aten.mm.default and _fits(*args):
            return _product(*args)
        if function is aten.addmm.default and not kwargs and _fits(args[1], args[2], args[0]):
            return _product(args[1], args[2], args[0])
        return function(*args, **kwargs)


def fast_products(device: torch.device) -> AbstractContextManager:
    """A context in which float32 matrix products run as fast as they can on `device`."""
    return OneDNN() if device.type == "cpu" and torch.backends.mkldnn.is_available() else nullcontext()


def _fits(a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN is fast for these operands: float32 on the CPU, `b` and the row `bias` contiguous.

    For a `b` that is a slice of a wider matrix, oneDNN falls back to reference code, hundreds of times slower.
    """
    operands = (a, b) if bias is None else (a, b, bias)
    dense = b.is_contiguous() or b.T.is_contiguous()
    row = bias is None or (bias.shape == b.shape[1:] and bias.is_contiguous())
    plain = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() for x in operands)
    return plain and dense and row


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias by the linear layer that inductor uses on CPUs. `b` is transposed by its strides, without a copy."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
