"""The stages: which code each runs, and how its artifacts get their keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfprune.data.download import content_digest
from hfprune.store.keys import Recipe, code_digest, versions


@dataclass(frozen=True)
class Stage:
    """A kind of artifact.

    Attributes:
        module: the module that makes it; its code, and that of what it imports, is part of the key.
        libraries: those whose arithmetic its content depends on; their versions are part of the key.
    """

    module: str
    libraries: tuple[str, ...] = ()


STAGES = {
    "wheel": Stage("hfprune.data.download"),
    "model": Stage("hfprune.data.download", ("gguf",)),
    "text": Stage("hfprune.data.download"),
    "task": Stage("hfprune.data.lm_eval_tasks", ("lm_eval",)),
    "shard": Stage("hfprune.pruning.scoring", ("torch", "transformers")),
    "score": Stage("hfprune.pruning.scoring", ("torch", "transformers")),
    "prune": Stage("hfprune.pruning.surgery", ("torch", "transformers")),
    "recover": Stage("hfprune.recovery.training", ("torch", "transformers", "peft", "accelerate")),
    "reference": Stage("hfprune.evaluation.fidelity", ("torch", "transformers")),
    "measure": Stage("hfprune.evaluation.fidelity", ("torch", "transformers")),
    "evaluate-task": Stage("hfprune.evaluation.lm_eval_runner", ("torch", "transformers", "lm_eval")),
    "evaluate": Stage("hfprune.evaluation.lm_eval_runner", ("torch", "transformers", "lm_eval")),
}
DOWNLOADS = ("model", "text", "task")  # by `hfprune download`


def recipe(stage: str, parameters: Mapping[str, Any], **inputs: str) -> Recipe:
    """The recipe of a stage's artifact from its parameters and the keys of its inputs."""
    found = STAGES[stage]
    return Recipe(stage, dict(parameters), inputs, code_digest(found.module), versions(found.libraries))


def source_parameters(source: Mapping[str, Any]) -> dict[str, Any]:
    """What of a source (`config.Source.origin`) determines its content: of a path, what is in it, not where it is."""
    if "path" not in source:
        return dict(source)
    return {"content": content_digest(source["path"])}
