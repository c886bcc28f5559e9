"""Options and fixtures of the integration tests; run them with run.py."""

from pathlib import Path

import pytest

import checkpoints
from fathom_server import FathomServer


def pytest_addoption(parser):
    """--bin, --device and --long."""
    parser.addoption("--bin", default=str(checkpoints.ROOT / "build/cpu/bin"),
                     help="folder with fathom and its daemons")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"),
                     help="where workers compute; cuda needs programs built with preset cuda")
    parser.addoption("--long", action="store_true",
                     help="the full set: every world size, 2 minutes of soak, 20 faults of a kind")


def pytest_configure(config):
    """Tells the harness where the programs are and where they compute."""
    FathomServer.binaries = Path(config.getoption("--bin")).resolve()
    FathomServer.device = config.getoption("--device")


@pytest.fixture(scope="session")
def long(pytestconfig):
    """Whether --long was given."""
    return pytestconfig.getoption("--long")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model folder with a tokenizer: v3_tiny."""
    return checkpoints.serving_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def report(capsys):
    """Prints a measured figure past pytest's capture: a test that measures says what it found."""
    def say(*words):
        with capsys.disabled():
            print("\n   ", *words, flush=True)
    return say
