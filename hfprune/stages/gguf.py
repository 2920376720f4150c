"""A checkpoint as a GGUF file, which llama.cpp has read as that checkpoint."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hfprune.stages.declaration import Input, Parameters, Stage, outside_key
from hfprune.stages.lineage import origin

BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}  # of a value
PROOF_TOKENS = 200  # in the texts of the proof, at most


class GGUFParameters(Parameters):
    """Parameters of stage `gguf`."""

    type: Literal["f32", "f16", "bf16", "q8_0"] = Field("f16", description="type of the matrices in the file")


def _check(parameters: GGUFParameters, inputs: Any, run: Any) -> None:
    """Refuse to write what could not be proven."""
    from hfprune.sharing.llama_cpp import check_installed

    check_installed()


def _produce(folder: Path, inputs: Any, parameters: GGUFParameters, run: Any) -> dict[str, Any]:
    from hfprune.sharing.gguf import write_gguf
    from hfprune.sharing.gguf_identity import identity_of
    from hfprune.sharing.gguf_proof import TOLERANCES, expected, prove

    checkpoint = inputs["model"].folder
    identity = identity_of(checkpoint, origin(inputs["model"]))
    file = folder / identity.file_name(parameters.type)
    details = write_gguf(checkpoint, file, parameters.type, identity)
    proof = prove(file, expected(checkpoint), TOLERANCES[parameters.type])
    return {"file": file.name, "type": parameters.type, **details, "proof": proof}


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.models.loading import count_parameters, flops_per_token
    from hfprune.stages.costs import Cost

    model = estimate.models.of(job.inputs["model"])
    parameters = count_parameters(model)
    size = round(parameters * BYTES[job.settings.type])
    flops = PROOF_TOKENS * flops_per_token(model, PROOF_TOKENS)
    return Cost(flops, estimate.device.process + parameters * BYTES["f32"] + size, size)


GGUF = Stage(
    name="gguf",
    module=__name__,
    description="Write a checkpoint as a GGUF file, and have llama.cpp read it.",
    examples=("hfprune gguf --model store/prune/KEY --type q8_0",),
    parameters=GGUFParameters,
    produce=_produce,
    inputs={"model": Input(("prune", "recover", "model"), description="checkpoint")},
    libraries=("gguf", "torch", "transformers"),
    check=_check,
    gpus="spread",
    cost=_cost,
    reloads_checkpoint=True,
)
