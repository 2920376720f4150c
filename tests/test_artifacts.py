"""Keys, verification, and what killed or simultaneous writers leave behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from hfprune.errors import UserError
from hfprune.stages.registry import STAGES
from hfprune.store import artifacts, keys
from hfprune.store.artifacts import Store, read
from hfprune.store.keys import Recipe, code_digest

RECIPE = Recipe("stage", {"a": 1, "b": [0.1, None]}, {"model": "0" * 16})


def write(folder):
    (folder / "data.bin").write_bytes(bytes(range(256)))
    (folder / "below").mkdir()
    (folder / "below" / "note.txt").write_text("text")
    return {"tokens": 7}


def test_the_key_is_a_digest_of_everything_that_matters():
    assert RECIPE.key == Recipe("stage", {"b": [0.1, None], "a": 1}, {"model": "0" * 16}).key
    others = [
        Recipe("other", RECIPE.parameters, RECIPE.inputs),
        Recipe("stage", {"a": 2, "b": [0.1, None]}, RECIPE.inputs),
        Recipe("stage", RECIPE.parameters, {"model": "1" * 16}),
        Recipe("stage", RECIPE.parameters, RECIPE.inputs, code="x"),
        Recipe("stage", RECIPE.parameters, RECIPE.inputs, libraries={"torch": "2"}),
    ]
    assert len({RECIPE.key, *(other.key for other in others)}) == 6
    assert len(RECIPE.key) == 16


def test_made_once_then_found(tmp_path, capfd):
    store = Store(tmp_path)
    made = store.make(RECIPE, write)
    found = store.make(RECIPE, lambda folder: pytest.fail("made twice"))
    assert found.folder == made.folder == tmp_path / "stage" / RECIPE.key
    assert "in the store already, verified" in capfd.readouterr().err
    assert found.manifest["details"] == {"tokens": 7}
    assert set(found.manifest["files"]) == {"data.bin", "below/note.txt"}
    assert {"versions", "git_commit", "host", "device", "seconds", "peak_memory_bytes", "time"} <= set(found.manifest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "data.bin"), r"data\.bin: refused: sha256"),
        (lambda folder: (folder / "data.bin").write_bytes(b""), r"data\.bin: refused: 0 bytes, the manifest says 256"),
        (lambda folder: (folder / "data.bin").unlink(), r"data\.bin: refused: missing"),
        (lambda folder: edit_manifest(folder, a=2), r"manifest\.json: refused: its content has key"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: refused: not a manifest"),
    ],
)
def test_a_damaged_artifact_is_named_refused_and_made_again(damage, message, tmp_path):
    store = Store(tmp_path)
    folder = store.make(RECIPE, write).folder
    damage(folder)
    with pytest.raises(UserError, match=message):
        read(folder)
    with pytest.raises(UserError, match="it was refused earlier"):
        read(folder)
    store.make(RECIPE, write)
    assert read(folder).manifest["files"]["data.bin"]["bytes"] == 256


def flip(file):
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parameters"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_failed_stage_wrote_is_never_an_artifact(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        write(folder)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        store.make(RECIPE, fail)
    assert not store.folder(RECIPE).exists()
    store.make(RECIPE, write)
    read(store.folder(RECIPE))


SLOW_STAGE = """
import sys, time
from pathlib import Path
from hfprune.store.artifacts import Store
from hfprune.store.keys import Recipe

def produce(folder):
    (folder / ".resume").mkdir(exist_ok=True)
    attempts = folder / ".resume" / "attempts"
    attempts.write_text((attempts.read_text() if attempts.exists() else "") + "x")
    (folder / "data.bin").write_bytes(b"half")
    print("working", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "data.bin").write_bytes(b"whole")
    return {"attempts": len(attempts.read_text())}

