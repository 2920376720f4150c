"""The paper's tables: which models they compare, what is best, what is published and what is ours."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.reporting.figures import against_each_other, kept_widths, pareto
from hfprune.reporting.metrics import COLUMNS
from hfprune.reporting.paper_sheets import (
    estimates,
    further_sheet,
    model_sheet,
    read_published,
    read_timings,
    scoring_sheet,
    select,
    timing_sheet,
)
from hfprune.reporting.paper_tables import TABLES, compared
from hfprune.reporting.statistics import MODEL
from hfprune.reporting.typeset import Cell, Row, Sheet
from tests.test_config import changed

PUBLISHED = Path(__file__).parents[1] / "results" / "published"


def models(experiment, methods, ratios, **recovery):
    asked = experiment | {"methods": methods, "ratios": ratios, "recovery": recovery}
    return Plan(parse(Experiment, changed(asked, "calibration.seeds", [0, 1]), "test")).models


def chosen(table, every, tasks):
    shown = compared(table, [model.setting for model in every], tasks)
    return [model for model, is_shown in zip(every, shown, strict=True) if is_shown]


def named(found):
    return [(each.criterion, each.cut and (each.cut.structure, each.cut.refit), each.recovery) for each in found]


def test_each_table_asks_only_for_the_models_that_it_compares(experiment):
    bias = {"like": "HFPrune", "refit": "bias", "ratios": [0.2]}
    methods = [
        "HFPrune",
        "LLM-Pruner",
        {"bias": bias},
        {"bias + attention": bias | {"structure": "mlp+attention"}},
        {"HFPrune": {"ratios": [0.2], "recoveries": ["lora"]}},
    ]
    every = models(experiment, methods, [0.1, 0.2], lora={"text": "calibration"})
    assert chosen("table1", every, True) == chosen("table2", every, True) == every
    dense = (None, None, "none")
    criteria = [(name, ("mlp", "none"), "none") for name in ("entropy", "cross_entropy")] * 2
    for table in ("table6", "table7"):
        found = named(chosen(table, every, True))
        assert found[0] == dense
        assert sorted(found[1:]) == sorted(criteria * 2), "both seeds, nothing refitted or trained"
    structures = [("entropy", (name, "bias"), "none") for name in ("mlp", "mlp+attention")]
    assert sorted(named(chosen("table8", every, True))[1:]) == sorted(structures * 2)


def test_criteria_are_compared_under_one_refit_too(experiment):
    methods = [f"{name} + {refit}" for refit in ("none", "bias") for name in ("HFPrune", "LLM-Pruner")]
    asked = [{name: {"like": name.split(" + ")[0], "refit": name.split(" + ")[1]}} for name in methods]
    alone = {"Wanda + least_squares": {"like": "Wanda-sp", "refit": "least_squares"}}
    every = models(experiment, [*asked, alone], [0.2])
    criteria = [(name, ("mlp", refit), "none") for refit in ("none", "bias") for name in ("entropy", "cross_entropy")]
    for table in ("table6", "table7"):
        assert sorted(named(chosen(table, every, True))[1:]) == sorted(criteria * 2)


@pytest.mark.parametrize("table", ["table6", "table7", "table8"])
def test_a_table_that_the_experiment_cannot_fill_says_what_to_write(table, experiment):
    every = models(experiment, ["HFPrune", {"bias": {"like": "HFPrune", "refit": "bias"}}], [0.1, 0.2])
    with pytest.raises(UserError, match=f"{table} compares .*(criteria|structures)") as refused:
        chosen(table, every, True)
    assert "methods" in str(refused.value) or "criteria" in str(refused.value)


def test_a_table_of_accuracy_needs_tasks(experiment):
    every = models(experiment, ["HFPrune", "Wanda-sp"], [0.1])
    assert chosen("table7", every, False)
    for table in set(TABLES) - {"table7"}:
        with pytest.raises(UserError, match=r"evaluation\.tasks"):
            chosen(table, every, False)


def documents(**accuracy):
    """Of the dense model and of criteria at 20 %: right answers in 400 documents of two tasks, and KL of 40 texts."""
    rng = np.random.default_rng(0)
    rows = []
    for name, share in {"none": 0.8, **accuracy}.items():
        dense = name == "none"
        model = {"model": "m", "stage": "dense" if dense else "pruned", "criterion": name, "ratio": 0 if dense else 0.2}
        model["method"] = "dense" if dense else name
        model |= dict.fromkeys(("allocation", "refit", "structure", "recovery", "parent"), "none")
        about = model | {"parent": "none", "seed": np.nan if dense else 0}
        for task in ("boolq", "crows_pairs_english"):
            right = (rng.permutation(400) < 400 * share).astype(float)
            rows += [
                about | {"group": "task", "task": task, "metric": "acc", "document": i, "value": value}
                for i, value in enumerate(right)
            ]
        for text in ("C4", "news"):
            rows += [
                about | {"group": "fidelity", "task": text, "metric": metric, "document": i, "value": value}
                for metric in ("kl", "js")
                for i, value in enumerate((1 - share) * (1 + 0.1 * rng.random(40)) * (not dense))
            ]
    return pd.DataFrame(rows)[[*MODEL, "seed", "group", "task", "metric", "document", "value"]]


def test_the_best_is_marked_and_what_cannot_be_told_from_it():
    found = estimates(documents(entropy=0.6, cross_entropy=0.59, random=0.3)).set_index(["criterion", "text", "metric"])
    assert found.loc[("entropy", "", "mean"), "value"] == pytest.approx(0.6)
    low, high = found.loc[("entropy", "", "mean"), ["low", "high"]]
    half = 1.96 * np.sqrt(0.6 * 0.4 / 400 / 2)
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.006)
    marks = {
        name: tuple(found.loc[(name, "", "mean"), ["best", "tied"]]) for name in ("entropy", "cross_entropy", "random")
    }
    assert marks == {"entropy": (True, False), "cross_entropy": (False, True), "random": (False, False)}
    assert found.loc[("entropy", "C4", "kl"), "best"], "less divergence is better"
    assert not found.loc["none"][["best", "tied"]].any(axis=None), "the dense model does not compete"
    assert ("entropy", "", "mean_without_crows") in found.index


def cells(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_published_rows_stand_below_ours_and_are_marked(tmp_path):
    found = estimates(documents(entropy=0.6, cross_entropy=0.59))
    made = model_sheet("table6", found, PUBLISHED / "table6.csv")
    for path in made.write(tmp_path, "table6"):
        assert path.exists()
    rows = cells(tmp_path / "table6.csv")
    assert [(row["Removed (%)"], row["Method"], row["source"]) for row in rows] == [
        ("0", "dense", "here"),
        ("20", "entropy", "here"),
        ("20", "cross_entropy", "here"),
        ("20", "entropy, Llama-2-7B, published", "published"),
        ("20", "cross_entropy, Llama-2-7B, published", "published"),
        ("20", "self_distillation, Llama-2-7B, published", "published"),
    ], "those at 30 % have no rows of ours to stand beside"
    assert float(rows[1]["Mean (%)"]) == pytest.approx(60)
    assert [row["Mean (%)"] for row in rows[3:]] == ["53.1", "52.6", "51.9"]
    assert rows[3]["Mean (%) low"] == "", "nobody published an interval"
    printed = (tmp_path / "table6.md").read_text()
    assert "| 20 | entropy | **60.0** ±" in printed
    assert "| *20* | *entropy, Llama-2-7B, published* | 53.1 |  |" in printed
    assert "second-hand" in printed
    tex = (tmp_path / "table6.tex").read_text()
    assert r"20 & cross\_entropy & 59.0$^\approx$ $\pm$" in tex
    assert tex.count(r"\midrule") == 2
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 1


def test_fidelity_has_rows_for_each_text_and_the_published_one_its_own(tmp_path):
    found = estimates(documents(entropy=0.6, cross_entropy=0.59))
    list(model_sheet("table7", found, PUBLISHED / "table7.csv").write(tmp_path, "table7"))
    rows = [
        (row["Removed (%)"], row["Text"], row["Method"].split(",")[0], row["JS distance"])
        for row in cells(tmp_path / "table7.csv")
    ]
    assert [row[:3] for row in rows] == [
        ("0", "C4", "dense"), ("0", "news", "dense"),
        ("20", "C4", "entropy"), ("20", "C4", "cross_entropy"), ("20", "C4", "entropy"), ("20", "C4", "cross_entropy"),
        ("20", "news", "entropy"), ("20", "news", "cross_entropy"),
    ]  # fmt: skip
    assert [row[3] for row in rows[4:6]] == ["0.241", "0.243"]
    summary = model_sheet("table8", found, tmp_path / "none.csv")
    assert "KL (nats/token)" in summary.digits
    assert len(summary.rows) == 3, "elsewhere only the first text counts"


def test_every_published_value_is_a_number_with_a_source():
    for path in PUBLISHED.glob("*.csv"):
        found = read_published(path)
        assert len(found) and found["value"].notna().all() and (found["source"] != "").all(), path
        shown = TABLES.get(path.stem)
        assert shown is None or found["ratio"].notna().all()
    table = read_published(PUBLISHED / "table1.csv")
    for (ratio, method), rows in table.groupby(["ratio", "method"]):
        values = rows.set_index("metric")["value"]
        if "mean" in values and (ratio, method) != (0.2, "LoRAPrune"):  # its erratum
            assert values.drop("mean").mean() == pytest.approx(values["mean"], abs=0.06)


def test_a_file_that_holds_no_published_values_is_refused(tmp_path):
    (tmp_path / "table1.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not published values"):
        read_published(tmp_path / "table1.csv")


def test_further_models_stand_in_one_table(tmp_path):
    rows = []
    for model in ("a", "b"):
        for stage, criterion, ratio, value in (("dense", "none", 0.0, 0.5), ("pruned", "entropy", 0.2, 0.4)):
            about = {
                "model": model,
                "stage": stage,
                "criterion": criterion,
                "ratio": ratio,
                "recovery": "none",
                "parent": "none",
            }
            about |= {"method": "dense" if criterion == "none" else criterion, "key": f"{model}{ratio}"}
            for task in ("boolq", "piqa"):
                rows.append(
                    about | {"group": "task", "task": task, "metric": "acc", "value": value, "stderr": 0.01, "n": 2500}
                )
    metrics = pd.DataFrame(rows, columns=COLUMNS).assign(
        allocation="none", refit="none", structure="none", parent="none", parameters=1, ratio_achieved=0
    )
    sources = [tmp_path / f"{model}.csv" for model in ("a", "b", "again")]
    for path in sources:  # the last has the first one's models too
        metrics[metrics["model"] == path.stem.replace("again", "a")].to_csv(path, index=False)
    list(further_sheet(sources, PUBLISHED / "table3.csv").write(tmp_path, "table3"))
    found = cells(tmp_path / "table3.csv")
    assert [(row["Model"], row["Removed (%)"], float(row["Mean (%)"])) for row in found] == [
        ("a", "0", 50), ("a", "20", 40), ("b", "0", 50), ("b", "20", 40),
    ]  # fmt: skip
    assert float(found[0]["Mean (%) high"]) == pytest.approx(50 + 1.96 / np.sqrt(2), abs=0.01)
    assert "Experiment" not in found[0]
    metrics[metrics["task"] == "boolq"].to_csv(sources[2], index=False)
    with pytest.raises(UserError, match="the same tasks in each"):
        further_sheet(sources, PUBLISHED / "table3.csv")


def trained(name, seeds, value, rate):
    """Task rows of an experiment: the dense model, and one cut and trained at a learning rate that no name says."""
    about = {"model": "m", "group": "task", "metric": "acc", "stderr": 0.01, "n": 99, "parameters": 9}
    about |= dict.fromkeys(("allocation", "refit", "structure", "parent"), "none")
    models = [
        {"stage": "dense", "criterion": "none", "ratio": 0.0, "recovery": "none", "key": "dense", "value": 0.5},
        *(
            {"stage": "recovered", "criterion": "entropy", "ratio": 0.2, "recovery": "lora", "value": value}
            | {"seed": seed, "key": f"{rate} {seed}"}
            for seed in seeds
        ),
    ]
    for model in models:
        model["method"] = "dense" if model["stage"] == "dense" else model["criterion"]
    found = [about | model | {"task": task, "ratio_achieved": model["ratio"]} for model in models for task in "ab"]
    return name, pd.DataFrame(found, columns=COLUMNS)


def joined(tmp_path, *experiments):
    """(experiment, method, value) of table 3's rows; "" where it has no column of experiments."""
    paths = []
    for name, metrics in experiments:
        paths.append(tmp_path / name / "metrics.csv")
        paths[-1].parent.mkdir(exist_ok=True)
        metrics.to_csv(paths[-1], index=False)
    list(further_sheet(paths, tmp_path / "none.csv").write(tmp_path, "table3"))
    found = cells(tmp_path / "table3.csv")
    return [(row.get("Experiment", ""), row["Method"], float(row["Mean (%)"])) for row in found]


