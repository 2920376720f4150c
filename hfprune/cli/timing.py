"""Commands that time models and scoring on this machine."""

from pathlib import Path

from pydantic import Field

from hfprune.cli.commands import Command, Count
from hfprune.cli.results import WithMethods
from hfprune.errors import UserError
from hfprune.experiment.schema import parse
from hfprune.pruning.criteria import CRITERIA
from hfprune.stages.budget import ROUND_TO, RoundTo
from hfprune.stages.declaration import CHECKPOINTS, DType, Products, Sampling, Seed
from hfprune.stages.run import open_artifact
from hfprune.stages.score import DRAWS, ScoreParameters
from hfprune.store.artifacts import Store
from hfprune.store.results import publish


class Efficiency(WithMethods):
    """Time checkpoints side by side: prefill, decoding and peak memory."""

    words = ("efficiency",)
    examples = ("hfprune efficiency --models store/model/KEY store/prune/KEY --output efficiency.csv",)
    models: list[Path] = Field(description="checkpoints to time: artifacts' folders or manifests")
    output: Path = Field(description="csv file to write")
    rounds: Count = Field(5, description="rounds to measure")
    tokens: Count = Field(64, description="new tokens to decode")
    dtype: DType = "auto"

    def run(self) -> None:
        """Write the timings, and print them."""
        import pandas as pd

        from hfprune.evaluation.timing import time_models, timing_environment
        from hfprune.reporting.identity import described
        from hfprune.reporting.saved import saved_latency

        models = [open_artifact(path, *CHECKPOINTS) for path in self.models]
        known = described([model.key for model in models], Store(self.store), self.methods())
        folders = {model.key: model.folder for model in models}
        timed = pd.DataFrame(time_models(folders, self.dtype, self.rounds, self.tokens))
        timed = pd.concat([timed, saved_latency(timed, models, Store(self.store))])
        rows = known.merge(timed.rename(columns={"model": "key"}), on="key").assign(
            dtype=self.dtype, **timing_environment()
        )
        with publish(models) as aside:
            rows.to_csv(aside.path(self.output), index=False)
        print(rows[["stage", "method", "ratio", "task", "metric", "value", "n"]].to_string(index=False))


class ScoringCost(Sampling, Command):
    """Time the scoring of each criterion alone: seconds, peak memory and operations."""

    words = ("scoring-cost",)
    examples = (
        "hfprune scoring-cost --model store/model/KEY --text store/text/KEY --criteria entropy cross_entropy \\\n"
        "    --output scoring_cost.csv",
    )
    model: Path = Field(description="dense checkpoint: an artifact's folder or manifest")
    text: Path = Field(description="calibration text: an artifact's folder or manifest")
    criteria: list[str] = Field(description="criteria to time")
    light_cut: list[Path] = Field([], description="scores for a light first cut, for criteria that need one")
    output: Path = Field(description="csv file to write")
    rounds: Count = Field(3, description="rounds to measure")
    seed: Seed = Field(0, description="seed for the sequences, labels and random scores")
    draws: int = DRAWS
    dtype: DType = "auto"
    products: Products = "auto"

    def run(self) -> None:
        """Write the timings, and print them."""
        import pandas as pd

        from hfprune.evaluation.timing import time_scoring, timing_environment

        sampling = self.model_dump(include={"samples", "length", "seed", "draws", "dtype", "products"})
        for name in self.criteria:
            parse(ScoreParameters, sampling | {"criterion": name})
        model, text = open_artifact(self.model, *CHECKPOINTS), open_artifact(self.text, "text")
        scores = [open_artifact(path, "score") for path in self.light_cut]
        cuts = {
            score.parameters["criterion"]: score.folder
            for score in scores
            if score.manifest["inputs"]["model"] == model.key
        }
        criteria: dict[str, Path | None] = {}
        for name in self.criteria:
            needed = CRITERIA[name].light_cut
            if needed not in (None, *cuts):
                raise UserError(f"criterion {name} takes --light-cut with scores of this model by {needed}.")
            criteria[name] = needed and cuts[needed]
        rows = pd.DataFrame(time_scoring(model.folder, text.folder, criteria, **sampling, rounds=self.rounds))
        rows = rows.assign(key=model.key, dtype=self.dtype, **timing_environment())
        with publish([model, text, *scores]) as aside:
            rows.to_csv(aside.path(self.output), index=False)
        print(rows[["criterion", "light_cut", "seconds", "peak_bytes", "tokens", "flops", "n"]].to_string(index=False))


class Latency(Command):
    """Time a dense model with narrower layers: the table for `ratio_of: latency`, of this machine."""

    words = ("latency",)
    examples = ("hfprune latency --model store/model/KEY --output latency.csv",)
    model: Path = Field(description="dense checkpoint: an artifact's folder or manifest")
    output: Path = Field(description="csv file to write")
    round_to: RoundTo | None = Field(None, description=ROUND_TO)
    rounds: Count = Field(5, description="rounds to measure")
    tokens: Count = Field(32, description="new tokens to decode")
    dtype: DType = "auto"

    def run(self) -> None:
        """Write the table, and print it."""
        import pandas as pd

        from hfprune.evaluation.timing import timing_environment
        from hfprune.evaluation.width_timing import time_widths

        model = open_artifact(self.model, *CHECKPOINTS)
        shape, rows = time_widths(model.folder, self.dtype, self.round_to, self.rounds, self.tokens)
        table = pd.DataFrame(rows)
        table["share"] = table["seconds"] / table.groupby("part")["seconds"].transform("first")  # the widest
        table = table.assign(
            tokens=self.tokens, model=model.key, parameters=shape.total, dtype=self.dtype, **timing_environment()
        )
        with publish([model]) as aside:
            table.to_csv(aside.path(self.output), index=False)
        print(table[["part", "units", "seconds", "share", "n"]].to_string(index=False))


COMMANDS = (Efficiency, ScoringCost, Latency)
