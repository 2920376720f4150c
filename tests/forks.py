"""Python processes of tests need not import their libraries anew: they fork from one, the server, that has done so.

The server starts when it is first asked, and ends with this process. `python` asks it to do what a command line of
Python does.

A checkout holds `CLIENT` as sitecustomize.py, which each `python -m hfprune` of its jobs runs first. It sends its
words, environment, folder and standard files to the server and waits. The server forks, and the fork does with the
checkout's own code what the job would have done. A signal to the job reaches the fork; if the job is killed, so is the
fork.
"""

import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "hfprune"
PRELOADED = (
    "hfprune.cli", "hfprune.data.download", "hfprune.data.lm_eval_tasks", "hfprune.pruning.scoring",
    "hfprune.pruning.surgery", "hfprune.recovery.training", "hfprune.evaluation.fidelity",
    "hfprune.evaluation.lm_eval_runner", "hfprune.sharing.model_card", "datasets", "huggingface_hub.constants",
    "hfprune.reporting.agreement", "hfprune.reporting.comparison", "hfprune.reporting.curves",
    "hfprune.reporting.figures", "hfprune.reporting.overview", "hfprune.reporting.pages",
    "hfprune.reporting.paper_sheets", "lm_eval.evaluator", "lm_eval.models.huggingface",
    "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_svg", "fontTools.subset",
    "pandas.io.formats.style", "snakemake.cli",
)  # fmt: skip
OF_ENVIRONMENT = ("huggingface_hub.constants", "datasets.config")  # where the hub is, and what is kept of it
CLIENT = """\
import os, sys

if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2] in ("hfprune", "snakemake") and sys.orig_argv[3:4] != ["on-gpus"]:
    import json, signal, socket

    server = socket.socket(socket.AF_UNIX)
    server.connect({address!r})
    umask = os.umask(0)
    os.umask(umask)
    request = {{"words": sys.orig_argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "umask": umask}}
    request["killed"] = "result" if sys.orig_argv[3:4] == [{killed!r}] else ""
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    passed = (signal.SIGTERM, signal.SIGINT)
    for number in passed:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
    status = int.from_bytes(server.recv(8), "big", signed=True)
    if -status in passed:
        signal.signal(-status, signal.SIG_DFL)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)
"""


multiprocessing.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])  # for timing's processes

# In this process.


@functools.cache
def _address() -> str:
    """Where the server listens, which is started now."""
    folder = tempfile.TemporaryDirectory()
    address = f"{folder.name}/socket"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = [sys.executable, "-m", "tests.forks", address]
    process = subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=REPOSITORY)
    process.stdout.readline()  # it listens
    _address.server = folder, process  # the folder and the server's stdin stay open as long as this process lives
    return address


def client(killed: str = "") -> str:
    """`CLIENT` for the server of this process; SIGKILL ends the command `killed` at its second result."""
    return CLIENT.format(address=_address(), killed=killed)


def python(
    words: list[object],
    environment: Mapping[str, str],
    folder: Path | None = None,
    killed: str = "",
    on_one_screen: bool = False,
) -> tuple[int, str, str]:
    """Run `python WORDS`.

    Args:
        words: `-m MODULE WORD ...`, `-c CODE WORD ...`, or `-P -c CODE WORD ...`.
        environment: of the process. Of what libraries read of it when they are imported, the modules `OF_ENVIRONMENT`
            read it again.
        folder: in which it runs; by default this process's.
        killed: the name of an audit event at which SIGKILL ends it: "open", when it opens a further file in its work
            folder to write; "os.rename", when it has written all and moves the folder to its place; or "result", when
            it has moved the first of several results to its place.
        on_one_screen: whether what it prints on stderr is among what it prints on stdout.

    Returns:
        Its exit status, below 0 for a signal, and what it printed on stdout and on stderr.
    """
    os.umask(umask := os.umask(0))
    request = {"words": [*map(str, words)], "environment": {**environment}, "umask": umask, "killed": killed}
    content = json.dumps(request | {"folder": str(folder or Path.cwd())}).encode()

    def ask(files: list[int]) -> int:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(_address())
            socket.send_fds(server, [len(content).to_bytes(8, "big")], files)
            server.sendall(content)
            return int.from_bytes(server.recv(8), "big", signed=True)

    return _printed(ask, on_one_screen)


def _printed(run: Callable[[list[int]], int], on_one_screen: bool = False) -> tuple[int, str, str]:
    """What `run` returns, given three standard files, and what was printed on two of them."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        status = run([0, output.fileno(), (output if on_one_screen else errors).fileno()])
        output.seek(0)
        errors.seek(0)
        return status, output.read(), errors.read()


def reloading(fork: Callable[..., tuple[int, str, str]]) -> SimpleNamespace:
    """What stands for `subprocess` where a checkpoint is reloaded."""

    def run(command: list, env: Mapping[str, str], **options: object) -> SimpleNamespace:
        status, output, errors = fork(command[1:], env)
        return SimpleNamespace(returncode=status, stdout=output, stderr=errors)

    return SimpleNamespace(run=run)


# In the server.


def serve(address: str) -> None:
    """Fork for each process that is asked for, until stdin ends."""
    _imported()
    for name in PRELOADED:
        __import__(name)
    _fill_caches()
    gc.freeze()  # no fork looks through all these objects for garbage
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    print(flush=True)
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection)
            os._exit(0)
        connection.close()


@functools.cache
def _imported() -> dict[str, bytes]:
    """The package's files when the server imports it, which are not read again later."""
    return _content(PACKAGE)


