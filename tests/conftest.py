"""What the tests share: a tiny random model with a tokenizer of its own, and tiny data. Nothing needs a network."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.forks import python, reloading

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
REPOSITORY = Path(__file__).parent.parent
# `python -m hfprune` and `snakemake` as a user of this environment has them.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WORDS = [
    "".join(random.Random(i).choices("bcdfghklmnprst", k=1) + random.Random(i).choices("aeiou", k=1)) * 2
    for i in range(60)
]


def sentences(seed: int, words: int) -> str:
    """A document of so many made-up words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


def write_lines(path: Path, records: list[dict]) -> Path:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_tokenizer():
    """A byte-level BPE of 320 entries, trained on made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((sentences(seed, 200) for seed in range(20)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template="{{ messages }}"
    )


TEMPLATES = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}  # what a tokenizer adds to a text


def make_adding_tokenizer(template: str):
    """The same tokenizer, which adds special tokens by itself; between two texts an end-of-text token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, pair=f"{template} </s> $B:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def make_model(family: str = "llama", **changes):
    """A random float32 model of three layers, 48 neurons each, with grouped-query attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.15,  # wide, so that a random model's predictions are far from uniform
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(shape | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def save_checkpoint(folder: Path, family: str = "llama", **changes) -> Path:
    """`make_model` and its tokenizer as a checkpoint."""
    make_model(family, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_dense(folder: Path, family: str = "llama", **changes) -> Path:
    """A dense checkpoint whose biases are not the zeros of a new model."""
    model = make_model(family, **changes)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def by_criteria(*criteria: str) -> list[dict]:
    """A config's methods: one for each criterion, under its name, with nothing else done."""
    return [{name: {"criterion": name}} for name in criteria]


def boolq_records(count: int) -> list[dict]:
    """Documents in the fields that lm-eval's boolq reads."""
    return [
        {"passage": sentences(i, 12), "question": sentences(1000 + i, 4)[:-1], "label": i % 2} for i in range(count)
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The tiny LLaMA, tied embeddings."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with a calibration text, a held-out text and a task."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "calibration.jsonl", [{"text": sentences(i, 150)} for i in range(12)])
    write_lines(folder / "heldout.jsonl", [{"text": sentences(100 + i, 150)} for i in range(8)])
    write_lines(folder / "boolq.jsonl", boolq_records(10))
    return folder


@pytest.fixture(scope="session")
def texts(data, tmp_path_factory) -> Path:
    """The calibration text as stage `download` leaves it."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "documents.jsonl").write_bytes((data / "calibration.jsonl").read_bytes())
    return folder


@pytest.fixture(scope="session")
def experiment(checkpoint, data) -> dict:
    """A whole experiment on the tiny model."""
    return {
        "experiment": "tiny",
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "texts": {
            "calibration": {"path": str(data / "calibration.jsonl")},
            "heldout": {"path": str(data / "heldout.jsonl")},
        },
        "calibration": {"text": "calibration", "samples": 6, "length": 32},
        "ratios": [0.1, 0.2],
        "evaluation": {"tasks": {"boolq": {"path": str(data / "boolq.jsonl")}}, "limit": 6},
        "fidelity": {"texts": ["heldout"], "samples": 4, "length": 32},
    }


def hfprune(*words, killed: str = "", **environment) -> tuple[int, str, str]:
    """Run `hfprune` in a process of its own, see `tests.forks.python`: its exit status, its stdout and its stderr."""
    return python(["-m", "hfprune", *words], os.environ | environment, killed=killed)


def run_hfprune(store: Path | None, *words, status: int = 0, **environment) -> str:
    """Run `hfprune` in a process of its own; the last line it printed, or of its message where it fails."""
    found, printed, said = hfprune(*words, *(["--store", store] if store else []), **environment)
    assert found == status, said
    assert "Traceback" not in said
    return (said if status else printed).splitlines()[-1]


@pytest.fixture(scope="session", autouse=True)
def _forked_reload():
    """Checkpoints are reloaded in processes that fork from another; see `fresh_reload`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfprune.models.checkpoint.subprocess", reloading(python))
        yield


@pytest.fixture
def fresh_reload(monkeypatch):
    """Checkpoints are reloaded in processes that start from nothing, as a user's are."""
    monkeypatch.setattr("hfprune.models.checkpoint.subprocess", subprocess)


@pytest.fixture
def command(tmp_path):
    """Run `hfprune` in a process of its own, its store in the test's folder; the artifact's folder."""
    return lambda *words: Path(run_hfprune(tmp_path / "store", *words))


def pytest_collection_modifyitems(items) -> None:
    """The files that take longest go first, so that no core is left alone with one at the end."""
    names = "grids workflow slurm recovery results efficiency embedded reproducible safety flow checkpoint doctor"
    longest = [f"test_{name}.py" for name in names.split()]
    places = {name: place for place, name in enumerate(longest)}
    items.sort(key=lambda item: places.get(item.path.name, len(longest)))


ENVIRONMENT = dict(os.environ)


@pytest.fixture(autouse=True)
def _environment():
    """Undo what a test, or a fixture of its module, does to the environment: a stage run here switches the hub off."""
    yield
    running = {name: value for name, value in os.environ.items() if name.startswith("PYTEST_")}
    os.environ.clear()
    os.environ.update(ENVIRONMENT | running)
