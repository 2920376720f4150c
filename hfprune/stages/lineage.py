"""Where a model comes from."""

import json
from typing import Any

from hfprune.store.filenames import PRUNING, RECOVERY


def origin(model: Any) -> dict[str, Any]:
    """The source and licence of a model: what was asked for, and what its download found. No local path.

    Args:
        model: an artifact of stage `model`, `prune` or `recover`.
    """
    for name in (RECOVERY, PRUNING):  # the last stage's first
        if model.manifest["stage"] != "model" and (model.folder / name).exists():
            return json.loads((model.folder / name).read_text(encoding="utf-8"))["source"]
    known = model.parameters | model.manifest["details"]
    return {name: value for name, value in known.items() if name != "path"}
