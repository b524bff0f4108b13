"""What all tests share: one thread each, fixed seeds, the data sets if they are there, CUDA tests only with CUDA."""
import os

# Tests run in several processes (pytest-xdist), and some start processes of their own: one thread each, or they wait
# for each other. Before torch is imported, and for child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Prepare a process that runs tests; the one that hands them out to others need not wait for torch."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    import torch

    # Kernels run without a GPU too. Before timm, which imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    torch.set_num_threads(1)
    config.pluginmanager.import_plugin("hub_fixtures")


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with ``uoft-cs/cifar10`` and ``uoft-cs/cifar100`` as Parquet files."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "datasets"
    path = Path(os.environ.get("RAN_LAYERS_DATA_DIR") or beside)
    if not (path / "uoft-cs").is_dir():
        pytest.skip(f"no data set in {path}; set RAN_LAYERS_DATA_DIR to the folder that holds uoft-cs/cifar10")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def script() -> Callable[[Any], Any]:
    """``torch.jit.script``, after moving the attribute that torch may take for an operator.

    torch 2.15 knows operators by their address and keeps the addresses of some that are gone (those of packets it
    refreshed). The padding of a convolution that comes to lie at one "cannot be used as a value".
    """
    import torch

    def script_module(model: Any) -> Any:
        gone = torch.jit._builtins._get_builtin_table()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                kept = []
                while id(module._reversed_padding_repeated_twice) in gone:
                    kept.append(module._reversed_padding_repeated_twice)
                    module._reversed_padding_repeated_twice = tuple(list(kept[-1]))
        return torch.jit.script(model)

    return script_module
