"""A checkpoint is loaded whole and as what it is, or refused when it is downloaded, by the name that the user gave."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hfprune.data import download
from hfprune.errors import UserError
from hfprune.models.loading import count_parameters, load_model
from hfprune.pruning.budget import shape_of, shape_on_disk
from tests.conftest import boolq_records, make_tokenizer, run_hfprune, save_checkpoint, sentences, write_lines
from tests.hub import serve


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def model(sound, tmp_path):
    """A checkpoint to harm, with an output projection of its own."""
    return shutil.copytree(sound, tmp_path / "model")


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights(folder, change):
    """Change a checkpoint's tensors."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")


def sharded(folder):
    """The same checkpoint, in two files and an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def taken(path, folder):
    folder.mkdir()
    download.model(folder, {"path": path}, None)
    return folder


def refused(path, tmp_path):
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError) as error:
        download.model(tmp_path / "work", {"path": path}, None)
    said = str(error.value)
    assert said.startswith(f"path {path}: ")
    assert str(tmp_path / "work") not in said
    assert "\n" not in said
    return said


def without(*names):
    return lambda folder: weights(folder, lambda state: [state.pop(name) for name in names])


def holding(**tensors):
    return lambda folder: weights(folder, lambda state: state.update(tensors))


def configured(**changes):
    return lambda folder: edit(folder, **changes)


def spoilt(name, value):
    def change(state):
        state[name].view(-1)[-1] = value

    return lambda folder: weights(folder, change)


def renamed(to, *also):
    def harm(folder):
        (folder / "model.safetensors").rename(folder / to)
        for name in also:
            (folder / name).write_text("{}")

    return harm


def cut_in_the_middle(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shard_cut(folder):
    sharded(folder)
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-4])


def shard_gone(folder):
    sharded(folder)
    (folder / "b.safetensors").unlink()


def twice(folder):
    sharded(folder)
    name, value = next(iter(load_file(folder / "a.safetensors").items()))
    save_file(load_file(folder / "b.safetensors") | {name: value}, folder / "b.safetensors")


def classifier(folder):
    edit(folder, architectures=["LlamaForSequenceClassification"])
    weights(folder, lambda state: (state.pop("lm_head.weight"), state.update({"score.weight": torch.ones(2, 32)})))


DOWN = "model.layers.1.mlp.down_proj.weight"


def indexed(files, twice=False):
    """A folder without weights whose index names these files, one of them in two lines."""

    def harm(folder):
        (folder / "model.safetensors").unlink()
        content = json.dumps({"metadata": {}, "weight_map": files})
        content = content.replace('"x": ', '"x": "b", "x": ') if twice else content
        (folder / "model.safetensors.index.json").write_text(content)

    return harm


def written_twice(key):
    def harm(folder):
        content = (folder / "config.json").read_text()
        (folder / "config.json").write_text(content.replace(f'"{key}"', f'"{key}": 7, "{key}"'))

    return harm


def too_large_for_float16(folder):
    edit(folder, dtype="float16")
    spoilt(DOWN, 1e30)(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without(DOWN), f"config.json asks for {DOWN}, which no file has"),
        (without("lm_head.weight"), "asks for lm_head.weight, which no file has; transformers would take random"),
        (without("model.norm.weight"), "asks for model.norm.weight"),
        (configured(num_hidden_layers=4), "asks for model.layers.3.input_layernorm.weight"),
        (configured(num_hidden_layers=2), "it holds model.layers.2.input_layernorm.weight"),
        (configured(attention_bias=True), "asks for model.layers.0.self_attn.k_proj.bias"),
        (configured(intermediate_size=64), "model.layers.0.mlp.down_proj.weight (32, 48), config.json asks for (32,"),
        (configured(vocab_size=400), "lm_head.weight (320, 32), config.json asks for (400, 32)"),
        (configured(model_type="qwen3"), "asks for model.layers.0.self_attn.k_norm.weight"),
        (configured(hidden_size="many"), "config.json: hidden_size = 'many': expected a number above 0"),
        (configured(initializer_range="x"), "config.json: not a checkpoint that transformers can read"),
        (configured(quantization_config={"quant_method": "gptq", "bits": 4}), "the weights are quantised (gptq)"),
        (configured(quantization_config={"quant_method": "awq"}), "the weights are quantised (awq)"),
        (configured(quantization_config={"load_in_4bit": True}), "the weights are quantised (quantization_config)"),
        (configured(compression_config={"quant_method": "compressed-tensors"}), "quantised (compressed-tensors)"),
        (configured(quantization={"group_size": 64, "bits": 4}), "the weights are quantised (quantization)"),
        (holding(**{DOWN: torch.ones(32, 48).to(torch.float8_e4m3fn)}), f"tensor {DOWN} is F8_E4M3: quantised"),
        (holding(**{DOWN.replace("weight", "qweight"): torch.ones(32, 6).int()}), "qweight is I32: quantised"),
        (holding(**{DOWN.replace("weight", "weight_scale"): torch.ones(1)}), "quantised: it holds model.layers.1"),
        (holding(**{DOWN.replace("weight", "lora_A.weight"): torch.ones(4, 48)}), "merge the adapter first"),
        (holding(**{"v_head.weight": torch.ones(1, 32)}), "it holds v_head.weight, which the model"),
        (classifier, "architectures 'LlamaForSequenceClassification' is no language model"),
        (configured(model_type="llava", text_config={"model_type": "llama"}), "wraps a language model in another"),
        (configured(model_type=None), "config.json: names no model_type. Supported families: llama, mistral"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: names no model_type"),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json with model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors, nor model."),
        (renamed("adapter_model.safetensors", "adapter_config.json"), "it is an adapter (LoRA). Merge it"),
        (renamed("pytorch_model.bin"), "its weights are in pytorch_model.bin, which may run code"),
        (renamed("consolidated.00.pth"), "its weights are in consolidated.00.pth, which may run code"),
        (renamed("model.Q4_0.gguf"), "it holds GGUF files. Give one of them by its own path, such as model.Q4_0.gguf"),
        (renamed("weights.safetensors"), "it holds weights.safetensors, but no model.safetensors"),
        (cut_in_the_middle, "model.safetensors: cut short, or not safetensors"),
        (shard_cut, "b.safetensors: cut short, or not safetensors"),
        (shard_gone, "names 'b.safetensors', which is not beside it. Get the checkpoint whole."),
        (twice, "is in a.safetensors and in b.safetensors: keep one"),
        (holding(**{"model.layers.0.self_attn.bias": torch.ones(1, 9).bool()}), "it holds model.layers.0.self_attn"),
        (holding(**{"model.position_counts": torch.ones(3).long()}), "it holds model.position_counts, which the model"),
        (holding(**{DOWN: torch.ones(32, 48).long()}), f"tensor {DOWN} is I64: weights are numbers in one of F64, F32"),
        (indexed({}), "model.safetensors.index.json: its weight_map names no f"),
        (indexed({DOWN: "a", "x": "a"}, twice=True), "index.json: not an index of weights (ValueError: key 'x'"),
        (written_twice("hidden_size"), "config.json: cannot be read as JSON: key 'hidden_size' stands there twice"),
        (configured(architectures="LlamaForCausalLM"), "architectures = 'LlamaForCausalLM': expected a list"),
        (configured(rope_parameters={"rope_type": "foo"}), "config.json: rope_parameters.rope_type = 'foo': expected"),
        (configured(rope_scaling={"type": "foo"}), "rope_scaling.type = 'foo': expected one of default"),
        (configured(rope_scaling={"type": "linear", "factor": "4"}), "rope_scaling.factor = '4': expected a number"),
        (configured(rope_parameters="yarn"), "config.json: rope_parameters = 'yarn': expected an object"),
        (configured(rope_theta=-1.0), "config.json: rope_theta = -1.0: expected a number above 0"),
        (configured(dtype="float8_e4m3fn"), "config.json: dtype = 'float8_e4m3fn': expected one of float32, bfloat16"),
        (configured(rms_norm_eps=float("nan")), "config.json: rms_norm_eps = nan: expected a number above 0"),
        (configured(rms_norm_eps=0), "config.json: rms_norm_eps = 0: expected a number above 0"),
        (configured(rms_norm_eps=-1e-5), "config.json: rms_norm_eps = -1e-05: expected a number above 0"),
        (configured(num_attention_heads=0), "config.json: num_attention_heads = 0: expected a number above 0"),
        (configured(hidden_act="foo"), "config.json: transformers cannot build this model: KeyError: "),
        (too_large_for_float16, f"tensor {DOWN} holds numbers beyond those of config.json's dtype, float16"),
        (spoilt(DOWN, float("nan")), f"model.safetensors: tensor {DOWN} holds 1 of 1,536 values that are NaN"),
        (spoilt("model.norm.weight", float("-inf")), "tensor model.norm.weight holds 1 of 32 values"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_refused_when_it_is_downloaded(harm, message, model, tmp_path):
    harm(model)
    assert message in refused(model, tmp_path)


def test_an_index_decides_which_files_are_taken(model, tmp_path):
    sharded(model)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "c.safetensors"):
        save_file({"layers.0.attention.wq.weight": torch.ones(3, 3)}, model / name)
    folder = taken(model, tmp_path / "made")
    assert {file.name for file in folder.glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}
    assert all(file.is_symlink() for file in folder.glob("*.safetensors*"))


def consolidated(folder):
    save_file({"layers.0.attention.wq.weight": torch.ones(300, 300)}, folder / "consolidated.safetensors")


def rotary(folder):
    """As in Llama's first checkpoints."""
    weights(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))


