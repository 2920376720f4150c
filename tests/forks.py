"""Commands of `hfprune`, each in a process of its own that need not import torch anew: they fork from one that has."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = (
    "hfprune.cli", "hfprune.sources", "hfprune.tasks", "hfprune.scoring", "hfprune.surgery", "hfprune.recovery",
    "hfprune.fidelity", "hfprune.evaluation", "hfprune.card", "datasets",
)  # fmt: skip


class Forks:
    """The process that the others fork from."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )

    def __call__(self, *words, killed: str = "") -> tuple[int, str]:
        """Run a command: its exit status, below 0 for a signal, and what it printed.

        With `killed`, the name of an audit event, SIGKILL ends it: "open", when it opens a further file in its work
        folder to write; or "os.rename", when it has written all and moves the folder to its place.
        """
        self.process.stdin.write(json.dumps([killed, *map(str, words)]) + "\n")
        self.process.stdin.flush()
        status, output = json.loads(self.process.stdout.readline())
        return status, output

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Fork for each line on stdin, and print what came of it."""
    answers = os.fdopen(os.dup(1), "w")
    for name in PRELOADED:
        __import__(name)
    for line in sys.stdin:
        killed, *words = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                for descriptor in (1, 2):
                    os.dup2(output.fileno(), descriptor)
                run(killed, words)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([status, output.read()]), file=answers, flush=True)


def run(killed: str, words: list[str]) -> None:
    """In the child: one command."""
    if killed:
        sys.addaudithook(lambda event, args: kill(event, *args) if event == killed else None)
    status = 1
    try:
        from hfprune.cli import main

        sys.argv = ["hfprune", *words]
        status = main(words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill(event: str, path: object, *args: object) -> None:
    """End this process where the event befalls a work folder, see `Forks`."""
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


if __name__ == "__main__":
    serve()
