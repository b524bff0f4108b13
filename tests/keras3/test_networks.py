"""The Keras networks against the PyTorch networks with the same weights, and training."""
import ast
import doctest
import importlib
import math
from pathlib import Path

import keras
import numpy as np
import pytest
import timm
import torch
from pairs import randomise, run_keras, run_torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import ran_layers.keras as rk

BACKEND = keras.backend.backend()
NETWORKS = {"ran_att56_cifar": rk.RANAttention56Cifar, "ran_att92_cifar": rk.RANAttention92Cifar}
PACKAGE = Path(rk.__file__).parent

any_backend = pytest.mark.skipif(BACKEND != "torch", reason="the same code on every backend: tested on one")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype("float32")


def create_reference(name: str, path: Path, **kwargs) -> torch.nn.Module:
    """Save the weights of a PyTorch network with logits of about 1 and return it."""
    network = randomise(timm.create_model(name, **kwargs))
    save_file(network.state_dict(), path)
    return network


@pytest.mark.parametrize("name", [
    "ran_att56_cifar",
    pytest.param("ran_att92_cifar", marks=any_backend),  # more layers of the same kinds
])
def test_same_logits_and_batch_statistics(name, images, tmp_path):
    path = tmp_path / "weights.safetensors"
    reference = create_reference(name, path)
    model = NETWORKS[name](weights=path)
    assert sum(math.prod(v.shape) for v in model.trainable_variables) == sum(p.numel() for p in reference.parameters())
    logits, expected = run_keras(model, images), run_torch(reference, images)
    assert 0.1 < expected.std(axis=0).mean() < 10  # images differ, and 1e-4 is small beside it
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    run_torch(reference, images, training=True)
    run_keras(model, images, training=True)
    state = reference.state_dict()
    for key, value in rk.torch_state_dict(model).items():
        np.testing.assert_allclose(value, state[key], atol=1e-4, err_msg=key)


@any_backend
def test_weights_return_to_torch(images, tmp_path):
    model = rk.RANAttention56Cifar(weights=None)
    save_arrays(rk.torch_state_dict(model), tmp_path / "keras.safetensors")
    network = timm.create_model("ran_att56_cifar", checkpoint_path=str(tmp_path / "keras.safetensors")).eval()
    np.testing.assert_allclose(run_keras(model, images), run_torch(network, images), atol=1e-4)


@any_backend
def test_top_pooling_and_classes(images, tmp_path):
    path = tmp_path / "weights.safetensors"
    reference = create_reference("ran_att56_cifar", path, num_classes=7)
    with torch.no_grad():
        features = reference.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    for pooling, expected in (
            (None, features.transpose(0, 2, 3, 1)), ("avg", features.mean((2, 3))), ("max", features.max((2, 3)))):
        model = rk.RANAttention56Cifar(include_top=False, weights=path, input_shape=(None, None, 3), pooling=pooling)
        np.testing.assert_allclose(run_keras(model, images), expected, atol=1e-4)

    model = rk.RANAttention56Cifar(weights=path, classifier_activation="softmax")
    expected = torch.softmax(torch.from_numpy(run_torch(reference, images)), 1)
    np.testing.assert_allclose(run_keras(model, images), expected, atol=1e-5)
    assert rk.RANAttention56Cifar(weights=None).output.shape == (None, 10)

    model = rk.RANAttention56Cifar(weights=path, data_format="channels_first")
    assert model.input_shape == (None, 3, 32, 32)
    logits = run_keras(model, images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(logits, run_torch(reference, images), atol=1e-4)


@any_backend
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_shipped_weights(dataset, images):
    """The shipped file, where there is one, gives the PyTorch network's logits; otherwise the error says so."""
    for name, network in NETWORKS.items():
        if not (PACKAGE.parent / "weights" / f"{name}.{dataset}.safetensors").is_file():
            with pytest.raises(FileNotFoundError, match=f"ships no {name}.{dataset}.safetensors"):
                network(weights=dataset)
            continue
        reference = timm.create_model(f"{name}.{dataset}", pretrained=True).eval()
        np.testing.assert_allclose(run_keras(network(weights=dataset), images), run_torch(reference, images), atol=1e-4)


@any_backend
def test_initialisation_is_that_of_torch():
    model, network = rk.RANAttention56Cifar(weights=None), timm.create_model("ran_att56_cifar")
    state = rk.torch_state_dict(model)
    for name, expected in network.state_dict().items():
        if name in state and expected.numel() > 4000:
            np.testing.assert_allclose(state[name].std(), expected.numpy().std(), rtol=0.1, err_msg=name)
        elif name in state and expected.ndim == 1:
            np.testing.assert_array_equal(state[name], expected, err_msg=name)


@any_backend
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_preprocess_input(dataset):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype="uint8")
    cfg = timm.get_pretrained_cfg(f"ran_att56_cifar.{dataset}")
    expected = (images / 255 - cfg.mean) / cfg.std
    np.testing.assert_allclose(rk.preprocess_input(images, dataset), expected, atol=1e-4)
    tensor = rk.preprocess_input(keras.ops.convert_to_tensor(images.transpose(0, 3, 1, 2)), dataset, "channels_first")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(tensor).transpose(0, 2, 3, 1), expected, atol=1e-4)


