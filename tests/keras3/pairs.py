"""What compares a Keras layer with its PyTorch counterpart."""
import functools

import keras
import numpy as np
import torch


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter and statistic a value of its own: an untrained batch norm hides a mistake in it."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.0)
            torch.nn.init.uniform_(part.bias, -0.3, 0.3)
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 1.5)
        elif isinstance(part, torch.nn.Conv2d):
            torch.nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
        elif isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.2)
            torch.nn.init.normal_(part.bias)
    return module.eval()


def run_torch(module: torch.nn.Module, x: np.ndarray, *, training: bool = False) -> np.ndarray:
    """Call a PyTorch module on channels-last images."""
    with torch.no_grad():
        y = module.train(training)(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    return y.transpose(0, 2, 3, 1) if y.ndim == 4 else y


def run_keras(layer: keras.layers.Layer, x: np.ndarray, *, training: bool = False) -> np.ndarray:
    """Call a built Keras layer; on JAX compiled, as Keras trains there: one by one its operations take longer."""
    if keras.backend.backend() != "jax":
        return keras.ops.convert_to_numpy(keras.ops.stop_gradient(layer(x, training=training)))
    import jax

    call = jax.jit(functools.partial(layer.stateless_call, training=training))
    y, state = call([v.value for v in layer.trainable_variables], [v.value for v in layer.non_trainable_variables], x)
    for variable, value in zip(layer.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return keras.ops.convert_to_numpy(y)
