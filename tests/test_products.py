"""Products by oneDNN are PyTorch's own, up to rounding, whatever the operands look like."""

import pytest
import torch

from hfprune.runtime import matmul
from tests.conftest import make_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN on this machine")


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has biases
def test_products_by_onednn_are_torchs_own_up_to_rounding(family):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN on this machine")
    model, calls = make_model(family), []
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)

    def run():
        hidden = model.model(inputs_embeds=embedded).last_hidden_state
        hidden.square().sum().backward()
        return hidden.detach(), embedded.grad

    embedded = torch.randn(2, 9, 32, requires_grad=True)
    expected = [tensor.clone() for tensor in run()]
    embedded.grad = None
    with pytest.MonkeyPatch.context() as patch:
        product = matmul._product
        patch.setattr(matmul, "_product", lambda *operands: (calls.append(1), product(*operands))[1])
        with matmul.fast_products(torch.device("cpu")):
            found = run()
    assert len(calls) == 2 * 7 * 3, "every linear layer, forward and backward"
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


OPERANDS = {
    "plain": lambda r: (r(40, 30), r(30, 20)),
    "transposed": lambda r: (r(30, 40).T, r(20, 30).T),
    "columns of a wider one": lambda r: (r(40, 60)[:, 7:37], r(30, 60)[:, 10:30]),
    "every other": lambda r: (r(80, 60)[::2, ::2], r(60, 60)[::2, ::3]),
    "expanded": lambda r: (r(1, 30).expand(40, 30), r(30, 1).expand(30, 20)),
    "one column": lambda r: (r(40, 1), r(1, 20)),
    "empty": lambda r: (r(0, 30), r(30, 20)),
    "float64": lambda r: (r(40, 30).double(), r(30, 20).double()),
}


@pytest.mark.parametrize("bias", [None, lambda: torch.randn(20), lambda: torch.randn(40)[::2], lambda: torch.randn(1)])
@pytest.mark.parametrize("name", OPERANDS)
def test_any_operands(name, bias):
    torch.manual_seed(0)
    a, b = OPERANDS[name](torch.randn)
    row = bias().to(a) if bias else None

    def product():
        return a @ b if row is None else torch.addmm(row, a, b)

    with matmul.fast_products(CPU):
        found = product()
    torch.testing.assert_close(found, product(), rtol=1e-4, atol=1e-5)


def test_a_scaled_sum_is_left_to_torch():
    row, a, b = torch.randn(20), torch.randn(40, 30), torch.randn(30, 20)
    with matmul.fast_products(CPU):
        found = torch.addmm(row, a, b, beta=0.5, alpha=2)
    torch.testing.assert_close(found, 0.5 * row + 2 * (a @ b), rtol=1e-4, atol=1e-5)
