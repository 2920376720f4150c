"""The source of a model."""

import json
from typing import Any

from hfprune.store.filenames import PRUNING, RECOVERY


def origin(model: Any) -> dict[str, Any]:
    """The source and licence of a model, from its config and its download. Local paths are left out.

    Args:
        model: an artifact of stage `model`, `prune` or `recover`.
    """
    for name in (RECOVERY, PRUNING):  # the later stage first
        if model.manifest["stage"] != "model" and (model.folder / name).exists():
            return json.loads((model.folder / name).read_text(encoding="utf-8"))["source"]
    known = model.parameters | model.manifest["details"]
    return {name: value for name, value in known.items() if name != "path"}