def masked(folder):
    """As in checkpoints of transformers 3."""
    weights(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4).long()}))


def tied_to_another_head(folder):
    edit(folder, tie_word_embeddings=True)


def tied_and_written_twice(folder):
    edit(folder, tie_word_embeddings=True)
    weights(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))


def tied_and_only_the_head(folder):
    edit(folder, tie_word_embeddings=True)
    without("model.embed_tokens.weight")(folder)


def base_model(folder):
    edit(folder, tie_word_embeddings=True, architectures=["LlamaModel"])
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight")
    save_file({name.removeprefix("model."): value for name, value in state.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        consolidated,
        sharded,
        rotary,
        masked,
        tied_to_another_head,
        tied_and_written_twice,
        tied_and_only_the_head,
        base_model,
    ],
)
def test_what_is_counted_is_what_is_loaded(change, model, tmp_path):
    change(model)
    folder = taken(model, tmp_path / "made")
    network = load_model(folder, "float32")
    assert shape_on_disk(folder) == shape_of(network)
    assert count_parameters(network) == (43744 if change not in (
        tied_and_written_twice, tied_and_only_the_head, base_model) else 33504)  # fmt: skip


def test_another_head_than_the_embeddings_stays_in_what_is_written(model, tmp_path):
    tied_to_another_head(model)
    folder = taken(model, tmp_path / "made")
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"], "the user's own file is left alone"
    head = load_file(model / "model.safetensors")["lm_head.weight"]
    load_model(folder, "float32").save_pretrained(tmp_path / "written")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, head)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_weights_that_float16_makes_infinite_are_refused_where_it_is_asked_for(model, tmp_path):
    spoilt(DOWN, 1e30)(model)
    folder = taken(model, tmp_path / "made")
    load_model(folder, "bfloat16")
    with pytest.raises(UserError, match=f"tensor {DOWN} holds numbers beyond those of float16"):
        load_model(folder, "float16")


