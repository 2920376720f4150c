"""Several texts as one."""

import json
from collections.abc import Sequence
from pathlib import Path

from hfprune.data.readers import read_records
from hfprune.errors import UserError
from hfprune.store.filenames import DOCUMENTS


def mix(folder: Path, texts: Sequence[Path]) -> int:
    """Write the documents of all texts, one text after the other. Each document says which text it is of.

    Args:
        folder: where to write.
        texts: folders of downloaded texts.

    Returns:
        The number of documents.

    Raises:
        UserError: a text has no documents, but instructions or random tokens.
    """
    mixed = [record | {"source": number} for number, text in enumerate(texts) for record in read_records(text)]
    for record in mixed:
        if "text" not in record:
            raise UserError(f"{texts[record['source']] / DOCUMENTS}: no plain documents, and only such can be mixed.")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in mixed]
    (folder / DOCUMENTS).write_text("".join(lines), encoding="utf-8")
    return len(mixed)
