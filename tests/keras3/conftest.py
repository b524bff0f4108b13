"""These tests need a process whose Keras backend is known; tests/test_keras.py starts one a backend."""
import os

import pytest

if "KERAS_BACKEND" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    import ran_layers.keras  # noqa: F401  before Keras, as docs/keras.md says for TensorFlow

    import keras  # isort: skip

    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def _seed():
        # Without keras.backend.clear_session(): a garbage collection after each test took a third of the time.
        keras.utils.set_random_seed(0)
        torch.manual_seed(0)