print(Store(Path(sys.argv[1])).make(Recipe("stage", {}), produce).manifest["details"])
"""


def start(store, seconds):
    return subprocess.Popen([sys.executable, "-c", SLOW_STAGE, store, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_kill_9_in_the_middle_leaves_nothing_half_written_and_the_next_attempt_resumes(tmp_path):
    first = start(tmp_path, 60)
    assert first.stdout.readline() == "working\n"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    recipe = Recipe("stage", {})
    assert not Store(tmp_path).has("stage", recipe.key)
    second = start(tmp_path, 0)
    assert second.communicate(timeout=60)[0] == "working\n{'attempts': 2}\n"
    folder = read(tmp_path / "stage" / recipe.key).folder
    assert (folder / "data.bin").read_bytes() == b"whole"
    assert not (folder / ".resume").exists()


def test_two_at_once_make_it_once(tmp_path):
    both = [start(tmp_path, 2) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(output.count("working") for output in outputs) == [0, 1]
    assert all("{'attempts': 1}" in output for output in outputs)


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(UserError, match=r"cannot write to the store.*HFPRUNE_STORE"):
        Store(tmp_path / "store").make(RECIPE, write)


@pytest.mark.parametrize(("store", "file"), [(0o2775, 0o664), (0o755, 0o644), (0o700, 0o600)])
def test_what_is_made_gets_the_permissions_of_the_stores_folder_whatever_the_umask(store, file, tmp_path):
    def private(folder):
        write(folder)
        (folder / "data.bin").chmod(0o600)

    tmp_path.chmod(store)
    before = os.umask(0o077)
    try:
        made = Store(tmp_path).make(RECIPE, private).folder
    finally:
        os.umask(before)
    folders = [tmp_path / ".work", made.parent, made, made / "below"]
    assert {folder.stat().st_mode & 0o7777 for folder in folders} == {store}
    assert {path.stat().st_mode & 0o7777 for path in made.rglob("*") if path.is_file()} == {file}


# A user of the store. The interpreter may stand where only root reads: all modules are there before it is the user.
USER = """
import os, sys, tempfile, time
from pathlib import Path
from hfprune.store import artifacts, keys
from hfprune.errors import UserError

with tempfile.TemporaryDirectory() as scratch:
    artifacts.Store(Path(scratch)).make(keys.Recipe("stage", {}), lambda folder: None)
root, uid, umask, parameter, seconds = Path(sys.argv[1]), *map(int, sys.argv[2:6])
os.setgroups([])
os.setgid(4000)
os.setuid(uid)
os.umask(umask)

def produce(folder):
    (folder / ".resume").mkdir(exist_ok=True)
    (folder / ".resume" / "sums").write_text("x")
    (folder / ".resume" / "sums").chmod(0o600)
    (folder / "below").mkdir()
    (folder / "data.bin").write_bytes(b"data")
    (folder / "data.bin").chmod(0o600)
    print("working", flush=True)
    time.sleep(seconds)

try:
    made = artifacts.Store(root).make(keys.Recipe("stage", {"a": parameter}), produce)
    print("has", artifacts.read(made.folder).key, flush=True)
except UserError as error:
    print(error, flush=True)
