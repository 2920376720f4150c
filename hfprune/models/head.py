"""The last step of a model: from final hidden states to logits, and gradients back through it.

    u = scale * (W h + b),    logits = cap * tanh(u / cap), or u without a cap

W is the output projection. Its bias b, the scale and the cap are there in some families only (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.models.families import layout_of, setting
from hfprune.models.loading import weights_in_memory
from hfprune.runtime.matmul import float32_product


@dataclass(frozen=True)
class Head:
    """From hidden states to logits.

    Attributes:
        weight: W, (vocabulary, hidden).
        bias: b, (vocabulary,), or None.
        scale: 1 in most families.
        cap: None in most families.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.weight.shape[0]

    def to(self, where: torch.device | torch.dtype) -> Head:
        """The same on another device, or in another type."""
        return Head(self.weight.to(where), None if self.bias is None else self.bias.to(where), self.scale, self.cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) final hidden states -> (..., vocabulary) float32 logits."""
        logits = float32_product(hidden.to(self.weight.dtype), self.weight.T)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= self.scale
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def pulled_back(self, logits: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient with respect to W h + b, of the shape of `logits` and the type of W.

        Args:
            logits: (tokens, vocabulary) float32, as `logits` gives them. They are overwritten.
            gradient: maps them to the gradient with respect to them. It may overwrite them.
        """
        slope = None if self.cap is None else 1 - (logits / self.cap).square()  # d tanh(x) / dx = 1 - tanh(x)^2
        pulled = gradient(logits)
        if slope is not None:
            pulled = pulled.mul_(slope)
        if self.scale != 1:
            pulled = pulled.mul_(self.scale)
        return pulled.to(self.weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` reads: tensors by name. Only what the model has."""
        tensors = {"head": self.weight}
        if self.bias is not None:
            tensors["head_bias"] = self.bias
        if self.scale != 1:
            tensors["head_scale"] = torch.tensor(self.scale, dtype=torch.float64)
        if self.cap is not None:
            tensors["head_cap"] = torch.tensor(self.cap, dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Head:
        """The head whose `tensors` these are; other names are not read."""
        cap = tensors["head_cap"].item() if "head_cap" in tensors else None
        scale = tensors["head_scale"].item() if "head_scale" in tensors else 1.0
        return cls(tensors["head"], tensors.get("head_bias"), scale, cap)


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[Head]:
    """The model's head, its weights in memory for the block, also if accelerate has offloaded them."""
    layout, config, output = layout_of(model), model.config, model.get_output_embeddings()
    scale = setting(config, layout.logit_scale, 1.0) if layout.logit_scale else 1.0
    divisor = setting(config, layout.logit_divisor, 1.0) if layout.logit_divisor else 1.0
    cap = setting(config, layout.logit_cap) if layout.logit_cap else None
    with weights_in_memory(output):
        yield Head(output.weight, output.bias, float(scale) / float(divisor), cap)
