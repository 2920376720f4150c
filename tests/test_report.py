"""Pages of the report, by themselves; test_workflow.py looks at the whole in a browser."""

import csv
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import yaml

from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.reporting.pages import list_artifacts, page
from hfprune.reporting.typeset import Cell, Row, Sheet
from tests.conftest import REPOSITORY


class Cells(HTMLParser):
    """The cells of a page's table, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows, self._open = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def test_a_table_has_few_digits_and_its_data_in_full(tmp_path):
    table = tmp_path / "agreement.csv"
    table.write_text('name,value,count\n"a, <b>",0.123456789,1234\nkey 12e4,-0.00000123456,2\n,123456.789,3\n')
    made = page("Title & all", "What <it> means.", [table])
    assert Cells(made).rows == [
        ["name", "value", "count"],
        ["a, <b>", "0.1235", "1234"],
        ["key 12e4", "-1.235e-06", "2"],
        ["", "123,457", "3"],
    ]
    assert "Title &amp; all" in made
    assert "What &lt;it&gt; means." in made
    assert 'download="agreement.csv"' in made


def test_a_table_that_has_markdown_is_shown_as_people_read_it(tmp_path):
    (tmp_path / "summary.csv").write_text("Model,KL\ndense,0.12345678\n")
    (tmp_path / "summary.md").write_text("| Model | KL |\n|:------|---:|\n| dense | **0.123** ± 0.01 |\n")
    made = page("Every model", "", [tmp_path / "summary.csv", tmp_path / "summary.md"])
    assert Cells(made).rows == [["Model", "KL"], ["dense", "0.123 ± 0.01"]]
    assert "<strong>0.123</strong>" in made
    assert 'download="summary.csv"' in made


ODD = r"a&b #1 $x {y} ~z ^w _v_ 5% \q | *s* `t` <u> [w](x)"


def test_any_name_stands_in_a_page_as_it_was_written(tmp_path):
    sheet = Sheet("Odd.", ["Method"], {"V": 1}, [Row([ODD], {"V": Cell(1.25)}), Row([ODD], {}, published=True)])
    table, markdown, _ = sheet.write(tmp_path, "odd")
    for files in ([table], [table, markdown]):
        rows = Cells(page("Odd", ODD, files)).rows
        assert rows[1][0] == rows[2][0] == ODD
    assert Cells(page("Odd", "", [table, markdown])).rows[1:] == [[ODD, "1.2"], [ODD, ""]]
    (tmp_path / "names.csv").write_text("key,name,n\n0123456789012345,NA,1\n12e4567890123456,none,\n")
    assert Cells(page("Names", "", [tmp_path / "names.csv"])).rows[1:] == [
        ["0123456789012345", "NA", "1"],
        ["12e4567890123456", "none", ""],
    ]


def test_numbers_are_set_to_the_right(tmp_path):
    sheet = Sheet("", ["Method"], {"V": 1}, [Row(["10"], {"V": Cell(1.25)})])
    table, markdown, _ = sheet.write(tmp_path, "t")
    assert '<td>10</td>\n<td style="text-align:right">1.2</td>' in page("", "", [table, markdown])
    made = page("", "", [table])
    assert '<th class="number">V</th>' in made and "<th>source</th>" in made


def test_a_long_sheet_says_how_many_rows_are_not_shown(tmp_path):
    sheet = Sheet("", ["Method"], {"V": 1}, [Row([f"m{i}"], {"V": Cell(i)}) for i in range(1234)], ["A note."])
    made = page("", "", sheet.write(tmp_path, "t")[:2])
    assert len(Cells(made).rows) == 201
    assert made.index("</table>") < made.index("The first 200 of 1,234 rows.") < made.index("A note.")


def test_an_empty_table_is_its_head(tmp_path):
    (tmp_path / "agreement.csv").write_text("criterion,seed\n")
    assert Cells(page("Agreement", "", [tmp_path / "agreement.csv"])).rows == [["criterion", "seed"]]


def test_a_page_never_grows_too_large_for_a_browser(tmp_path):
    table = tmp_path / "tables" / "profile.csv"
    table.parent.mkdir()
    for rows, whole in ((20_000, True), (60_000, False)):
        table.write_text("layer,value\n" + "".join(f"{i},0.12345678\n" for i in range(rows)))
        made = page("Profile", "", [table])
        assert len(made) * 4 / 3 < 2**21
        assert len(Cells(made).rows) == 201
        assert f"The first 200 of {rows:,} rows." in made
        assert ('download="profile.csv"' in made) == whole
        assert ("All of it is in tables/profile.csv" in made) != whole


def test_a_figure_stands_in_its_page(tmp_path):
    drawn = tmp_path / "kl.svg"
    svg = "<svg xmlns='http://www.w3.org/2000/svg'><path d='M0 0'/></svg>"
    drawn.write_text(f"<?xml version='1.0'?>\n<!DOCTYPE svg>\n{svg}")
    made = page("KL", "Less is better.", [drawn])
    svg = made[made.index("<svg") : made.index("</svg>") + 6]
    assert ElementTree.fromstring(svg)[0].get("d") == "M0 0"
    assert "<?xml" not in made


def test_a_figures_caption_begins_with_what_it_shows(tmp_path):
    (tmp_path / "kl.svg").write_text("<?xml version='1.0'?><svg></svg>")
    (tmp_path / "kl.txt").write_text("A is nearer than B.\n")
    made = page("Fidelity", "Bars are intervals.", [tmp_path / "kl.svg", tmp_path / "kl.txt"])
    assert "<p>A is nearer than B. Bars are intervals.</p>" in made
    with pytest.raises(UserError, match=r"kl\.txt: a page shows"):
        page("Fidelity", "", [tmp_path / "kl.txt"])


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"notes\.pdf: a page shows svg, csv, md or yaml"):
        page("Notes", "", [tmp_path / "notes.pdf"])


def test_a_list_of_artifacts_says_what_made_each(tmp_path):
    common = {"device": "cpu", "host": "here", "time": "2026-01-01", "peak_memory_bytes": 3 << 20}
    model = common | {
        "stage": "model", "key": "a" * 16, "parameters": {"hub": "me/it", "sha256": "ab" * 32}, "inputs": {},
        "code": "c" * 64, "git_commit": f"{'d' * 40}-dirty",
        "files": {"x": {"bytes": 5}, "y": {"bytes": 7}}, "seconds": 2.5, "versions": {"torch": "1", "gguf": "2"},
    }  # fmt: skip
    scores = model | {"stage": "score", "inputs": {"model": "a" * 16}, "versions": {"torch": "3", "gguf": "2"}}
    list_artifacts([model, scores], tmp_path)
    first, second = csv.DictReader((tmp_path / "artifacts.csv").open())
    assert (first["stage"], first["parameters"], first["made from"]) == ("model", f"hub: me/it, sha256: {'ab' * 8}", "")
    assert (first["bytes"], first["seconds"], first["peak memory (MiB)"]) == ("12", "2.5", "3")
    assert first["git commit"] == f"{'d' * 16}-dirty"
    assert second["made from"] == f"model: {'a' * 16}"
    versions = [tuple(row.values()) for row in csv.DictReader((tmp_path / "versions.csv").open())]
    assert versions == [("gguf", "2", "2"), ("torch", "1", "1"), ("torch", "3", "1")]


def test_needed_jobs_come_after_what_they_are_made_from(experiment):
    from hfprune.experiment.schema import Experiment, parse

    needed = Plan(parse(Experiment, experiment, "")).needed
    keys = [job.key for job in needed]
    assert len(keys) == len(set(keys))
    stages = [job.recipe.stage for job in needed]
    assert sorted(stages) == sorted(
        ["model", "text", "text", "task", "score", "prune", "prune", "reference", *["measure", "evaluate"] * 3]
    )
    for number, job in enumerate(needed):
        for inputs in job.inputs.values():
            for each in inputs if isinstance(inputs, list) else [inputs]:
                assert each.key in keys[:number]


def test_every_caption_is_one_line_that_begins_with_a_title():
    captions = yaml.safe_load((REPOSITORY / "workflow" / "report" / "captions.yaml").read_text())
    for kind, named in captions.items():
        for name, line in named.items():
            title, _, caption = line.partition(". ")
            assert caption, (kind, name)
            assert "\n" not in line
            assert len(title) < 80