def test_trainings_of_one_name_in_two_experiments_are_not_averaged(tmp_path):
    slow = trained("slow", [0, 1], 0.4, rate=0.1)
    for seeds in ([0, 1], [2], [1, 2, 3]):
        fast = trained("fast", seeds, 0.3, rate=0.2)
        rows = joined(tmp_path, slow, fast)
        assert sorted(rows[1:]) == [("fast", "entropy", pytest.approx(30)), ("slow", "entropy", pytest.approx(40))]
    for same in (trained("same", [0], 0.4, rate=0.1), trained("same", [0, 1], 0.4, rate=0.1)):
        assert joined(tmp_path, slow, same) == [("", "dense", 50), ("", "entropy", pytest.approx(40))]
        assert joined(tmp_path, same, slow) == joined(tmp_path, slow, same)
    other = slow[1].assign(key=lambda rows: rows["key"].replace("dense", "on other documents"))
    with pytest.raises(UserError, match=r"the dense model m has other results in each: it was evaluated in two ways"):
        joined(tmp_path, slow, ("other", other))


def test_a_table_by_hand_shows_only_what_it_compares_and_one_dense_model():
    found = documents(entropy=0.6, cross_entropy=0.59, wanda=0.4)
    found.loc[found["criterion"] == "wanda", "refit"] = "bias"
    found.loc[found["criterion"] != "none", ["structure", "allocation"]] = ["mlp", "uniform"]
    assert set(select("table6", found)["criterion"]) == {"none", "entropy", "cross_entropy"}
    assert set(select("table1", found)["criterion"]) == {"none", "entropy", "cross_entropy", "wanda"}
    with pytest.raises(UserError, match="table8 compares structures"):
        select("table8", found)
    with pytest.raises(UserError, match="not of 2: m, other"):
        select("table6", pd.concat([found, found.assign(model="other")]))


