"""What goes with the weights, what does not, and what a link may lead to."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hfprune.cli import main
from hfprune.data.download import content_digest
from hfprune.errors import UserError
from hfprune.models import checkpoint as checkpoints
from hfprune.models.files import model_files
from hfprune.models.loading import load_model
from hfprune.store.filenames import is_companion, is_shared
from tests.conftest import make_tokenizer

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
TRAVELS = (
    "tokenizer.json", "tokenizer.4.0.0.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
    "generation_config.json", "LICENSE", "LICENSE.txt", "License.md", "LICENSE-MODEL", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip
STAYS = (
    ".hf_token", "hf_token", "tokens.pkl", "token.txt", "my_tokenizer.bin", "tokenizer.py", "tokenizer.pkl", ".env",
    "vocab.pkl", "LICENSE.key", "license.pem", "LICENSE_SERVER_TOKEN", "notes/LICENSE", "merges.txt.bak",
    "secret.model", "additional_chat_templates/x/y.jinja", "additional_chat_templates/notes.txt",
    "tokenizer/tokenizer.json",
    "generation_config.json.orig", "pytorch_model.bin", "optimizer.pt", ".git/config", "training_args.bin",
)  # fmt: skip


@pytest.fixture
def model(checkpoint, tmp_path):
    """A checkpoint with several chat templates, with all that travels and all that stays beside it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", *STAYS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}")
    return folder


def download(store, folder, status=0):
    assert main(["download", "model", "--path", str(folder), "--store", str(store)]) == status
    return next(iter((store / "model").glob("*")), None)


def names(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_files_travel_by_their_names():
    assert [name for name in TRAVELS if not is_companion(name)] == []
    assert [name for name in STAYS if is_companion(name) or is_shared(name)] == []


def test_all_chat_templates_travel_and_no_secret_does(model, tmp_path):
    folder = download(tmp_path / "store", model)
    assert names(folder) == names(model) - set(STAYS) | {"manifest.json"}
    (folder / "tokens.pkl").write_text("put there by hand")
    (folder / "chat_template_mine.jinja").write_text("put there by hand")
    checkpoints.write(load_model(folder, "float32"), tmp_path / "written", folder)
    assert names(tmp_path / "written") == names(model) - set(STAYS)
    assert AutoTokenizer.from_pretrained(tmp_path / "written").chat_template == TEMPLATES


def test_the_digest_of_a_local_checkpoint_is_of_what_travels(model):
    before = content_digest(model)
    for name in STAYS:
        (model / name).write_text("something else")
    assert content_digest(model) == before
    seen = {before}
    for name in ("additional_chat_templates/tool_use.jinja", "USE_POLICY.md", "generation_config.json", "pruning.json"):
        (model / name).write_text("{}")
        seen.add(content_digest(model))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    seen.add(content_digest(model))
    (model / "README.md").write_text("---\nlicense: mit\n---\nWords.\n")
    seen.add(content_digest(model))
    assert len(seen) == 6


def leads_out(model, name):
    """Put what `name` holds outside, a link in its place."""
    outside = model.parent / f"outside-{Path(name).name}"
    shutil.move(model / name, outside)
    (model / name).symlink_to(outside)
    return outside


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_is_needed_is_no_link_out_of_the_folder(name, model, tmp_path, capsys):
    outside = leads_out(model, name)
    download(tmp_path / "store", model, status=2)
    said = capsys.readouterr().err
    assert f"{model / name}: a link that leads out of the folder, to {outside}." in said
    outside.unlink()
    with pytest.raises(UserError, match="a link that leads nowhere"):
        model_files(model)


def test_other_links_out_of_the_folder_are_left_out(model, tmp_path, capsys):
    links = {"LICENSE", "generation_config.json"}
    for name in links:
        leads_out(model, name)
    templates = model / "additional_chat_templates"
    links |= {f"additional_chat_templates/{name}" for name in ("tool_use.jinja", "rag.jinja")}
    shutil.move(templates, tmp_path / "templates")
    templates.symlink_to(tmp_path / "templates")
    folder = download(tmp_path / "store", model)
    assert not links & names(folder)
    said = capsys.readouterr().err
    assert all(f"{model / name}: a link that leads out of the folder" in said for name in links)


def test_links_within_the_folder_are_followed(model, tmp_path):
    (model / "weights").mkdir()
    shutil.move(model / "model.safetensors", model / "weights" / "real")
    (model / "model.safetensors").symlink_to("weights/real")
    (tmp_path / "called").symlink_to(model)
    assert "model.safetensors" in names(download(tmp_path / "store", tmp_path / "called"))


def test_a_snapshot_in_the_hubs_cache_is_a_folder_like_others(model, tmp_path):
    """Its files are links to the blobs of the same repository."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(sorted(names(model))):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / name, repository / "blobs" / str(number))
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{number}")
    assert content_digest(snapshot) == content_digest(model)
    assert names(download(tmp_path / "store", snapshot)) == names(model) - set(STAYS) | {"manifest.json"}
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(model / "config.json")
    with pytest.raises(UserError, match="leads out of the folder"):
        model_files(snapshot)


CONFIGS = [
    {"stop_strings": ["x"]},
    {"num_beams": 4, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "suppress_tokens": list(range(320))},
    {"max_length": 4},
    {"min_length": 2, "max_new_tokens": 1},
    {"eos_token_id": list(range(320))},
    {"prompt_lookup_num_tokens": 3, "guidance_scale": 2.0},
    {"cache_implementation": "static", "use_cache": False},
    {"return_dict_in_generate": True, "output_scores": True},
    {"temperature": 0.6},  # with what samples switched off: a file that transformers would not write
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: next(iter(config)))
def test_the_proof_generates_in_its_own_way(config, checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    odd = json.dumps({"bos_token_id": 0, "eos_token_id": 1, "x": 1} | config)
    (model / "generation_config.json").write_text(odd)
    expected = checkpoints.write(load_model(model, "float32"), tmp_path / "written", model)
    assert checkpoints.prove(tmp_path / "written", expected)["generated"] == 8
    assert (tmp_path / "written" / "generation_config.json").read_text() == odd


def test_where_there_is_no_generation_config_none_is_written(checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "generation_config.json").unlink()
    checkpoints.write(load_model(model, "float32"), tmp_path / "written", model)
    assert not (tmp_path / "written" / "generation_config.json").exists()
