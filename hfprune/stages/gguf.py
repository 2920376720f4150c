"""A checkpoint as a GGUF file, which llama.cpp has read as that checkpoint."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hfprune.stages.declaration import Input, Parameters, Stage


class GGUFParameters(Parameters):
    """Parameters of stage `gguf`."""

    type: Literal["f32", "f16", "bf16", "q8_0"] = Field("f16", description="type of the matrices in the file")


def _check(parameters: GGUFParameters, inputs: Any, run: Any) -> None:
    """Refuse to write what could not be proven."""
    from hfprune.sharing.gguf_proof import check_installed

    check_installed()


def _produce(folder: Path, inputs: Any, parameters: GGUFParameters, run: Any) -> dict[str, Any]:
    from hfprune.sharing.gguf import write_gguf
    from hfprune.sharing.gguf_identity import identity_of
    from hfprune.sharing.gguf_proof import TOLERANCES, expected, prove

    checkpoint = inputs["model"].folder
    identity = identity_of(checkpoint)
    file = folder / identity.file_name(parameters.type)
    details = write_gguf(checkpoint, file, parameters.type, identity)
    proof = prove(file, expected(checkpoint), TOLERANCES[parameters.type])
    return {"file": file.name, "type": parameters.type, **details, "proof": proof}


GGUF = Stage(
    name="gguf",
    module=__name__,
    description="Write a checkpoint as a GGUF file, and have llama.cpp read it.",
    examples=("hfprune gguf --model store/prune/KEY --type q8_0",),
    parameters=GGUFParameters,
    produce=_produce,
    inputs={"model": Input(("prune", "recover"), description="pruned or recovered checkpoint")},
    libraries=("gguf", "torch", "transformers"),
    check=_check,
    reloads_checkpoint=True,
)
