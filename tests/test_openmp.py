"""How long OpenMP's threads spin is set before torch is loaded, and left to those who say it themselves."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Runs a script up to the import of torch, where it tells what torch would read.
UNTIL_TORCH = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def spin_count(script: str, **environment: str) -> str:
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", UNTIL_TORCH, str(BENCHMARKS / script)], capture_output=True,
                            text=True, check=True, env={**unset, "PYTHONPATH": str(BENCHMARKS), **environment})
    return result.stdout.strip()


@pytest.mark.parametrize("script", ["cifar.py", "throughput.py", "robustness.py"])
def test_what_trains_or_evaluates_spins_shortly(script):
    assert spin_count(script) == "20000"


@pytest.mark.parametrize(("environment", "expected"), [
    ({"GOMP_SPINCOUNT": "5"}, "5"),
    ({"OMP_WAIT_POLICY": "active"}, "None"),
])
def test_what_the_user_says_counts(environment, expected):
    assert spin_count("cifar.py", **environment) == expected
