"""Losses and their gradients, chunk by chunk, against autograd on all logits in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import kl_div, log_softmax

from hfprune.recovery import losses
from hfprune.recovery.losses import chunked, cross_entropy, distillation


@pytest.fixture
def few_logits(monkeypatch):
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", 7 * 50)  # 7 tokens a chunk


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "distillation"])
def test_loss_and_gradients(few_logits, name, train_head):
    hidden, head = draw(24, 8).requires_grad_(), draw(50, 8, seed=1).requires_grad_(train_head)
    teacher, teacher_head = draw(24, 6, seed=2), draw(50, 6, seed=3)
    labels = torch.randint(50, (24,), generator=torch.Generator().manual_seed(4))
    exact = [each.detach().double().requires_grad_() for each in (hidden, head)]
    logits = exact[0] @ exact[1].T
    if name == "cross_entropy":
        term, expected = cross_entropy(labels), torch_cross_entropy(logits, labels, reduction="sum")
    else:
        term = distillation(teacher, teacher_head)
        wanted = log_softmax(teacher.double() @ teacher_head.double().T, -1)
        expected = kl_div(log_softmax(logits, -1), wanted, log_target=True, reduction="sum")
    loss = chunked(hidden, head, term)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (loss / 3).backward()
    (expected / 3).backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    if train_head:
        torch.testing.assert_close(head.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-5)
    else:
        assert head.grad is None


def test_a_model_is_at_no_distance_from_itself(few_logits):
    hidden, head = draw(24, 8).requires_grad_(), draw(50, 8, seed=1)
    loss = chunked(hidden, head, distillation(hidden.detach(), head))
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert hidden.grad.abs().max() < 1e-6