def newer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "FUTURE"
    (folder / "tokenizer.json").write_text(json.dumps(content))


def nameless(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer).save_pretrained(folder)


def no_sentencepiece(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(b"not one")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (newer, "no tokenizer that transformers"),
        (nameless, "the tokenizer names neither bos_token nor eos_token"),
        (no_sentencepiece, "no tokenizer that transformers"),
        (lambda folder: [file.unlink() for file in folder.glob("*token*")], "no tokenizer that transformers"),
    ],
)
def test_a_tokenizer_that_some_stage_could_not_use_is_refused(harm, message, model, tmp_path):
    harm(model)
    assert message in refused(model, tmp_path)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(sentences(i, 200) for i in range(20)), model_prefix=str(prefix), vocab_size=320,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_a_tokenizer_of_sentencepiece_alone_gives_its_tokens(sentencepiece_model, model, tmp_path):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    for file in model.glob("*token*"):
        file.unlink()
    shutil.copy(sentencepiece_model, model / "tokenizer.model")
    assert "Name the class that it is for in tokenizer_config.json" in refused(model, tmp_path)
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = AutoTokenizer.from_pretrained(taken(model, tmp_path / "made"))
    text = sentences(5, 30)
    expected = SentencePieceProcessor(model_file=str(sentencepiece_model)).encode(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_tokens_that_the_model_does_not_know_have_one_message_in_every_stage(model, tmp_path, command):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"tok{i}" for i in range(30)])
    tokenizer.save_pretrained(model)
    folder = command("download", "model", "--path", model)
    texts = write_lines(tmp_path / "text.jsonl", [{"text": "tok29 " * 40 + sentences(i, 40)} for i in range(4)])
    text = command("download", "text", "--path", texts)
    records = [record | {"passage": f"tok29 {record['passage']}"} for record in boolq_records(4)]
    documents = write_lines(tmp_path / "boolq.jsonl", records)
    task = command("download", "task", "--name", "boolq", "--path", documents)
    sampled = ("--text", text, "--samples", 2, "--length", 16)
    for words in (
        ("score", *sampled),
        ("reference", *sampled),
        ("recover", "--text", text, "--length", 64),
        ("evaluate", "--tasks", task),
        ("evaluate", "--tasks", task, "--batching", "stock"),
    ):
        said = run_hfprune(tmp_path / "store", words[0], "--model", folder, *words[1:], status=2)
        assert "but the model knows ids up to 319: the tokenizer is another model's" in said, words


def test_the_hub_sends_nothing_of_a_model_that_is_refused_nor_what_is_not_loaded(model, tmp_path):
    sharded(model)
    consolidated(model)
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    config = json.loads(files["config.json"])
    quantised = json.dumps(config | {"quantization_config": {"quant_method": "awq"}}).encode()
    with serve() as hub:
        hub.repository("models", "someone/tiny").commit(files)
        hub.repository("models", "someone/awq").commit(files | {"config.json": quantised})
        hub.repository("models", "someone/lora").commit(
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
        )
        environment = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        words = ("download", "model", "--hub")
        folder = run_hfprune(tmp_path / "store", *words, "someone/tiny", **environment)
        assert not [request for request in hub.requests if "consolidated" in request and "GET" in request]
        assert (tmp_path / "store" / "model").samefile(folder + "/..")
        hub.requests.clear()
        said = run_hfprune(tmp_path / "store", *words, "someone/awq", status=2, **environment)
        assert "hub someone/awq@main: config.json: quantization_config: the weights are quantised (awq)" in said
        said = run_hfprune(tmp_path / "store", *words, "someone/lora", status=2, **environment)
        assert "hub someone/lora@main: not a checkpoint that can be loaded: it is an adapter (LoRA)" in said
        assert not [request for request in hub.requests if ".safetensors" in request and "index" not in request]