"""
ALICE, BOB = 4001, 4002


class Group:
    """A store that two users share, by their group."""

    def __init__(self, root, mode):
        self.root = root / "store"
        self.root.mkdir()
        os.chown(self.root, ALICE, 4000)
        self.root.chmod(mode)

    def start(self, user, umask, parameter=0, seconds=0):
        words = map(str, (self.root, user, umask, parameter, seconds))
        return subprocess.Popen([sys.executable, "-c", USER, *words], stdout=subprocess.PIPE, text=True)

    def run(self, user, umask, parameter=0):
        process = self.start(user, umask, parameter)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0
        return output.splitlines()


@pytest.fixture
def group():
    if os.getuid() != 0:
        pytest.skip("only root can be several users")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are private
        Path(folder).chmod(0o755)
        yield lambda mode: Group(Path(folder), mode)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_two_users_share_a_store_whatever_their_umask(umask, group):
    shared = group(0o2770)
    key = Recipe("stage", {"a": 0}).key
    assert shared.run(ALICE, umask) == ["working", f"has {key}"]
    assert shared.run(BOB, 0o022) == [f"has {key}"]
    assert shared.run(BOB, umask, 1) == ["working", f"has {Recipe('stage', {'a': 1}).key}"]
    (shared.root / "stage" / key / "data.bin").write_bytes(b"atad")
    assert shared.run(BOB, umask) == ["working", f"has {key}"], "one replaces what the other has made"
    shared.run(ALICE, umask, 2)
    process = shared.start(ALICE, umask, 3, 60)
    assert process.stdout.readline() == "working\n"
    process.kill()
    process.wait()
    assert shared.run(BOB, umask, 3)[-1] == f"has {Recipe('stage', {'a': 3}).key}", "over what the other has left"


def test_two_users_at_once_make_it_once(group):
    shared = group(0o2770)
    both = [shared.start(user, umask, 0, 2) for user, umask in ((ALICE, 0o077), (BOB, 0o002))]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(output.count("working") for output in outputs) == [0, 1]
    assert all(f"has {Recipe('stage', {'a': 0}).key}" in output for output in outputs)


def test_who_may_only_read_a_store_reads_it_and_is_told_what_may_not_be_written(group):
    shared = group(0o755)
    key = Recipe("stage", {"a": 0}).key
    shared.run(ALICE, 0o077)
    assert shared.run(BOB, 0o022) == [f"has {key}"]
    (said,) = shared.run(BOB, 0o022, 1)
    assert f"{shared.root}/.work" in said
    assert "cannot write to the store (Permission denied). Fix its permissions, or set another folder" in said
    (shared.root / "stage" / key / "data.bin").chmod(0o600)
    (said,) = shared.run(BOB, 0o022)
    assert f"{shared.root}/stage/{key}/data.bin: cannot be read (Permission denied)" in said
    assert shared.run(ALICE, 0o022) == [f"has {key}"], "what one cannot read is not damaged"
    shared.root.chmod(0o700)
    (said,) = shared.run(BOB, 0o022)
    assert "manifest.json: cannot be read (Permission denied)" in said


def test_what_comes_out_beside_something_else_is_left_to_the_process_that_makes_it(tmp_path):
    """Two runs, each of which holds what the other would wait for."""
    recipe = Recipe("stage", {})
    other = start(tmp_path, 60)
    assert other.stdout.readline() == "working\n"
    Store(tmp_path).make_unless_locked(recipe, lambda folder: pytest.fail("made twice"))
    other.kill()
    other.wait()
    Store(tmp_path).make_unless_locked(recipe, write)
    Store(tmp_path).make_unless_locked(recipe, lambda folder: pytest.fail("made twice"))
    read(tmp_path / "stage" / recipe.key)


def test_a_reader_does_not_set_aside_what_was_made_again_while_it_read(tmp_path, monkeypatch):
    store = Store(tmp_path)
    folder = store.make(RECIPE, write).folder
    (folder / "below" / "note.txt").write_text("TEXT")
    hashed = keys.file_sha256

    def made_again(file):
        found = hashed(file)
        monkeypatch.setattr(artifacts, "file_sha256", hashed)
        with pytest.raises(UserError, match="refused"):
            read(folder)
        store.make(RECIPE, write)
        return found

    monkeypatch.setattr(artifacts, "file_sha256", made_again)
    monkeypatch.setattr(artifacts, "versions", lambda: {"torch": "2"})  # so that the manifests differ
    with pytest.raises(UserError, match="refused"):
        read(folder)
    read(folder)


def test_a_manifest_of_the_future_is_read_and_dated_now(tmp_path):
    """Snakemake refuses an output that is older than its input."""
    folder = Store(tmp_path).make(RECIPE, write).folder
    os.utime(folder / "manifest.json", (4e9, 4e9))
    read(folder)
    assert (folder / "manifest.json").stat().st_mtime < 3e9


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two modules, in which `first` imports `second`, and `third` stands apart."""
    folder = tmp_path / "hfprune"
    folder.mkdir()
    (folder / "first.py").write_text("from hfprune.second import g\n\ndef f(x):\n    return g(x)\n")
    (folder / "second.py").write_text('def g(x):\n    """Double."""\n    return 2 * x  # twice\n')
    (folder / "third.py").write_text("COLOR = 'red'\n")
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(keys, "PACKAGE", folder)
    code_digest.cache_clear()
    yield folder
    code_digest.cache_clear()


@pytest.mark.parametrize(
    ("module", "text", "changes"),
    [
        ("second", 'def g(x):\n    """Twice x."""\n\n    return (2 * x)\n', False),
        ("second", "def g(x):\n    return 3 * x\n", True),
        ("first", "from hfprune import second\n\ndef f(x):\n    return second.g(x)\n", True),
        ("third", "COLOR = 'blue'\n", False),
    ],
)
def test_the_code_digest_follows_imports_and_ignores_comments_and_docstrings(module, text, changes, package):
    before = code_digest("hfprune.first")
    (package / f"{module}.py").write_text(text)
    code_digest.cache_clear()
    assert (code_digest("hfprune.first") != before) == changes


