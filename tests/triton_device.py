"""Where the Triton kernels run in tests; a test module that imports this is skipped where they do not."""
import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton", reason="comes with PyTorch's builds for GPUs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and Version(triton.__version__) < Version("3.9"):
    pytest.skip("older versions of Triton do not interpret with newer ones of NumPy", allow_module_level=True)