MACHINE = {"device": "a CPU", "threads": 2, "versions": "torch 2", "dtype": "float32", "n": 5}


def timings(path):
    """The csv of `hfprune efficiency` for a dense model and one cut by 20 %."""
    rows = []
    for key, ratio, seconds in (("a", 0.0, 0.1), ("b", 0.2, 0.08)):
        model = dict(
            zip(
                MODEL, ["m", "pruned", "entropy", "entropy"] if ratio else ["m", "dense", "dense", "none"], strict=False
            )
        )
        about = MACHINE | model | {"key": key, "ratio": ratio, "allocation": "none", "refit": "none"}
        about |= {"structure": "none", "recovery": "none", "parent": "none"}
        measured = [("prefill 256", "prefill_seconds", seconds), ("inference", "peak_bytes", 2**30)]
        measured += [(f"decode batch {batch}", "decode_tokens_per_second", batch / seconds) for batch in (1, 8)]
        rows += [about | {"task": task, "metric": metric, "value": value} for task, metric, value in measured]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_timings_stand_beside_the_published_ones_with_their_machine(tmp_path):
    made = timing_sheet([timings(tmp_path / "efficiency.csv")], PUBLISHED / "table4.csv")
    list(made.write(tmp_path, "table4"))
    found = cells(tmp_path / "table4.csv")
    assert [(row["Removed (%)"], row["Method"], row["Prefill (ms)"], row["source"]) for row in found] == [
        ("0", "dense", "100.0", "here"),
        ("0", "Llama-2-7B, published", "57.5", "published"),
        ("20", "entropy", "80.0", "here"),
        ("20", "Llama-2-7B, published", "46.3", "published"),
    ]
    assert [row["Decoding, batch 8 (tokens/s)"] for row in found] == ["80.0", "473.9", "100.0", "553.9"]
    assert found[0]["Peak memory (GiB)"] == "1.0"
    assert "a CPU, 2 threads, float32, torch 2" in (tmp_path / "table4.md").read_text()


