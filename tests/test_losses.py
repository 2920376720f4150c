"""Losses and their gradients, chunk by chunk, against autograd on all logits in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import kl_div, log_softmax

from hfprune.models.head import Head
from hfprune.recovery import losses
from hfprune.recovery.losses import chunked, cross_entropy, distillation


@pytest.fixture
def few_logits(monkeypatch):
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", 7 * 50)  # 7 tokens a chunk


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("more", [{}, {"scale": 0.4}, {"cap": 3.0}, {"scale": 1.7, "cap": 2.0, "bias": True}], ids=str)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "distillation"])
def test_loss_and_gradients(few_logits, name, train_head, more):
    hidden, head = draw(24, 8).requires_grad_(), draw(50, 8, seed=1).requires_grad_(train_head)
    teacher, teacher_head = draw(24, 6, seed=2), draw(50, 6, seed=3)
    labels = torch.randint(50, (24,), generator=torch.Generator().manual_seed(4))
    bias = draw(50, seed=5).requires_grad_(train_head) if more.get("bias") else None
    exact = [each.detach().double().requires_grad_() for each in (hidden, head, *([] if bias is None else [bias]))]
    logits = (exact[0] @ exact[1].T + (0 if bias is None else exact[2])) * more.get("scale", 1)
    logits = more["cap"] * (logits / more["cap"]).tanh() if "cap" in more else logits
    if name == "cross_entropy":
        term, expected = cross_entropy(labels), torch_cross_entropy(logits, labels, reduction="sum")
    else:
        term = distillation(teacher, Head(teacher_head))
        wanted = log_softmax(teacher.double() @ teacher_head.double().T, -1)
        expected = kl_div(log_softmax(logits, -1), wanted, log_target=True, reduction="sum")
    loss = chunked(hidden, Head(head, **more | {"bias": bias}), term)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (loss / 3).backward()
    (expected / 3).backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    if train_head:
        torch.testing.assert_close(head.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-5)
        if bias is not None:
            torch.testing.assert_close(bias.grad.double(), exact[2].grad, rtol=1e-4, atol=1e-5)
    else:
        assert head.grad is None


def test_a_model_is_at_no_distance_from_itself(few_logits):
    hidden, head = draw(24, 8).requires_grad_(), draw(50, 8, seed=1)
    loss = chunked(hidden, Head(head), distillation(hidden.detach(), Head(head)))
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert hidden.grad.abs().max() < 1e-6
