"""The environments: one set of pins, and all that the package declares."""

import importlib.metadata
import importlib.util
import re
import tomllib

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.conftest import REPOSITORY

ENVS = REPOSITORY / "envs"


def pins():
    lines = (ENVS / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_conda_has_the_same_pins_as_pip():
    spec = importlib.util.spec_from_file_location("lock", ENVS / "lock.py")
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    made = lock.conda((ENVS / "requirements.txt").read_text())
    assert {path.name: path.read_text() for path in ENVS.glob("*.yaml")} == made
    cpu, cuda = (yaml.safe_load(made[name])["dependencies"] for name in ("cpu.yaml", "cuda.yaml"))
    assert dict(pin.split("==") for pin in cuda[-1]["pip"]) == pins()
    *packages, pip = cpu
    assert f"pytorch-cpu={pins()['torch']}" in packages
    assert set(cuda[-1]["pip"]) - set(pip["pip"]) == {f"torch=={pins()['torch']}"}


def test_every_rule_that_runs_a_command_names_the_environment():
    rules = "\n".join(file.read_text() for file in (REPOSITORY / "workflow" / "rules").glob("*.smk"))
    assert len(re.findall(r"^ *conda:\n +ENVIRONMENT$", rules, re.MULTILINE)) == rules.count("shell:")


def test_both_images_are_built_from_the_lock_and_hold_the_same_parts():
    docker, apptainer = ((ENVS / name).read_text() for name in ("Dockerfile", "hfprune.def"))
    for recipe in (docker, apptainer):
        assert re.search(r"pip install .*--requirement (/opt/hfprune/)?envs/requirements.txt$", recipe, re.MULTILINE)
        assert re.search(r"pip install .*--no-deps (\.|/opt/hfprune)$", recipe, re.MULTILINE)
        assert re.findall("pip install", recipe) == ["pip install"] * 2
    copied = [line.split()[1:-1] for line in docker.splitlines() if line.startswith("COPY")]
    parts = {part for line in copied for part in line} - {"envs/requirements.txt"}
    files = apptainer.partition("%files\n")[2].partition("\n\n")[0]
    assert [line.split()[1] for line in files.splitlines()] == [
        f"/opt/hfprune/{line.split()[0]}" for line in files.splitlines()
    ]
    assert {line.split()[0] for line in files.splitlines()} == parts
    assert all((REPOSITORY / part).exists() for part in parts)
    assert {"Snakefile", "workflow", "profiles", "envs", "hfprune", "results/published"} <= parts


def test_images_and_conda_have_a_python_that_the_package_takes():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = [
        path.read_text() for path in ENVS.iterdir() if path.suffix in (".yaml", ".def") or path.stem == "Dockerfile"
    ]
    found = [re.search(r"\bpython[=:](\d+\.\d+)", text)[1] for text in texts]
    assert len(found) == 4
    assert len(set(found)) == 1
    assert found[0] in SpecifierSet(project["requires-python"])


@pytest.mark.parametrize("extra", [None, "pipeline", "deploy", "docs", "test"])
def test_what_the_package_declares_is_pinned(extra):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"][extra] if extra else project["dependencies"]
    names = {re.match(r"[\w-]+", each)[0].lower().replace("_", "-") for each in declared}
    assert names <= {name.lower().replace("_", "-") for name in pins()}


def test_every_pin_installs_on_the_oldest_python_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    needs = {name: importlib.metadata.metadata(name).get("Requires-Python") or "" for name in pins()}
    assert not {name: need for name, need in needs.items() if oldest not in SpecifierSet(need)}


def test_no_pin_names_a_cpu_or_cuda_build():
    assert not [version for version in pins().values() if "+" in version]
