"""Commands that compare models as GGUF files: pruned, quantised, and both."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import Field

from hfprune.cli.commands import Command, Count
from hfprune.cli.results import TablesAndFigures, WithTexts, results
from hfprune.errors import UserError
from hfprune.sharing import quantizer
from hfprune.stages.run import open_artifact
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.results import publish

if TYPE_CHECKING:  # a command's help must not pay for pandas
    import pandas as pd


class Files(WithTexts):
    """Measure GGUF files in llama.cpp: size, fidelity to the dense model, speed of prefill and decoding."""

    words = ("files",)
    examples = (
        "hfprune files --gguf store/gguf/*/ --reference store/reference/KEY --types q8_0 q4_k_m --output deploy.csv",
    )
    gguf: list[Path] = Field(description="artifacts of gguf; K-quants are made from those of type f16")
    reference: Path = Field(description="the dense model's predictions: an artifact of reference")
    types: list[quantizer.FileType] = Field(description="types to measure")
    output: Path = Field(description="csv file to write")
    samples: Count | None = Field(None, description="sequences to compare on, the reference's first (default: all)")
    rounds: Count = Field(5, description="rounds of timing; the median counts")
    tokens: Count = Field(64, description="new tokens to decode")

    def run(self) -> None:
        """Write what was measured, and print it."""
        import torch

        from hfprune.evaluation.timing import timing_environment
        from hfprune.reporting.deployment import LEFT_OUT
        from hfprune.sharing.gguf_measures import fidelity, speeds
        from hfprune.sharing.llama_cpp import check_installed

        check_installed()
        reference = open_artifact(self.reference, "reference")
        artifacts = [open_artifact(path, "gguf") for path in self.gguf]
        threads, rows = torch.get_num_threads(), []
        with TemporaryDirectory() as scratch:
            files = self._files(artifacts, Path(scratch))
            if not (there := {name: file for name, file in files.items() if file}):
                raise UserError(f"--types {' '.join(self.types)}: --gguf has no file of a type that can be had here.")
            rates = speeds(there, self.rounds, self.tokens, threads)
            for (key, kind), file in files.items():
                about = {"key": key, "type": kind}
                if file is None:
                    rows.append(about | {"metric": LEFT_OUT})
                    continue
                near = fidelity(file, reference.folder, self.samples, threads)
                rows += [about | {"metric": name, **near[name]} for name in ("kl", "perplexity", "top1_agreement")]
                speed = {f"{name}_tokens_per_second": rates[key, kind][name] for name in ("prefill", "decode")}
                rows += [about | {"metric": name, "value": value, "n": self.rounds} for name, value in speed.items()]
                rows.append(about | {"metric": "bytes", "value": file.stat().st_size, "n": 1})
        environment = timing_environment() | {"xllamacpp": next(iter(rates.values()))["version"]}
        table = self._described(rows, reference).assign(**environment)
        with publish([reference, *artifacts]) as aside:
            table.to_csv(aside.path(self.output), index=False)
        print(table[["stage", "method", "ratio", "type", "metric", "value", "n"]].to_string(index=False))

    def _files(self, artifacts: list[Artifact], scratch: Path) -> dict[tuple[str, str], Path | None]:
        """By the model's key and type, the files of the types asked for; None if there is no quantizer for it.

        K-quants are written into `scratch`.
        """
        files: dict[tuple[str, str], Path | None] = {}
        for artifact in artifacts:
            details, model = artifact.manifest["details"], artifact.manifest["inputs"]["model"]
            file = artifact.folder / details["file"]
            if details["type"] in self.types:
                files[model, details["type"]] = file
            for kind in set(self.types) & set(quantizer.TYPES) if details["type"] == quantizer.SOURCE else ():
                output = scratch / model / quantizer.name(file.name, kind)
                if quantizer.is_installed():
                    output.parent.mkdir(exist_ok=True)
                    quantizer.quantise(file, output, kind)
                else:
                    words = " ".join(quantizer.command(file, Path(output.name), kind))
                    print(f"left out, for want of llama.cpp's quantizer on the PATH:\n    {words}", file=sys.stderr)
                files[model, kind] = output if output.exists() else None
        order = {kind: number for number, kind in enumerate(self.types)}
        models = list(dict.fromkeys(model for model, _ in files))
        return dict(sorted(files.items(), key=lambda item: (models.index(item[0][0]), order[item[0][1]])))

    def _described(self, rows: list[dict], reference: Artifact) -> "pd.DataFrame":
        """The rows, with the columns that say which model it is, and on which text."""
        import pandas as pd

        from hfprune.reporting.identity import described, text_names

        store, names, text = Store(self.store), self.names(), reference.manifest["inputs"]["text"]
        measured = pd.DataFrame(rows).assign(text=(text_names([text], store) | names.texts)[text])
        return described(list(measured["key"].unique()), store, names.methods).merge(measured, on="key")


class Deploy(Command):
    """Show fidelity against size and speed of pruned models, quantised ones, and both: a table and a figure."""

    words = ("deploy",)
    examples = ("hfprune deploy --files results/default/deploy.csv --output results/default",)
    files: Path = Field(description="csv from `hfprune files`")
    output: TablesAndFigures

    def run(self) -> None:
        """Write the table and draw the figure."""
        from hfprune.reporting.deployment import read_files, sheet
        from hfprune.reporting.figures import draw_deployment

        with results([self.files]) as aside:
            files = read_files(self.files)
            sheet(files).write(aside.folder(self.output / "tables"), "deploy")
            draw_deployment(files, aside.folder(self.output / "figures"))


COMMANDS = (Files, Deploy)
