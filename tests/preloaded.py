"""Snakemake and its jobs need not import their libraries anew: they fork from a process that has imported them.

A checkout holds `CLIENT` as sitecustomize.py, which each `python -m hfprune` of its jobs runs first. It sends its
words, environment, folder and standard files to the server and waits. The server forks, and the fork does with the
checkout's own code what the job would have done. A signal to the job reaches the fork; if the job is killed, so is the
fork. `snakemake` has the server run Snakemake itself in the same way.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType

from hfprune.store import keys
from tests.forks import OF_ENVIRONMENT, PRELOADED, forked, reload, reloading

REPOSITORY = Path(__file__).parent.parent
DIGESTED = ("hfprune.cli", "hfprune.reporting.paper_sheets", "hfprune.reporting.samples")  # they import all modules
CLIENT = """\
import os, sys

if sys.orig_argv[1:3] == ["-m", "hfprune"] and sys.orig_argv[3:4] != ["on-gpus"]:
    import json, signal, socket

    server = socket.socket(socket.AF_UNIX)
    server.connect({address!r})
    umask = os.umask(0)
    os.umask(umask)
    request = {{"words": sys.orig_argv[2:], "environment": dict(os.environ), "folder": os.getcwd(), "umask": umask}}
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
    status = int.from_bytes(server.recv(8), "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
"""


@functools.cache
def client() -> str:
    """`CLIENT` for the server of this test process, which is started now and ends with it."""
    folder = tempfile.TemporaryDirectory()
    address = f"{folder.name}/socket"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.preloaded", address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=REPOSITORY)
    process.stdout.readline()  # it listens
    client.server = folder, process  # the folder and the server's stdin stay open as long as this process lives
    return CLIENT.format(address=address)


def snakemake(words: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Run `snakemake` there: its exit status, and what was on the screen."""
    client()
    os.umask(umask := os.umask(0))
    request = {"words": ["snakemake", *words], "environment": environment, "folder": str(folder), "umask": umask}
    content = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as server, tempfile.TemporaryFile("w+") as screen:
        server.connect(f"{client.server[0].name}/socket")
        socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, screen.fileno(), screen.fileno()])
        server.sendall(content)
        status = int.from_bytes(server.recv(8), "big", signed=True)
        screen.seek(0)
        return status, screen.read()


def serve(address: str) -> None:
    """Fork for each job, until stdin ends."""
    for name in (*PRELOADED, "snakemake.cli"):
        __import__(name)
    for name in DIGESTED:
        keys.code_digest(name)
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
            attend(connection)
            os._exit(0)
        connection.close()


def attend(connection: socket.socket) -> None:
    """Run one job in a process of its own, pass signals to it, and send its exit status."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += connection.recv(2**16)
    job = os.fork()
    if job == 0:
        connection.close()
        work(files, **json.loads(content))
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


def work(files: list[int], words: list[str], environment: dict[str, str], folder: str, umask: int) -> None:
    """What `python -m WORDS` does there, with the code that it finds there. Ends the process."""
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    for name in [name for name in sys.modules if name.partition(".")[0] in ("hfprune", "tests")]:
        del sys.modules[name]
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != REPOSITORY]
    # Last, as an editable install has it: Snakemake finds the plugin of the screen there.
    sys.path[:] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep), *elsewhere, str(REPOSITORY)]
    subprocess_run, reload_run = subprocess.run, reloading(partial(forked, reload)).run

    def run(command, *args, **options):
        own = command[0] == sys.executable and "-c" in command  # a checkpoint is reloaded
        return (reload_run if own else subprocess_run)(command, *args, **options)

    subprocess.run = run
    sys.argv = ["-m", *words[1:]]
    status = 1
    try:
        for name in OF_ENVIRONMENT:
            importlib.reload(sys.modules[name])
        keep_parsed(importlib.import_module("hfprune.store.keys"))
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def keep_parsed(theirs: ModuleType) -> None:
    """Have a checkout's digests of code use what the server has parsed, by its text, if they are made as here."""
    if Path(theirs.__file__).read_bytes() == Path(keys.__file__).read_bytes():
        theirs._parsed, theirs._defined = keys._parsed, keys._defined


if __name__ == "__main__":
    serve(sys.argv[1])
