"""Runs tests/keras3 once a backend, each in a process of its own: Keras fixes its backend when it is imported."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **env}
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_backend(backend: str) -> None:
    for package in ("keras", backend):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    # JAX would spend most of the time on optimising programs that run once, and would take a GPU's memory.
    result = run(
        "-m", "pytest", "tests/keras3", "--confcutdir=tests/keras3", "-q", "-n", "0", "-p", "no:cacheprovider",
        KERAS_BACKEND=backend, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_backend_optimization_level=0",
        TF_CPP_MIN_LOG_LEVEL="3")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_ran_layers_imports_no_keras_and_says_where_it_is_needed() -> None:
    result = run("-c", "import sys, ran_layers; print('keras' in sys.modules); sys.modules['keras'] = None; "
                       "import ran_layers.keras")
    assert result.stdout.split() == ["False"], result.stderr
    assert "pip install 'ran-layers[keras]'" in result.stderr.splitlines()[-1]
