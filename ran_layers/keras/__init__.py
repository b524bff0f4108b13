"""The layers and the CIFAR networks for Keras 3, on its torch, JAX and TensorFlow backends.

    >>> import ran_layers.keras
    >>> model = ran_layers.keras.RANAttention56Cifar(weights=None)

Written with ``keras.layers`` and ``keras.ops`` alone. PyTorch is imported, being what ``ran_layers`` itself is made
of, but computes nothing on the other backends. On TensorFlow, import this package before ``keras``: PyTorch may bring
Triton, whose LLVM ends the process if TensorFlow's is there already.
"""
try:
    import keras
except ImportError as error:
    raise ImportError(
        "ran_layers.keras needs Keras 3 and one of its backends: pip install 'ran-layers[keras]', then set the "
        "environment variable KERAS_BACKEND to 'torch' (which ran-layers brings along), 'jax' or 'tensorflow'; "
        f"import keras said: {error}"
    ) from error
if int(keras.__version__.split(".")[0]) < 3:
    raise ImportError(f"ran_layers.keras needs Keras 3, found keras {keras.__version__}: pip install -U keras")

from .attention_module import AttentionModule
from .convert import load_torch_weights, torch_state_dict
from .mask_branch import LocalMaskBranch, SoftMaskBranch
from .residual_attention import RANAttention56Cifar, RANAttention92Cifar, preprocess_input
from .residual_unit import ResidualUnit, ResidualUnitDown

__all__ = [
    "AttentionModule",
    "LocalMaskBranch",
    "RANAttention56Cifar",
    "RANAttention92Cifar",
    "ResidualUnit",
    "ResidualUnitDown",
    "SoftMaskBranch",
    "load_torch_weights",
    "preprocess_input",
    "torch_state_dict",
]
