"""Where a model comes from."""

import json
from typing import Any

from hfprune.store.filenames import PRUNING


def origin(model: Any) -> dict[str, Any]:
    """The source and licence of a model: what was asked for, and what its download found. No local path.

    Args:
        model: an artifact of stage `model` or `prune`.
    """
    if model.manifest["stage"] == "prune":
        return json.loads((model.folder / PRUNING).read_text(encoding="utf-8"))["source"]
    known = model.parameters | model.manifest["details"]
    return {name: value for name, value in known.items() if name != "path"}