def _content(package: Path) -> dict[str, bytes]:
    """The files of a package."""
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in files}


def _fill_caches() -> None:
    """Have made before any fork what the package makes once a process."""
    from hfprune.pruning.methods import presets
    from hfprune.stages.registry import STAGES
    from hfprune.store.keys import code_digest

    presets()
    stages = {stage.module for stage in STAGES.values()}
    drawn = {name for name in sys.modules if name.startswith(("hfprune.reporting.", "hfprune.data."))}
    for module in ("hfprune.cli", *stages, *drawn):
        code_digest(module)


def _attend(connection: socket.socket) -> None:
    """Run one process, pass signals to it, and send its exit status."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += connection.recv(2**16)
    job = os.fork()
    if job == 0:
        connection.close()
        os.setpgid(0, 0)
        _become(files, **json.loads(content))
    for file in files:
        os.close(file)
    ended = os.pidfd_open(job)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
            connection.sendall(status.to_bytes(8, "big", signed=True))
            return
        number = connection.recv(1)
        try:
            os.killpg(job, number[0] if number else signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or has ended
            os.kill(job, number[0] if number else signal.SIGKILL)
        if not number:
            return


def _become(
    files: list[int],
    words: list[str],
    environment: dict[str, str],
    folder: str,
    umask: int,
    killed: str = "",
) -> None:
    """Be the process that `python WORDS` is, with the code that it finds there, and end."""
    for number, file in enumerate(files):
        if file != number:
            os.dup2(file, number)
            os.close(file)
    os.chdir(folder)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as the environment has it now
    if killed == "result":
        sys.addaudithook(_kill_at_second_result([]))
    elif killed:
        sys.addaudithook(lambda event, args: _kill(event, *args) if event == killed else None)
    status = 1
    try:
        for name in filter(sys.modules.get, OF_ENVIRONMENT):
            importlib.reload(sys.modules[name])
        if words[0] != "-P":  # as a checkpoint is reloaded: without what is there
            _find_package()
        program, *rest = words[words.index("-m" if words[0] == "-m" else "-c") + 1 :]
        if words[0] == "-m":
            sys.argv = ["-m", *rest]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            exec(program, {"__name__": "__main__"})
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _find_package() -> None:
    """Import from where this process would. Where its package is the one that the server has imported, that one stays.

    A checkpoint that is saved is reloaded in a fork.
    """
    theirs = [str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != REPOSITORY]
    # Last, as an editable install has it: Snakemake finds the plugin of the screen there.
    sys.path[:] = [*theirs, *elsewhere, str(REPOSITORY)]
    package = next(Path(path) / PACKAGE.name for path in sys.path if (Path(path) / PACKAGE.name).is_dir())
    if package != PACKAGE and _content(package) != _imported():
        ours = sys.modules["hfprune.store.keys"]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("hfprune", "tests")]:
            del sys.modules[name]
        _keep_parsed(ours, importlib.import_module("hfprune.store.keys"))
    subprocess_run, reload_run = subprocess.run, reloading(forked).run

    def run(command, *args, **options):
        reloads = command[0] == sys.executable and "-c" in command and "input" not in options  # llama.cpp's has that
        return (reload_run if reloads else subprocess_run)(command, *args, **options)

    subprocess.run = run


def _keep_parsed(ours: ModuleType, theirs: ModuleType) -> None:
    """Have digests of code use what the server has parsed, by its text, if they are made as here."""
    if Path(theirs.__file__).read_bytes() == Path(ours.__file__).read_bytes():
        theirs._parsed, theirs._defined = ours._parsed, ours._defined


def forked(words: list[object], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """As `python`, in a fork of this process."""

    def fork(files: list[int]) -> int:
        child = os.fork()
        if child == 0:
            os.umask(umask := os.umask(0))
            _become(files, [*map(str, words)], {**environment}, str(Path.cwd()), umask)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return _printed(fork)


def _kill(event: str, path: object, *args: object) -> None:
    """End this process where the event befalls a work folder, see `python`."""
    path = Path(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else Path()
    if ".work" not in path.parts or path.suffix == ".lock":
        return
    work = Path(*path.parts[: path.parts.index(".work") + 2])
    if event == "open":
        meant = args[1] & (os.O_WRONLY | os.O_RDWR) and path != work and any(work.iterdir())
    else:
        meant = path == work
    if meant:
        os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_second_result(moved: list[Path]) -> Callable[[str, tuple], None]:
    """An audit hook that ends this process where it is about to move a second result to its place."""

    def hook(event: str, args: tuple) -> None:
        path = Path(args[0]) if event == "os.rename" else Path()
        if path.parent.name.startswith(".aside-") and path.name != ".provenance":
            moved.append(path)
            if len(moved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    serve(sys.argv[1])
