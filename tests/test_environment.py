"""The environments: one set of pins, and all that the package declares."""

import importlib.util
import re
import tomllib

import pytest

from tests.conftest import REPOSITORY

ENVS = REPOSITORY / "envs"


def pins():
    lines = (ENVS / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_conda_has_the_same_pins_as_pip():
    spec = importlib.util.spec_from_file_location("lock", ENVS / "lock.py")
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    assert (ENVS / "hfprune.yaml").read_text() == lock.conda((ENVS / "requirements.txt").read_text())


@pytest.mark.parametrize("extra", [None, "pipeline", "test"])
def test_what_the_package_declares_is_pinned(extra):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"][extra] if extra else project["dependencies"]
    names = {re.match(r"[\w-]+", each)[0].lower().replace("_", "-") for each in declared}
    assert names <= {name.lower().replace("_", "-") for name in pins()}


def test_no_pin_names_a_cpu_or_cuda_build():
    assert not [version for version in pins().values() if "+" in version]
