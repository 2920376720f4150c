"""Matrix products of float32 on a CPU by oneDNN.

PyTorch hands them to MKL, which on the AMD EPYC with AVX-512 that we have reaches a half to nine tenths of oneDNN's
rate, by shape (`benchmarks/scoring.py` measures a large one). Both compute in float32; results differ by rounding.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class OneDNN(TorchDispatchMode):
    """While it is active, `mm` and `addmm` of float32 matrices, forward and backward, are oneDNN's."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Replace what oneDNN can do; pass on everything else."""
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
    """Whether oneDNN takes these operands and is fast: float32 on the CPU, `b` and the row `bias` without gaps.

    Of a `b` that is a part of a wider matrix it makes, by its reference code, a product hundreds of times slower.
    """
    given = (a, b) if bias is None else (a, b, bias)
    dense = b.is_contiguous() or b.T.is_contiguous()
    row = bias is None or (bias.shape == b.shape[1:] and bias.is_contiguous())
    plain = all(each.dtype == torch.float32 and each.device.type == "cpu" and each.numel() for each in given)
    return plain and dense and row


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias: the linear layer by which inductor compiles for CPUs, with `b` transposed by its strides alone."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