def test_the_cost_of_scoring_is_that_of_each_criterion_alone(tmp_path):
    rows = [
        MACHINE
        | {"criterion": name, "light_cut": cut, "seconds": seconds, "peak_bytes": 3e9, "tokens": 1000, "flops": 5e12}
        for name, cut, seconds in (("entropy", "none", 10.0), ("self_distillation", "cross_entropy", 15.0))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "costs.csv", index=False)
    list(scoring_sheet([tmp_path / "costs.csv"], PUBLISHED / "table5.csv").write(tmp_path, "table5"))
    found = cells(tmp_path / "table5.csv")
    assert [(row["Criterion"], row["Seconds"], row["Peak memory (GB)"]) for row in found] == [
        ("entropy", "10.0", "3.0"),
        ("self_distillation, after scoring by cross_entropy", "15.0", "3.0"),
        ("entropy, Llama-2-7B, published", "508.9", "35.3"),
        ("self_distillation, Llama-2-7B, published", "1539.8", "51.2"),
    ]
    assert found[1]["Time / entropy"] == "1.5" and found[1]["Tokens/s"] == str(1000 / 15)


def test_a_csv_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a csv with the columns key, model"):
        timing_sheet([tmp_path / "x.csv"], PUBLISHED / "table4.csv")
    with pytest.raises(UserError, match="one csv file is expected, not 2"):
        scoring_sheet([tmp_path / "x.csv"] * 2, PUBLISHED / "table5.csv")


