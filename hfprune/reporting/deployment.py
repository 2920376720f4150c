"""Models as GGUF files: pruned, quantised, and both, side by side. Made from the csv of `hfprune files`."""

from pathlib import Path

import pandas as pd

from hfprune.errors import UserError
from hfprune.reporting.labels import name_of
from hfprune.reporting.statistics import MODEL, estimates, note, varying
from hfprune.reporting.typeset import Cell, Row, Sheet

LEFT_OUT = "left_out"  # the metric of a file that could not be made here
COLUMNS = ["key", *MODEL, "seed", "type", "metric", "value", "stderr", "n", "text", "device", "threads", "xllamacpp"]
TITLES = {  # of the metrics, with their scale and digits
    "bytes": ("MB", 1e-6, 1),
    "kl": ("KL (nats/token)", 1, 3),
    "perplexity": ("Perplexity", 1, 1),
    "top1_agreement": ("Top-1 agreement", 1, 3),
    "prefill_tokens_per_second": ("Prefill (tokens/s)", 1, 0),
    "decode_tokens_per_second": ("Decode (tokens/s)", 1, 0),
}
INSTEAD = "Dense, no larger and nearer"


def read_files(path: Path) -> pd.DataFrame:
    """The csv of `hfprune files`.

    Raises:
        UserError: it is missing, or not one.
    """
    try:
        files = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if missing := [column for column in COLUMNS if column not in files]:
        raise UserError(f"{path}: not a csv of `hfprune files`: it lacks the columns {', '.join(missing)}.")
    return files


def by_file(files: pd.DataFrame) -> pd.DataFrame:
    """A row for each file.

    Args:
        files: see `read_files`.

    Returns:
        Columns of `MODEL`; seeds; `label`, the model's name; `type`; for each of `TITLES` the value, and both ends of
        its interval under the same name with " low" and " high".
    """
    measured = files[files["metric"] != LEFT_OUT]
    values = estimates(measured.assign(group="fidelity", task=measured["type"]))
    differing, rows = varying(values), []
    for _, metrics in values.groupby([*MODEL, "task"], dropna=False, sort=False):
        first = metrics.iloc[0]
        removed = f", {first['ratio']:.0%}" if first["ratio"] else ""
        row = first[[*MODEL, "seeds"]].to_dict()
        row |= {"label": f"{name_of(first, differing)}{removed}", "type": first["task"].upper()}
        for metric in metrics.itertuples():
            name = metric.metric
            row |= {name: metric.value, f"{name} low": metric.low, f"{name} high": metric.high}
        rows.append(row)
    return pd.DataFrame(rows)


def instead(file: pd.Series, table: pd.DataFrame) -> str:
    """The type in which the dense model is no larger than a pruned file, and nearest to itself: nearer than that file.

    Args:
        file: a row of `table`.
        table: see `by_file`.

    Returns:
        The type; "none" if there is no such type; "" of the dense model itself, and if it is not in the table.
    """
    dense = table[table["stage"] == "dense"]
    if dense.empty or file["stage"] == "dense":
        return ""
    nearer = dense[(dense["bytes"] <= file["bytes"]) & (dense["kl"] < file["kl"])]
    return nearer.sort_values("kl").iloc[0]["type"] if len(nearer) else "none"


def sheet(files: pd.DataFrame) -> Sheet:
    """The table: a row for each file.

    Args:
        files: see `read_files`.
    """
    table, first = by_file(files), files.iloc[0]
    rows = []
    for _, file in table.iterrows():
        cells = {}
        for metric, (title, scale, _) in TITLES.items():
            cells[title] = Cell(*(scale * file[f"{metric}{end}"] for end in ("", " low", " high")))
        rows.append(Row([file["label"], file["type"], instead(file, table)], cells))
    rounds = files[files["metric"] == "decode_tokens_per_second"]["n"].iloc[0]
    notes = [
        f"{INSTEAD}: a type in which the dense model takes no more bytes and is nearer to itself than this file. Where "
        "one stands, do not prune for the sake of size.",
        f"Speed: llama.cpp (xllamacpp {first['xllamacpp']}) on {first['device']}, {first['threads']} threads, one "
        f"sequence, medians of {rounds:.0f} rounds in which the files ran in turn. Compare rates of one run alone.",
        note(table),
    ]
    if left_out := list(dict.fromkeys(files[files["metric"] == LEFT_OUT]["type"])):
        names = ", ".join(map(str.upper, left_out))
        notes.append(f"Left out, for want of llama.cpp's quantizer on the PATH: {names}. The log has the commands.")
    return Sheet(
        f"Pruned, quantised, and both: GGUF files against the dense model, on {first['text']}.",
        ["Model", "Type", INSTEAD],
        {title: digits for title, _, digits in TITLES.values()},
        rows,
        notes,
    )
