"""Commands of `hfprune`, each in a process of its own that need not import torch anew: they fork from one that has."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

PRELOADED = (
    "hfprune.cli", "hfprune.data.download", "hfprune.data.lm_eval_tasks", "hfprune.pruning.scoring",
    "hfprune.pruning.surgery", "hfprune.recovery.training", "hfprune.evaluation.fidelity",
    "hfprune.evaluation.lm_eval_runner", "hfprune.sharing.model_card", "datasets", "huggingface_hub.constants",
    "hfprune.reporting.agreement", "hfprune.reporting.comparison", "hfprune.reporting.curves",
    "hfprune.reporting.figures", "hfprune.reporting.overview", "hfprune.reporting.pages",
    "hfprune.reporting.paper_sheets", "lm_eval.evaluator", "lm_eval.models.huggingface",
    "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_svg", "fontTools.subset",
)  # fmt: skip
OF_ENVIRONMENT = ("huggingface_hub.constants", "datasets.config")  # where the hub is, and what is kept of it


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

    def __call__(self, *words, killed: str = "", **environment: str) -> tuple[int, str, str]:
        """Run a command: its exit status, below 0 for a signal, and what it printed on stdout and on stderr.

        It has this process's environment as it is now, and `environment`. Of what libraries have read of theirs when
        they were imported, the modules `OF_ENVIRONMENT` read it again.

        With `killed`, the name of an audit event, SIGKILL ends it: "open", when it opens a further file in its work
        folder to write; "os.rename", when it has written all and moves the folder to its place; or "result", when it
        has moved the first of several results to its place.
        """
        request = {
            "killed": killed,
            "words": [*map(str, words)],
            "environment": os.environ | environment,
            "folder": str(Path.cwd()),
        }
        return self.ask(**request)

    def ask(self, **request: object) -> tuple[int, str, str]:
        """Have the process fork for a request, of which there are `run` and `reload`."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Fork for each line on stdin, and print what came of it."""
    answers = os.fdopen(os.dup(1), "w")
    for name in PRELOADED:
        __import__(name)
    sys.modules["hfprune.store.keys"].code_digest("hfprune.cli")
    gc.freeze()  # no fork looks through all these objects for garbage
    for line in sys.stdin:
        request = json.loads(line)
        action = reload if "command" in request else run
        print(json.dumps(forked(action, **request)), file=answers, flush=True)


def forked(action: Callable[..., int], **given: object) -> tuple[int, str, str]:
    """Call `action` in a process of its own; its exit status, and what it printed on stdout and on stderr."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            status = 1
            try:
                status = action(**given)
            except SystemExit as left:
                status = left.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        errors.seek(0)
        return status, output.read(), errors.read()


def run(killed: str, words: list[str], environment: dict[str, str], folder: str) -> int:
    """One command."""
    from hfprune.cli import main
    from hfprune.models import checkpoint

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as the environment has it now
    for name in OF_ENVIRONMENT:
        importlib.reload(sys.modules[name])
    if killed == "result":
        sys.addaudithook(kill_at_second_result([]))
    elif killed:
        sys.addaudithook(lambda event, args: kill(event, *args) if event == killed else None)
    checkpoint.subprocess = reloading(partial(forked, reload))
    sys.argv = ["hfprune", *words]
    return main(words)


def reloading(ask: Callable[..., tuple[int, str, str]]) -> SimpleNamespace:
    """What stands for `subprocess` where a checkpoint is reloaded; test_checkpoint.py has the real one."""

    def run(command: list, env: dict[str, str], **options: object) -> SimpleNamespace:
        status, output, errors = ask(command=[*map(str, command)], environment=env)
        return SimpleNamespace(returncode=status, stdout=output, stderr=errors)

    return SimpleNamespace(run=run)


def reload(command: list[str], environment: dict[str, str]) -> int:
    """What `python -c` does with the code and the words after it."""
    os.environ.clear()
    os.environ.update(environment)
    code, *words = command[command.index("-c") + 1 :]
    sys.argv = ["-c", *words]
    exec(code, {})
    return 0


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


def kill_at_second_result(moved: list[Path]) -> Callable[[str, tuple], None]:
    """An audit hook that ends this process where it is about to move a second result to its place."""

    def hook(event: str, args: tuple) -> None:
        path = Path(args[0]) if event == "os.rename" else Path()
        if path.parent.name.startswith(".aside-") and path.name != ".provenance":
            moved.append(path)
            if len(moved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    serve()