@any_backend
@pytest.mark.parametrize(("error", "match", "kwargs"), [
    (ValueError, "weights must be 'cifar10', 'cifar100', the path of a .safetensors file or None, got 'imagenet'",
     dict(weights="imagenet")),
    (TypeError, "weights must be", dict(weights=1)),
    (FileNotFoundError, "no weights file 'missing.safetensors'", dict(weights="missing.safetensors")),
    (ValueError, "pooling must be one of 'avg', 'max', got 'mean'", dict(weights=None, pooling="mean")),
    (ValueError, r"input_shape must be \(height, width, channels\)", dict(weights=None, input_shape=(32, 32))),
    (ValueError, "classes must be at least 1, got 0", dict(weights=None, classes=0)),
    (ValueError, r"with 9 pixels or more a side, got \(8, 9, 3\)", dict(weights=None, input_shape=(8, 9, 3))),
    (ValueError, "input_shape must have 3 channels, those of the weights", dict(input_shape=(32, 32, 1))),
    (ValueError, "the channels a number", dict(weights=None, input_shape=(32, 32, None))),
    (ValueError, "each size of input_shape must be at least 1, got 0", dict(weights=None, input_shape=(32, 32, 0))),
    (TypeError, "each size of input_shape must be an int of at least 1, got 'a'", dict(
        weights=None, input_shape=("a", 32, 3))),
])
def test_errors(error, match, kwargs):
    with pytest.raises(error, match=match):
        rk.RANAttention56Cifar(**kwargs)


@any_backend
def test_classes_are_those_of_the_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    create_reference("ran_att56_cifar", path, num_classes=7)
    with pytest.raises(ValueError, match=r"classes must be 7, those of weights='.*', got 10"):
        rk.RANAttention56Cifar(weights=path, classes=10)
    with pytest.raises(ValueError, match="x must be images of three channels"):
        rk.preprocess_input(np.zeros((2, 8, 8, 1)))


def load_small_digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 8, 8, 1).astype("float32") / 8 - 1, y


def test_fit_digits():
    """A network of the layers learns digits, compiled on JAX and TensorFlow."""
    x, y = load_small_digits()
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(8, 3, padding="same"),
        rk.AttentionModule(p=0, t=1),  # few layers: compiling them takes the time
        rk.ResidualUnitDown(16),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ])
    model.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"])
    model.fit(x[:1280], y[:1280], batch_size=128, epochs=3, verbose=0)
    _, accuracy = model.evaluate(x[1285:], y[1285:], batch_size=128, verbose=0)
    assert accuracy > 0.8


@any_backend
def test_fit_network_on_digits():
    x, y = load_small_digits()
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    model = rk.RANAttention56Cifar(weights=None, input_shape=(16, np.int64(16), 1))
    model.compile(keras.optimizers.Adam(0.002), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loss = model.fit(x[:32], y[:32], batch_size=32, epochs=8, verbose=0).history["loss"]
    assert loss[-1] < 0.5 * loss[0]


@any_backend
def test_written_with_keras_alone():
    """No file of the package imports torch or timm."""
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for path in PACKAGE.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
        for alias in node.names
    }
    assert imported <= {"keras", "numpy", "safetensors", "collections", "importlib", "pathlib", "typing"}


@any_backend
def test_docstrings():
    public = {name: getattr(rk, name) for name in rk.__all__}
    for path in PACKAGE.glob("*.py"):
        module = importlib.import_module(f"ran_layers.keras.{path.stem}".removesuffix(".__init__"))
        assert doctest.testmod(module, extraglobs=public).failed == 0, path