def test_what_a_model_is_worth_stands_against_its_time_and_its_cost(tmp_path):
    about = {
        "model": "m",
        "allocation": "none",
        "refit": "none",
        "structure": "none",
        "recovery": "none",
        "parent": "none",
        "n": 1,
    }
    about |= {"ratio_achieved": 0, "parameters": 1, "parent": "none"}
    rows = []
    for stage, criterion, ratio, value in (("dense", "none", 0.0, 0.5), ("pruned", "entropy", 0.2, 0.4)):
        model = about | {"stage": stage, "criterion": criterion, "ratio": ratio}
        model["method"] = "dense" if criterion == "none" else criterion
        rows.append(model | {"group": "task", "task": "boolq", "metric": "acc", "value": value, "stderr": 0.01})
        if ratio:
            for task, flops in (("score", 1e12), ("prune", 2e12)):
                rows.append(model | {"group": "cost", "task": task, "metric": "flops", "value": flops, "seed": 0})
    figure = pareto(pd.DataFrame(rows, columns=COLUMNS), read_timings([timings(tmp_path / "efficiency.csv")]))
    left, right = figure.axes
    drawn = [
        [tuple(line.get_xydata()[0]) for line in axis.lines if len(line.get_xydata()) == 1] for axis in (left, right)
    ]
    assert drawn[0] == [(100.0, 50.0), (80.0, 40.0)]
    assert drawn[1] == [(0.0, 50.0), (3.0, 40.0)], "nothing was made of the dense one; scoring and cutting together"
    plt.close(figure)


def test_both_panels_have_every_model_of_the_legend_or_say_which_they_lack(tmp_path):
    settings = [  # criterion, allocation, recovery, parameters; what was cut to 80 by entropy alone is timed
        ("none", "none", "none", 100), ("none", "none", "lora", 100),
        ("entropy", "uniform", "none", 80), ("entropy", "uniform", "lora", 80), ("wanda", "uniform", "none", 80),
        ("random", "uniform", "none", 81), ("entropy", "global", "none", 80), ("wanda", "global", "none", 80),
    ]  # fmt: skip
    rows = []
    for number, (criterion, allocation, recovery, parameters) in enumerate(settings):
        stage = "recovered" if recovery != "none" else "dense" if criterion == "none" else "pruned"
        cut = criterion != "none"
        model = {"model": "m", "stage": stage, "criterion": criterion, "allocation": allocation, "recovery": recovery}
        model["parent"] = "none"
        model["method"] = f"{criterion} {allocation}" if cut else "dense"
        model |= {"refit": "none", "structure": "mlp" if cut else "none", "ratio": 0.2 * cut, "parameters": parameters}
        model |= {"ratio_achieved": 0.2 * cut, "seed": 0 if cut else np.nan, "n": 9, "stderr": 0.1}
        rows.append(model | {"group": "fidelity", "task": "text", "metric": "kl", "value": float(number)})
        if stage != "dense":
            rows.append(model | {"group": "cost", "task": "score", "metric": "flops", "value": number * 1e12})
    metrics = pd.DataFrame(rows, columns=COLUMNS)
    timed = metrics[metrics["value"].isin([0, 2, 6])].assign(metric="prefill_seconds", task="prefill 256")
    seconds = {0.0: 0.1, 2.0: 0.08, 6.0: 0.07}
    figure = pareto(metrics, timed.assign(value=timed["value"].map(seconds)))
    left, right = figure.axes
    points = [{line.get_ydata()[0]: line.get_xdata()[0] for line in axis.lines} for axis in (left, right)]
    expected = {0.0: 100, 1.0: 100, 2.0: 80, 3.0: 80, 4.0: 80, 6.0: 70}
    assert points[0] == pytest.approx(expected), "models of one shape have one time; two rankings cut to two shapes"
    said = " ".join(left.get_title(loc="left").split())
    assert said == "Not timed: random uniform, 20%; wanda global, 20%"
    assert points[1] == pytest.approx({float(number): number for number in range(8)})
    assert right.get_title(loc="left") == ""
    assert len(figure.legends[0].get_texts()) == 8
    plt.close(figure)