FORMS = {
    "the module": "import hfprune.room.inner\n",
    "the module under another name": "import hfprune.room.inner as other\n",
    "a module of a sub-package": "from hfprune.room import inner\n",
    "a name of a module": "from hfprune.room.inner import g\n",
    "everything of a module": "from hfprune.room.inner import *\n",
    "inside a function": "def f():\n    from hfprune.room.inner import g\n    return g\n",
    "dots": "from .room import inner\n",
    "dots and a name": "from .room.inner import g\n",
    "by its name": "import importlib\ninner = importlib.import_module('hfprune.room.inner')\n",
    "a module two imports away": "from hfprune.second import g\n",
    "every module of a room": "import importlib\ndef f(name):\n    importlib.import_module(f'hfprune.room.{name}')\n",
}


@pytest.fixture
def room(package):
    """A sub-package whose module `inner` also `second` imports."""
    (package / "room").mkdir()
    (package / "room" / "__init__.py").write_text('"""A room."""\n')
    (package / "room" / "inner.py").write_text("def g(x):\n    return 2 * x\n")
    (package / "second.py").write_text("from hfprune.room.inner import g\n")
    return package


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edited", ["inner.py", "__init__.py"])
def test_the_code_digest_follows_every_form_of_import_into_sub_packages(form, edited, room):
    (room / "first.py").write_text(FORMS[form])
    before = code_digest("hfprune.first")
    with (room / "room" / edited).open("a") as file:
        file.write("CHANGED = 1\n")
    code_digest.cache_clear()
    assert code_digest("hfprune.first") != before


DECLARED = "x: int = Field({default}, description={help!r})\nS = Stage(name='s', examples=({help!r},), produce=f)\n"
BESIDE = "@outside_key\ndef cost():\n    from hfprune.third import COLOR\n    return {value}\n"


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        (DECLARED.format(default=1, help="few"), DECLARED.format(default=1, help="many"), False),
        (DECLARED.format(default=1, help="few"), DECLARED.format(default=2, help="few"), True),
        ("call(description='a')\n", "call(description='b')\n", True),
        (BESIDE.format(value=1), BESIDE.format(value=2), False),
        (BESIDE.format(value=1).partition("\n")[2], BESIDE.format(value=2).partition("\n")[2], True),
    ],
)
def test_help_and_what_is_marked_are_in_no_key(before, after, changes, package):
    (package / "first.py").write_text(before)
    digest = code_digest("hfprune.first")
    (package / "first.py").write_text(after)
    (package / "third.py").write_text("COLOR = 'blue'\n")
    code_digest.cache_clear()
    assert (code_digest("hfprune.first") != digest) == changes


@pytest.mark.parametrize(
    "text",
    [
        "from hfprune import absent\n",
        "import hfprune.absent\n",
        "from hfprune.room import absent\n",
        "from hfprune.room.inner import absent\n",
        "from .room import absent\n",
        "import importlib\nimportlib.import_module(NAME)\n",
        "__import__(f'hfprune.{x}')\n",
        "__import__(f'hfprune.room.{x}.{y}')\n",
        "__import__(f'hfprune.second.{x}')\n",
    ],
)
def test_an_import_that_cannot_be_followed_is_refused(text, room):
    (room / "first.py").write_text(text)
    with pytest.raises(keys.UnresolvedImportError):
        code_digest("hfprune.first")


def test_the_python_interface_of_the_package_is_in_no_key(room):
    """The package's own `__init__` offers everything; were it followed, every edit would change every key."""
    (room / "__init__.py").write_text("def prune():\n    from hfprune.third import COLOR\n")
    before = code_digest("hfprune.first")
    (room / "third.py").write_text("COLOR = 'blue'\n")
    code_digest.cache_clear()
    assert code_digest("hfprune.first") == before


def test_every_import_of_the_package_can_be_followed():
    for file in sorted(keys.PACKAGE.rglob("*.py")):
        code_digest(".".join(file.relative_to(keys.PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"))


def test_a_module_that_many_stages_run_is_read_once(monkeypatch):
    for cached in (code_digest, keys._parsed, keys._defined):
        cached.cache_clear()
    parsed, parse = Counter(), keys.ast.parse
    monkeypatch.setattr(keys.ast, "parse", lambda text: parsed.update([text]) or parse(text))
    for stage in STAGES.values():
        code_digest(stage.module)
    assert len(parsed) > 50
    assert max(parsed.values()) <= 2, "for what it runs, and for the names that it defines"
