"""Matrix products of float32 matrices on a CPU by oneDNN. In a backward pass their inputs may be rounded to bfloat16.

PyTorch uses MKL for float32. On an AMD EPYC with AVX-512, MKL reached 0.5 to 0.9 of oneDNN's rate, depending on the
shape (`benchmarks/scoring.py` measures a large one). Both compute in float32; results differ by rounding.

Where the CPU multiplies bfloat16 itself, products of it run at about twice the rate; sums inside a product are float32
also then, and its result is rounded. A backward pass bears that: every layer adds its share to the gradient once. In a
forward pass the rounding of the first layers' large activations is seen by all layers after them (docs/scoring.md).
oneDNN's own switch (`torch.backends.mkldnn.matmul.fp32_precision`) has an effect on CPUs with AMX only.
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
        backward: type to which operands are rounded in a backward pass, float32 or bfloat16. Results are float32.
    """

    def __init__(self, backward: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backward = backward

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Use oneDNN where it fits; pass on everything else."""
        kwargs = kwargs or {}
        if function is aten.mm.default and _fits(*args):
            return _rounded_product(*args, self.backward) if self._rounds() else _product(*args)
        if function is aten.addmm.default and not kwargs and _fits(args[1], args[2], args[0]):
            return _product(args[1], args[2], args[0])
        return function(*args, **kwargs)

    def _rounds(self) -> bool:
        """Whether operands are rounded now. A layer that a backward pass computes again is a forward pass."""
        is_backward = torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()
        return is_backward and self.backward != torch.float32


def fast_products(device: torch.device, backward: torch.dtype = torch.float32) -> AbstractContextManager:
    """A context in which products of float32 matrices run as fast as they can on `device`.

    Args:
        device: on others than a CPU nothing changes.
        backward: to which inputs are rounded in backward passes, see `product_dtype`; only bfloat16 changes anything.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return nullcontext()
    return OneDNN(torch.bfloat16 if backward == torch.bfloat16 else torch.float32)


def product_dtype(products: str, model: torch.dtype, device: torch.device) -> torch.dtype:
    """In which type the products of a model's backward pass, and of its output projection, take their inputs.

    Args:
        products: "auto": a float32 model's in bfloat16 where the CPU is faster then; "float32": never.
        model: the model's own type.
        device: where it computes.
    """
    if products == "auto" and model == torch.float32 and device.type == "cpu" and multiplies_bfloat16():
        return torch.bfloat16
    return model


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """(..., n) @ (n, m) -> (..., m) float32.

    A GPU sums the products of bfloat16 or float16 matrices in float32, and here does not round the sums. It has no
    derivative of that, so where one is wanted, and on a CPU, the sums are rounded to the type of the matrices.
    """
    wants_derivative = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and not wants_derivative:
        return torch.mm(a.reshape(-1, a.shape[-1]), b, out_dtype=torch.float32).view(*a.shape[:-1], b.shape[1])
    return (a @ b).float()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and PyTorch uses them."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


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


def _rounded_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of operands rounded to `dtype`, float32."""
    return (a.to(dtype) @ b.to(dtype)).float()
