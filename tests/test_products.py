"""Products by oneDNN are PyTorch's own, up to rounding, whatever the operands look like."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hfprune.cli import main
from hfprune.runtime import matmul
from tests.conftest import make_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN on this machine")


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has biases
def test_products_by_onednn_are_torchs_own_up_to_rounding(family):
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


@pytest.mark.parametrize("again", [False, True])
def test_only_a_backward_pass_rounds_its_operands_and_sums_in_float32(again):
    torch.manual_seed(0)
    x, weight = torch.rand(8, 8, requires_grad=True), torch.rand(4096, 8)
    gradient = torch.rand(8, 4096)  # sums in bfloat16 would stop growing
    with matmul.fast_products(CPU, torch.bfloat16):
        seen = []

        def layer(states):
            seen.append(states @ weight.T)
            return seen[-1]

        (checkpoint(layer, x, use_reentrant=False, early_stop=False) if again else layer(x)).backward(gradient)
    exact = gradient.bfloat16().double() @ weight.bfloat16().double()
    torch.testing.assert_close(x.grad.double(), exact, rtol=2**-8, atol=0)
    assert not torch.allclose(x.grad, gradient @ weight, rtol=1e-5), "it is rounded"
    assert len(seen) == 1 + again
    for states in seen:
        torch.testing.assert_close(states, x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("products", "model", "device", "expected"),
    [
        ("auto", torch.float32, "cpu", torch.bfloat16),
        ("float32", torch.float32, "cpu", torch.float32),
        ("auto", torch.float16, "cpu", torch.float16),
        ("auto", torch.float32, "cuda", torch.float32),
    ],
)
def test_only_a_float32_model_on_a_cpu_is_rounded(products, model, device, expected, monkeypatch):
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: True)
    assert matmul.product_dtype(products, model, torch.device(device)) == expected
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: False)
    assert matmul.product_dtype(products, model, torch.device(device)) == model


def test_a_score_says_how_its_products_were_taken_and_its_key_holds_what_was_set(
    checkpoint, data, tmp_path, capsys, monkeypatch
):
    def stage(*words):
        assert main([*map(str, words), "--store", str(tmp_path / "store")]) == 0
        folder = Path(capsys.readouterr().out.splitlines()[-1])
        return folder, json.loads((folder / "manifest.json").read_text())

    model, _ = stage("download", "model", "--path", checkpoint)
    text, _ = stage("download", "text", "--path", data / "calibration.jsonl")
    words = ("--model", model, "--text", text, "--samples", 2, "--length", 16)
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: True)
    shards = [stage("shard", *words, "--shard", number, "--shards", 2)[0] for number in range(2)]
    merged, auto = stage("score", *words, "--shards", *shards)
    exact, float32 = stage("score", *words, "--products", "float32")
    assert auto["details"]["products"] == "bfloat16" and auto["parameters"]["products"] == "auto"
    assert float32["details"]["products"] == float32["parameters"]["products"] == "float32"
    assert merged.name != exact.name


def test_a_scaled_sum_is_left_to_torch():
    row, a, b = torch.randn(20), torch.randn(40, 30), torch.randn(30, 20)
    with matmul.fast_products(CPU):
        found = torch.addmm(row, a, b, beta=0.5, alpha=2)
    torch.testing.assert_close(found, 0.5 * row + 2 * (a @ b), rtol=1e-4, atol=1e-5)
