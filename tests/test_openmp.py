"""OpenMP's threads: set before torch is loaded, and left to those who say it themselves."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from harness import openmp  # noqa: E402

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


@pytest.mark.parametrize(("files", "expected"), [
    ({}, None),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu.max": "250000 100000\n"}, 2),
    ({"cpu.max": "50000 100000\n"}, 1),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ({"cpu.max": "damaged"}, None),
])
def test_the_time_that_a_container_has(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert openmp.processors_by_quota(tmp_path) == expected


@pytest.mark.parametrize(("environment", "affinity", "expected"), [
    ({}, 8, "2"),
    ({}, 2, None),  # no more than the quota are available
    ({"OMP_NUM_THREADS": "5"}, 8, "5"),
])
def test_threads_are_no_more_than_the_quota(monkeypatch, environment, affinity, expected):
    monkeypatch.setattr(openmp, "processors_by_quota", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(affinity), raising=False)
    monkeypatch.setattr(os, "environ", environment)
    openmp.set_up()
    assert environment.get("OMP_NUM_THREADS") == expected
