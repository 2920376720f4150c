"""Jobs of workflows in tests need not import torch anew: they fork from a process that has imported the libraries.

A checkout holds `CLIENT` as sitecustomize.py, which each `python -m hfprune` of its jobs runs first. It sends its
words, environment, folder and standard files to the server and waits. The server forks, and the fork does with the
checkout's own code what the job would have done. A signal to the job reaches the fork; if the job is killed, so is the
fork.
"""

import functools
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

from tests.forks import PRELOADED, forked, reload, reloading

REPOSITORY = Path(__file__).parent.parent
CLIENT = """\
import os, sys

if sys.orig_argv[1:3] == ["-m", "hfprune"] and sys.orig_argv[3:4] != ["on-gpus"]:
    import json, signal, socket

    server = socket.socket(socket.AF_UNIX)
    server.connect({address!r})
    umask = os.umask(0)
    os.umask(umask)
    request = {{"words": sys.orig_argv[3:], "environment": dict(os.environ), "folder": os.getcwd(), "umask": umask}}
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


def serve(address: str) -> None:
    """Fork for each job, until stdin ends."""
    for name in PRELOADED:
        __import__(name)
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
    """What `python -m hfprune WORDS` does there, with the code that it finds there. Ends the process."""
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
    sys.path[:] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep), *elsewhere]
    subprocess_run, reload_run = subprocess.run, reloading(partial(forked, reload)).run

    def run(command, *args, **options):
        own = command[0] == sys.executable and "-c" in command  # a checkpoint is reloaded
        return (reload_run if own else subprocess_run)(command, *args, **options)

    subprocess.run = run
    sys.argv = ["-m", *words]
    status = 1
    try:
        runpy.run_module("hfprune", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
