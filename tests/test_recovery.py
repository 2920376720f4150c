"""Training after the cut: on the tiny model, by the command that users call, killed, resumed, in two processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfprune.data.packing import Packed, read_examples
from hfprune.errors import UserError
from hfprune.models.activations import graph_bytes
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.pruning.surgery import cut
from hfprune.recovery import training
from hfprune.recovery.training import METHODS, bytes_beside_graph, recover
from hfprune.runtime.signals import Stopped
from hfprune.stages.recover import RecoverParameters
from hfprune.store import artifacts
from tests.conftest import FAMILIES, make_model, run_hfprune, save_checkpoint, save_dense, sentences, write_lines

SMALL = {"length": 384, "batch_tokens": 768, "rank": 4, "epochs": 1}
SEVEN = RecoverParameters().targets
TOKENS = torch.arange(64).view(2, 32)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Instructions as stage `download` leaves them."""
    folder = tmp_path_factory.mktemp("instructions")
    records = [{"instruction": sentences(i, 5), "response": "bobo baba " * 8} for i in range(24)]
    write_lines(folder / "documents.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A cut checkpoint, its embeddings tied."""
    folder = tmp_path_factory.mktemp("pruned")
    save_checkpoint(folder, tie_word_embeddings=True)
    model = load_model(folder, "float32")
    cut(model, {"mlp": [torch.arange(40)] * 3})
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A checkpoint with a width for each layer."""
    folder = save_checkpoint(tmp_path_factory.mktemp("uneven") / "model")
    model = load_model(folder, "float32")
    cut(model, {"mlp": [torch.arange(width) for width in (40, 48, 33)]})
    model.save_pretrained(folder)
    return folder


def train(folder, model, text, teacher=None, **changes):
    """`recover`, in this process."""
    asked = RecoverParameters(**({"dtype": "float32"} | SMALL | changes)).model_dump()
    folder.mkdir(exist_ok=True)
    return recover(folder, model, text, teacher, {"text": "tiny", "source": {"name": "tiny"}}, **asked)


def steps(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(TOKENS).logits


@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_checkpoint_is_plain(tmp_path, pruned, instructions, checkpoint, method, loss):
    changes = {"method": method, "loss": loss, "learning_rate": 2e-2 if method == "norms" else 5e-3, "epochs": 4}
    changes |= {} if method == "lora" else {"rank": 32}
    done = train(tmp_path / "made", pruned, instructions, checkpoint if loss == "distillation" else None, **changes)
    curve = [step["loss"] for step in steps(tmp_path / "made")]
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    assert (done["first_loss"], done["last_loss"], done["steps"]) == (curve[0], curve[-1], len(curve))
    before, after = load_file(pruned / "model.safetensors"), load_file(tmp_path / "made" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: each.shape for name, each in after.items()}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (pruned, tmp_path / "made")]
    assert configs[0] | {"rope_theta": 10000.0} == configs[1]  # stated a second time, for transformers 4
    changed = {name for name in before if not before[name].equal(after[name])}
    norms = {name for name in before if "norm" in name}
    embedding = "model.embed_tokens.weight"
    assert (
        changed
        == {
            "lora": {name for name in before if "proj" in name},
            "norms": norms | {embedding},
            "full": set(before),
        }[method]
    )


def test_the_first_loss_is_what_transformers_says_of_the_model(tmp_path, pruned, instructions):
    train(tmp_path / "made", pruned, instructions, method="full", rank=32, learning_rate=1e-9)
    network = load_model(pruned, "float32")
    rows = Packed(read_examples(load_tokenizer(pruned), 320, instructions, 384), 384, 1, 0)
    total = count = 0.0
    for row in rows.order[:2]:
        for index in rows.rows[row]:
            ids = torch.from_numpy(rows.examples[index].ids).long()[None]
            learned = ids.clone()
            learned[:, : rows.examples[index].prompt] = -100
            with torch.no_grad():
                mean = network(ids, labels=learned).loss.item()
            found = (learned[:, 1:] != -100).sum().item()
            total, count = total + mean * found, count + found
    assert steps(tmp_path / "made")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_scale_of_the_embeddings_folds_into_a_plain_checkpoint(family, tied):
    network = make_model(family, tie_word_embeddings=tied)
    plain, finish = METHODS["norms"](network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                assert parameter.ndim == 1
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
        expected = plain(TOKENS).logits
        found = finish(plain, None)(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(network.get_input_embeddings(), "scale")


@pytest.mark.parametrize("cut_to", ["pruned", "uneven"])
def test_random_weights_are_those_of_a_new_model(tmp_path, cut_to, instructions, request):
    """Training at a rate of 1e-12 leaves the weights that it starts from."""
    checkpoint = request.getfixturevalue(cut_to)
    asked = {"method": "full", "rank": 32, "start": "random", "learning_rate": 1e-12}
    models = {"before": load_model(checkpoint, "float32")}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        train(tmp_path / name, checkpoint, instructions, **asked, seed=seed)
        models[name] = load_model(tmp_path / name, "float32")
    torch.manual_seed(1)
    models["new"] = type(models["before"])(models["before"].config)
    matrices = {
        model: {name: weights for name, weights in network.named_parameters() if weights.ndim == 2}
        for model, network in models.items()
    }
    for name, weights in matrices["one"].items():
        torch.testing.assert_close(weights, matrices["new"][name], rtol=0, atol=1e-9)
        assert torch.equal(weights, matrices["same"][name])
        assert not torch.equal(weights, matrices["other"][name])
        assert not torch.equal(weights, matrices["before"][name])
    assert json.loads((tmp_path / "one" / "recovery.json").read_text())["start"] == "random"


def test_adapters_of_random_weights_are_refused():
    with pytest.raises(ValueError, match="'start: random' goes with method full, not lora"):
        RecoverParameters(start="random")


@pytest.mark.filterwarnings("error:Unable to fetch remote file")  # no training asks the hub
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_with_adapters(tmp_path, family, instructions):
    dense = save_dense(tmp_path / "dense", family)
    train(tmp_path / "made", dense, instructions, learning_rate=5e-3, keep_adapter=True)
    assert str(tmp_path) not in (tmp_path / "made" / "adapter" / "adapter_config.json").read_text()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path / "made" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "made"), adapted(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_layers_with_widths_of_their_own_are_trained_too(tmp_path, uneven, instructions):
    train(tmp_path / "made", uneven, instructions)
    assert json.loads((tmp_path / "made" / "recovery.json").read_text())["reload"]["trust_remote_code"]


@pytest.mark.parametrize(("dtype", "methods"), [("bfloat16", METHODS), ("float16", ["lora"])])
def test_half_precision_trains_in_float32_and_is_saved_as_it_was(tmp_path, instructions, dtype, methods):
    folder = save_checkpoint(tmp_path / "half")
    load_model(folder, dtype).save_pretrained(folder)
    for method in methods:
        changes = {} if method == "lora" else {"rank": 32}
        train(tmp_path / method, folder, instructions, method=method, learning_rate=5e-3, dtype="auto", **changes)
        tensors = load_file(tmp_path / method / "model.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}
        optimizer = torch.load(next((tmp_path / method / ".resume").glob("checkpoint-*/optimizer.pt")))
        assert {each["exp_avg"].dtype for each in optimizer["state"].values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_adapters_and_half_precision_keep_for_the_backward_pass_is_counted(dtype):
    model, rows = make_model(hidden_size=128, intermediate_size=344).to(dtype), torch.arange(512).view(2, 256) % 300
    trained, _ = METHODS["lora"](model, "", 2, 16, 0.05, SEVEN)
    weights, kept = {weight.untyped_storage().data_ptr() for weight in trained.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        trained.train()(input_ids=rows, logits_to_keep=1, use_cache=False)
    size = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights)
    states = 12 * sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
    bound = graph_bytes(model, rows.numel())
    assert bound < size < bound + bytes_beside_graph(trained, model, rows.numel()) - states


def test_memory_that_adapters_alone_make_short_is_short(tmp_path, pruned, instructions, monkeypatch, capsys):
    model = load_model(pruned, "float32")
    graph = graph_bytes(model, 384)
    trained, _ = METHODS["lora"](model, "", 4, 16, 0.05, SEVEN)
    states = 12 * sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
    inputs = 3 * 384 * 8 * (6 * 32 + 40)  # each of three layers has six matrices that read 32 numbers, and one of 40
    for spare, short in ((inputs, False), (inputs - 8, True)):
        monkeypatch.setattr("hfprune.runtime.memory.free_bytes", lambda _device, s=spare: 2 * graph + states + s)
        train(tmp_path / str(short), pruned, instructions)
        assert ("memory is short" in capsys.readouterr().out) == short


def test_short_memory_changes_no_step(tmp_path, pruned, instructions, monkeypatch):
    train(tmp_path / "ample", pruned, instructions)
    monkeypatch.setattr(training, "is_short", lambda _model, _tokens, reserved: reserved > 0)
    ample = steps(tmp_path / "ample")
    done = train(tmp_path / "short", pruned, instructions)
    torch.testing.assert_close([e["loss"] for e in steps(tmp_path / "short")], [e["loss"] for e in ample])
    assert done["flops"] > json.loads((tmp_path / "ample" / "recovery.json").read_text())["flops"]


def test_a_micro_batch_changes_no_step(tmp_path, pruned, instructions):
    train(tmp_path / "one", pruned, instructions, dropout=0)
    train(tmp_path / "two", pruned, instructions, dropout=0, micro_batch=2)
    one, two = ([step["loss"] for step in steps(tmp_path / name)] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def stored(folder, model, text):
    """Both as artifacts of a store: their folders."""
    model = run_hfprune(folder, "download", "model", "--path", model)
    records = text / "documents.jsonl"
    form = ("--instruction", "{instruction}", "--response", "{response}")
    return ["--model", model, "--text", run_hfprune(folder, "download", "text", "--path", records, *form)]


WORDS = ["--length", "384", "--batch-tokens", "768", "--rank", "4", "--save-steps", "2", "--learning-rate", "5e-3"]


def test_a_killed_training_goes_on_and_ends_alike(tmp_path, checkpoint, instructions):
    made = {}
    for name in ("whole", "killed"):
        words = ["recover", *stored(tmp_path / name, checkpoint, instructions), *WORDS, "--epochs", "6"]
        if name == "killed":
            command = [sys.executable, "-m", "hfprune", *map(str, words), "--store", tmp_path / name]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            while not list((tmp_path / name / ".work").glob("recover-*/.resume/checkpoint-*/trainer_state.json")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            (work,) = (tmp_path / name / ".work").glob("recover-*/.resume")
            assert not list((tmp_path / name).glob("recover/*"))
            torn = work / "checkpoint-9999"  # as if killed while saving
            torn.mkdir()
            (torn / "adapter_model.safetensors").write_bytes(b"half")
            before = steps(work)
        made[name] = Path(run_hfprune(tmp_path / name, *words))
    whole, killed = (steps(made[name]) for name in ("whole", "killed"))
    assert len(before) < len(whole)
    for name in ("step", "loss", "learning_rate", "grad_norm", "tokens"):
        assert [step[name] for step in killed] == [step[name] for step in whole]
    a, b = (load_file(made[name] / "model.safetensors") for name in ("whole", "killed"))
    assert all(a[name].equal(b[name]) for name in a)
    assert not (made["killed"] / ".resume").exists()


def test_sigterm_ends_the_step_and_keeps_the_training(tmp_path, pruned, instructions, monkeypatch):
    train(tmp_path / "whole", pruned, instructions, epochs=4)
    step = training.RecoveryTrainer.training_step

    def terminate_in_the_third(self, *given):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(training.RecoveryTrainer, "training_step", terminate_in_the_third)
        with pytest.raises(Stopped, match="up to step 3 of"):
            train(tmp_path / "stopped", pruned, instructions, epochs=4)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    assert len(steps(tmp_path / "stopped" / ".resume")) == 3
    train(tmp_path / "stopped", pruned, instructions, epochs=4)
    whole, stopped = (steps(tmp_path / name) for name in ("whole", "stopped"))
    assert [each["loss"] for each in stopped] == [each["loss"] for each in whole]


def test_two_machines_make_what_one_process_makes(tmp_path, checkpoint, instructions):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    launch = ["accelerate", "launch", "--cpu", *together, "--main_process_port", port, "--machine_rank"]
    made = {}
    for count, commands in {1: [[sys.executable]], 2: [[*launch, "0"], [*launch, "1"]]}.items():
        store = tmp_path / str(count)
        words = ["recover", *stored(store, checkpoint, instructions), *WORDS, "--dropout", "0", "--store", store]
        words += ["--share", "0.8", "--select", "gradient_norm", "--rank-by-layer", "true"]  # chosen by one of them
        for _attempt in range(2):
            processes = [
                subprocess.Popen(
                    [*command, "-m", "hfprune", *map(str, words)],
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
                for command in commands
            ]
            errors = [process.communicate(timeout=300)[1] for process in processes]
            assert [process.returncode for process in processes] == [0] * count, errors
        assert "in the store already" in errors[0]
        (made[count],) = (store / "recover").glob("*")
    one, two = steps(made[1]), steps(made[2])
    assert len(one) == len(two) > 3
    torch.testing.assert_close([step["loss"] for step in two], [step["loss"] for step in one], rtol=1e-4, atol=1e-5)
    weights = [load_file(made[processes] / "model.safetensors") for processes in (1, 2)]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-4)
    assert artifacts.read(made[1]).key == artifacts.read(made[2]).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["q_proj", "query"]}, "no linear layer 'query'; it has down_proj, gate_proj, k_proj"),
        ({"batch_tokens": 384 * 64}, "a step takes 64 sequences of 384 tokens; all documents and epochs together fill"),
        ({"length": 64, "batch_tokens": 64}, "all 24 are longer than length = 64"),
        ({"report_to": "trackio"}, "report_to = 'trackio': not installed"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, pruned, instructions, changes, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "made", pruned, instructions, **changes)
    assert not list(tmp_path.glob("made/.resume/checkpoint-*"))


def test_a_loss_that_is_no_number_or_rises_stops_with_the_last_good_checkpoint(tmp_path, pruned, instructions):
    model = tmp_path / "model"
    shutil.copytree(pruned, model)
    with pytest.raises(UserError, match=r"step \d+: the loss rises: .* the last checkpoint is .*checkpoint-\d+"):
        train(tmp_path / "rising", model, instructions, method="full", rank=32, learning_rate=3, save_steps=1, epochs=9)
    real = training.RecoveryTrainer.compute_loss

    def broken(self, *given, **named):
        loss = real(self, *given, **named)
        return loss * (float("nan") if self.state.global_step == 3 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.RecoveryTrainer, "compute_loss", broken)
        with pytest.raises(
            UserError, match=r"step 4: loss is nan; .* the last good checkpoint is .*checkpoint-3\. Set"
        ):
            train(tmp_path / "nan", model, instructions, save_steps=1)
    whole = tmp_path / "whole"
    train(whole, model, instructions, save_steps=1)
    train(tmp_path / "nan", model, instructions, save_steps=1)  # what broke it is gone: it goes on from there
    assert [step["loss"] for step in steps(tmp_path / "nan")] == [step["loss"] for step in steps(whole)]


def test_the_command_wants_the_teacher_that_the_model_was_cut_from(tmp_path, checkpoint, instructions, texts):
    words = stored(tmp_path, checkpoint, instructions)
    message = run_hfprune(tmp_path, "recover", *words, *WORDS, "--loss", "distillation", status=2)
    assert "give --teacher" in message
    message = run_hfprune(tmp_path, "recover", *words, *WORDS, "--teacher", words[1], status=2)
    assert "leave out --teacher" in message
    message = run_hfprune(
        tmp_path, "recover", *words, *WORDS, "--loss", "distillation", "--teacher", words[1], status=2
    )
    assert "not the dense model that" in message
