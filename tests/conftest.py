"""What all tests share: one thread each, fixed seeds, the data sets if they are there, CUDA tests only with CUDA."""
import os

# Tests run in several processes (pytest-xdist), and some start processes of their own: one thread each, or they wait
# for each other. Before torch is imported, and for child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from hub_fixtures import cli, expected, hub, plain_files, run_dir  # noqa: F401 (fixtures)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
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
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