def test_kept_widths_have_a_panel_for_each_part_and_size():
    rows = [
        {"model": model, "ratio": ratio, "part": part, "layer": layer, "kept": kept, "dense": 10, "key": model}
        for model, kept in (("entropy", 8), ("entropy, global", 6))
        for ratio in (0.1, 0.2)
        for part in ("mlp", "attention")
        for layer in (0, 1)
    ]
    figure = kept_widths(pd.DataFrame(rows))
    assert len(figure.axes) == 4
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[80, 80], [60, 60]]
    assert [text.get_text() for text in figure.axes[1].texts] == ["entropy", "entropy, global"], (
        "right of the last panel"
    )
    plt.close(figure)


def test_kept_widths_of_one_method_are_lines_of_one_panel():
    rows = [
        {
            "model": "entropy",
            "ratio": ratio,
            "part": "mlp",
            "layer": layer,
            "kept": 10 * (1 - ratio),
            "dense": 10,
            "key": "",
        }
        for ratio in (0.1, 0.2)
        for layer in (0, 1)
    ]
    figure = kept_widths(pd.DataFrame(rows))
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["10% removed", "20% removed"]
    assert axis.get_title() == "entropy"
    plt.close(figure)


def test_ranks_by_two_criteria_agree_on_the_diagonal():
    scores = np.arange(50.0)
    figure = against_each_other(dict.fromkeys((1, 2, 3), scores), {1: scores * 3, 2: -scores, 3: scores**2})
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles == [f"Layer {i}: rank correlation {value}" for i, value in ((1, "1.00"), (2, "-1.00"), (3, "1.00"))]
    plt.close(figure)


def test_what_latex_would_take_for_a_command_is_escaped(tmp_path):
    made = Sheet("50 % of_it", ["A_b"], {"V": 1}, [Row(["x_y"], {"V": Cell(1.25, 1.0, 1.5, best=True)})])
    list(made.write(tmp_path, "t"))
    tex = (tmp_path / "t.tex").read_text()
    assert r"50 \% of\_it" in tex and r"x\_y & \textbf{1.2} $\pm$0.2" in tex
    assert cells(tmp_path / "t.csv") == [{"A_b": "x_y", "source": "here", "V": "1.25", "V low": "1.0", "V high": "1.5"}]


def test_every_special_character_of_latex_is_escaped_everywhere(tmp_path):
    odd = r"a&b #1 $x {y} ~z ^w _v 5% \q ±1"
    values = {f"{odd}!": Cell(1.25)}
    rows = [Row(["0", odd], values), Row(["20", odd], values, published=True)]
    Sheet(odd, [odd, "Method"], {f"{odd}!": 1}, rows, [odd]).write(tmp_path, "odd")
    tex = (tmp_path / "odd.tex").read_text()
    latex = r"a\&b \#1 \$x \{y\} \textasciitilde z \textasciicircum w \_v 5\% \textbackslash q "
    assert tex.count(latex) == 6, "caption, two titles, two heads and the note"
    rest = tex.replace(latex, "").replace("$\\pm$", "")
    assert not [character for character in ("#", "~", "^", "_", "%", "$") if character in rest]
    assert [rest.count(brace) for brace in "{}"] == [rest.count("}")] * 2
    assert rf"\midrule \textit{{20}} & \textit{{{latex}" in tex
