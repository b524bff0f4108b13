"""These tests need a process whose Keras backend is known; tests/test_keras.py starts one a backend."""
import os

import pytest

if "KERAS_BACKEND" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    import keras
    import torch

    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def _seed():
        keras.utils.set_random_seed(0)
        torch.manual_seed(0)
        yield
        keras.backend.clear_session()
