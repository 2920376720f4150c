"""The README and the pages of docs/: links lead somewhere, what they name exists, configs are valid; and their site."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hfprune
from hfprune import cli
from hfprune.experiment.schema import Experiment, parse, read
from hfprune.models.families import FAMILIES
from hfprune.pruning.saving import SAVINGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
COMMAND = re.compile(r"\bhfprune +([a-z][a-z-]*)((?:\\\n|[^`\n#|])*)")
OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]*")

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        repeats = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", anchor) is not None for anchor in found)
        found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def broken_links(page):
    """The relative links of a page that lead to no file, or to no heading of it."""
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    links = [link or attribute for link, attribute in LINK.findall(text)]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def subcommands(parser):
    """The parsers of a parser's subcommands, by name."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices if actions else {}


def unknown_commands(page, parser):
    """The commands, and their options, that stand in a page's code and that hfprune does not have."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*FENCE.findall(text), *CODE.findall(FENCE.sub("", text))])
    unknown = []
    for command, rest in COMMAND.findall(code):
        known = subcommands(parser).get(command)
        action = rest.split()[0] if rest.split() else ""
        if known and subcommands(known) and action.islower():
            command, known = f"{command} {action}", subcommands(known).get(action)
        if known is None:
            unknown.append(f"hfprune {command}")
            continue
        options = OPTION.findall(rest)
        unknown += [f"hfprune {command} {option}" for option in options if option not in known._option_string_actions]
    return unknown


@pytest.fixture(scope="module")
def parser():
    """The parser of all commands."""
    return cli._parser()


@each_page
def test_relative_links_lead_somewhere(page):
    assert broken_links(page) == []


@each_page
def test_commands_and_options_exist(page, parser):
    assert unknown_commands(page, parser) == []


@pytest.mark.parametrize("page", PAGES[1:], ids=[page.name for page in PAGES[1:]])
def test_a_page_opens_with_its_question(page):
    title, question, *_ = page.read_text(encoding="utf-8").split("\n\n")
    assert title.startswith("# ")
    assert re.fullmatch(r"\*[^*]+\?\*", question)


def test_the_start_page_says_how_many_families_there_are():
    (count,) = re.findall(r"cuts more than (\d+) families", PAGES[0].read_text(encoding="utf-8"))
    assert int(count) < len(FAMILIES) <= int(count) + 10


def test_the_start_page_names_every_kind_of_ratio():
    table = [line for line in PAGES[0].read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for kind, setting in SAVINGS.items():
        (row,) = [line for line in table if f"`ratio_of: {kind}`" in line]
        assert f"`{setting}: " in row and "(docs/pruning.md#memory-and-latency)" in row


def test_methods_in_a_config_are_ones_that_a_config_may_have():
    experiment = read(ROOT / "config.yaml")
    blocks = [(page.name, block) for page in PAGES for block in YAML.findall(page.read_text(encoding="utf-8"))]
    for page, block in blocks:
        values = yaml.safe_load(block)
        if "methods" in values:
            values.pop("texts", None)
            for training in values.get("recovery", {}).values():
                training["text"] = "xsum_summaries"
            parse(Experiment, experiment | values, page)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of the documentation, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_in_its_navigation(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")} - {"404.html"}
    assert pages <= set(re.findall(r'href="([^"#]+\.html)"', start)) | {"index.html"}
    assert {f"{page.stem}.html" for page in PAGES[1:]} <= pages


def test_the_site_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//", page.read_text("utf-8"))
        assert not fetched, page


def test_the_reference_is_that_of_the_code(site):
    config, commands, python = (
        (site / "reference" / f"{name}.html").read_text(encoding="utf-8") for name in ("config", "commands", "python")
    )
    assert "<code>round_to</code>" in config and 'href="#methodsettings"' in config
    assert "results/&lt;experiment&gt;" in config
    assert "usage: hfprune store prune" in commands and "usage: hfprune headline" in commands
    assert all(f'id="hfprune.api.{name}"' in python for name in hfprune.__all__)


def test_what_is_wrong_is_found(tmp_path, parser):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[here](#a-page) [no heading](#b) [no file](other.md) ![web](https://example.org/x.png)\n"
        "`hfprune score --model M` `hfprune guess` `hfprune store burn` `hfprune plan --luck` `[code](x.md)`\n"
        "```bash\nhfprune prune \\\n    --ratio 0.2 --hope 1 # --no-option\n```\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["#b", "other.md"]
    wrong = ["hfprune prune --hope", "hfprune guess", "hfprune store burn", "hfprune plan --luck"]
    assert unknown_commands(page, parser) == wrong


def test_the_leaderboard_on_its_page_is_the_one_that_was_measured():
    measured = (ROOT / "results" / "leaderboard" / "smollm2-135m.md").read_text().splitlines()
    table = [line for line in measured if line.startswith("|")]
    assert len(table) > 3 and "\n".join(table) in (ROOT / "docs" / "leaderboard.md").read_text()
