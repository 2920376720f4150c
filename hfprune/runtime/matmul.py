"""Matrix products on a CPU by oneDNN: of float32 matrices in float32, or with their inputs rounded to bfloat16.

PyTorch uses MKL for float32. On an AMD EPYC with AVX-512, MKL reached 0.5 to 0.9 of oneDNN's rate, depending on the
shape (`benchmarks/scoring.py` measures a large one). Both compute in float32; results differ by rounding.

Where the CPU multiplies bfloat16 itself, products of it run at about twice the rate. Sums inside a product are float32
also then. oneDNN's own switch for this (`torch.backends.mkldnn.matmul.fp32_precision`) has an effect on CPUs with AMX
only.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class OneDNN(TorchDispatchMode):
    """While active, oneDNN computes `mm` and `addmm` of float32 matrices, forward and backward.

    Attributes:
        dtype: to which the operands are rounded, float32 or bfloat16. Results are float32.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Use oneDNN where it fits; pass on everything else."""
        kwargs = kwargs or {}
        if function is aten.mm.default and self._fits(*args):
            return self._product(*args)
        if function is aten.addmm.default and not kwargs and self._fits(args[1], args[2], args[0]):
            return self._product(args[1], args[2], args[0])
        return function(*args, **kwargs)

    def _fits(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
        """Whether oneDNN is fast for these operands: float32 on the CPU, `b` and the row `bias` contiguous.

        For a `b` that is a slice of a wider matrix, oneDNN falls back to reference code, hundreds of times slower.
        Rounding makes every operand contiguous.
        """
        operands = (a, b) if bias is None else (a, b, bias)
        dense = self.dtype != torch.float32 or b.is_contiguous() or b.T.is_contiguous()
        row = bias is None or (bias.shape == b.shape[1:] and bias.is_contiguous())
        plain = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() for x in operands)
        return plain and dense and row

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a @ b + bias, float32."""
        if self.dtype == torch.float32:  # by the layer that inductor uses; b is transposed by its strides, not copied
            return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
        product = (a.to(self.dtype) @ b.to(self.dtype)).float()
        return product if bias is None else product.add_(bias)


def fast_products(device: torch.device, dtype: torch.dtype = torch.float32) -> AbstractContextManager:
    """A context in which products of float32 matrices run as fast as they can on `device`.

    Args:
        device: on others than a CPU nothing changes.
        dtype: to which their inputs are rounded, see `product_dtype`; other types than bfloat16 change nothing.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return nullcontext()
    return OneDNN(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def product_dtype(products: str, model: torch.dtype, device: torch.device) -> torch.dtype:
    """In which type the matrix products of a model take their inputs.

    Args:
        products: "auto": a float32 model's in bfloat16 where the CPU is faster then; "float32": never.
        model: the model's own type.
        device: where it computes.
    """
    if products == "auto" and model == torch.float32 and device.type == "cpu" and multiplies_bfloat16():
        return torch.bfloat16
    return model


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and PyTorch uses them."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
