#!/usr/bin/env python3
"""Runs integration tests against real processes.

    tests/integration/run.py                    every test, about 5 minutes on 2 cores
    tests/integration/run.py golden faults      golden_test.py and faults_test.py
    tests/integration/run.py soak --long        the full variant; whatever else pytest takes
    tests/integration/run.py --bin DIR …        programs from elsewhere than build/cpu/bin
    tests/integration/run.py golden --device cuda --bin build/cuda/bin
"""

import os
import sys
from pathlib import Path

# The oracle's matrices are small, and both cores are busy with servers.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest  # noqa: E402

HERE = Path(__file__).resolve().parent


def main(arguments):
    """Bare words are test modules; everything else goes to pytest."""
    modules = {path.name.removesuffix("_test.py"): str(path) for path in HERE.glob("*_test.py")}
    chosen = [modules[word] for word in arguments if word in modules]
    rest = [word for word in arguments if word not in modules]
    return pytest.main(["-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE),
                        *rest, *(chosen or [str(HERE)])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
