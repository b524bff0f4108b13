"""The Keras layers against the PyTorch layers, and as good citizens of Keras."""
import json

import keras
import numpy as np
import pytest
import torch
from pairs import randomise, run_keras, run_torch

import ran_layers
import ran_layers.keras as rk

BACKEND = keras.backend.backend()
rng = np.random.default_rng(0)

# Class, channels of the input, height and width, arguments of both layers; odd, even and non-square sizes.
CASES = {
    "unit": ("ResidualUnit", 8, (5, 4), {}),
    "unit-stride2-even": ("ResidualUnit", 8, (8, 6), dict(out_channels=12, stride=2, bottle_ratio=0.5)),
    "down-odd": ("ResidualUnitDown", 8, (7, 5), dict(out_channels=16)),
    "soft": ("SoftMaskBranch", 4, (13, 10), dict(mask_depth=3, skips=1)),
    "local": ("LocalMaskBranch", 4, (5, 3), dict(units=1, mask_act="channel")),
    "module": ("AttentionModule", 8, (11, 6), dict(mask_depth=2)),
    "module-naive": ("AttentionModule", 4, (6, 7), dict(
        p=2, t=1, r=2, mask_depth=2, skips=0, learning="naive", mask_act="spatial", bottle_ratio=0.5)),
    "module-local": ("AttentionModule", 4, (4, 5), dict(p=0, t=3, mask="local", mask_act="channel")),
}


def build_pair(case: str, **kwargs) -> tuple[torch.nn.Module, keras.layers.Layer, np.ndarray]:
    name, channels, size, args = CASES[case]
    module = randomise(getattr(ran_layers, name)(channels, **args))
    layer = getattr(rk, name)(**args, **kwargs)
    layer.build((None, *size, channels) if layer.data_format == "channels_last" else (None, channels, *size))
    rk.load_torch_weights(layer, module.state_dict())
    return module, layer, rng.normal(size=(3, *size, channels)).astype("float32")


@pytest.mark.parametrize("case", CASES)
def test_matches_torch(case):
    """Output in both modes, and the batch statistics of a training step."""
    module, layer, x = build_pair(case)
    y = run_keras(layer, x)
    assert y.shape == layer.compute_output_shape(x.shape)
    np.testing.assert_allclose(y, run_torch(module, x), rtol=1e-5, atol=3e-5)
    before = rk.torch_state_dict(layer)
    np.testing.assert_allclose(run_keras(layer, x, training=True), run_torch(module, x, training=True), atol=1e-4)
    state = module.state_dict()
    for name, value in rk.torch_state_dict(layer).items():
        np.testing.assert_allclose(value, state[name], rtol=1e-5, atol=3e-5, err_msg=name)
        assert np.array_equal(value, before[name]) == ("running" not in name)


@pytest.mark.parametrize("case", ["unit-stride2-even", "module", "module-local"])
def test_channels_first(case):
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow has no channels-first convolution on CPU")
    module, layer, x = build_pair(case, data_format="channels_first")
    y = run_keras(layer, x.transpose(0, 3, 1, 2))
    assert y.shape == layer.compute_output_shape(x.transpose(0, 3, 1, 2).shape)
    np.testing.assert_allclose(y.transpose(0, 2, 3, 1), run_torch(module, x), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("size", [(1, 1, 3, 2), (2, 3, 3, 5), (4, 4, 7, 8)])
def test_upsampling_matches_torch(size):
    from ran_layers.keras.mask_branch import upsample_to

    height, width, *target = size
    x = rng.normal(size=(1, height, width, 2)).astype("float32")
    first = x.transpose(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(first), size=target, mode="bilinear", align_corners=False)
    y = keras.ops.convert_to_numpy(upsample_to(x, np.zeros((1, *target, 2), "float32"), "channels_last"))
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), expected, atol=1e-6)
    y = keras.ops.convert_to_numpy(upsample_to(first, np.zeros((1, 2, *target), "float32"), "channels_first"))
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    name, _, _, args = CASES[case]
    layer = getattr(rk, name)(**args, name="layer", data_format="channels_first", dtype="mixed_bfloat16")
    config = layer.get_config()
    assert config.items() >= {**args, "name": "layer", "data_format": "channels_first"}.items()
    restored = type(layer).from_config(json.loads(json.dumps(config)))
    assert restored.get_config() == config
    assert restored.dtype_policy.name == "mixed_bfloat16"


def build_model(dtype: str | None = None) -> keras.Model:
    """All five layers on images of any size."""
    inputs = x = keras.Input((None, None, 4))
    for layer in (
            rk.ResidualUnit(8, dtype=dtype),
            rk.AttentionModule(mask_depth=2, bottle_ratio=0.5, dtype=dtype),
            rk.ResidualUnitDown(dtype=dtype),
            rk.SoftMaskBranch(mask_act="spatial", dtype=dtype),
            rk.LocalMaskBranch(units=1, dtype=dtype),
    ):
        x = layer(x)
    return keras.Model(inputs, x)


def test_keras_file_and_any_size(tmp_path):
    model = build_model()
    for variable in model.non_trainable_variables:  # so that the statistics are saved too
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    for layer, loaded in zip(model.layers, restored.layers):
        assert loaded.get_config() == layer.get_config()
    x = rng.normal(size=(1, 6, 9, 4)).astype("float32")
    y = model.predict(x, verbose=0)
    assert y.shape == (1, 3, 5, 8)
    np.testing.assert_array_equal(restored.predict(x, verbose=0), y)
    assert model.predict(np.zeros((1, 11, 10, 4)), verbose=0).shape == (1, 6, 5, 8)


def test_what_is_frozen_stays_frozen(tmp_path):
    """In the constructor, and after saving; Keras itself freezes only the sublayers that are there already."""
    inputs = keras.Input((6, 6, 4))
    frozen = rk.AttentionModule(p=0, t=1, trainable=False)
    model = keras.Model(inputs, keras.layers.Dense(2)(rk.ResidualUnitDown(name="unit")(frozen(inputs))))
    model.get_layer("unit").trainable = False
    model.save(tmp_path / "model.keras")
    x = rng.normal(size=(2, 6, 6, 4)).astype("float32")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        assert len(each.trainable_variables) == 2
        before = each.get_weights()
        run_keras(each, x, training=True)
        for weight, expected in zip(each.get_weights(), before):
            np.testing.assert_array_equal(weight, expected)


def test_statistics_in_float16():
    layer = rk.ResidualUnit(dtype="float16")
    layer.build((70, 16, 16, 4))  # more positions than float16 has numbers for
    run_keras(layer, rng.normal(size=(70, 16, 16, 4)).astype("float16"), training=True)
    assert all(np.isfinite(weight).all() for weight in layer.get_weights())


@pytest.mark.parametrize("create", [
    rk.AttentionModule,
    lambda **kwargs: rk.LocalMaskBranch(units=0, mask_act="channel", **kwargs),
    lambda **kwargs: rk.LocalMaskBranch(units=0, mask_act="spatial", **kwargs),
])
def test_mixed_precision(create):
    layer, full = create(dtype="mixed_bfloat16"), create()
    for each in (layer, full):
        each.build((None, 8, 8, 8))
    full.set_weights(layer.get_weights())
    assert {v.dtype for v in layer.weights} == {"float32"}
    assert {sub.compute_dtype for sub in layer._flatten_layers()} == {"bfloat16"}
    x = rng.normal(size=(2, 8, 8, 8)).astype("float32")
    y, expected = run_keras(layer, x), run_keras(full, x)
    assert y.dtype.name == "bfloat16"
    error = np.abs(y.astype("float32") - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_jit_compile():
    """The same step compiled and not: loss and batch statistics."""
    x = rng.normal(size=(4, 6, 5, 4)).astype("float32")
    if BACKEND == "torch":  # what jit_compile calls there, without code generation; units take Dynamo half a minute
        layer = rk.LocalMaskBranch(units=0)
        layer.build(x.shape)
        x = torch.from_numpy(x)
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))
        return
    model, other = (keras.Sequential([keras.Input((None, None, 4)), rk.AttentionModule(p=0, t=0)]) for _ in range(2))
    other.set_weights(model.get_weights())
    for network, jit_compile in ((model, True), (other, False)):
        network.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile, run_eagerly=False)
        network.fit(x, np.zeros_like(x), batch_size=4, verbose=0)
    for weight, expected in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_allclose(weight, expected, atol=1e-4)


def test_layers_compute_without_torch():
    if BACKEND == "torch":
        pytest.skip("on this backend torch does the computing")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"torch computed {func}")

    with Refuse():
        layer = rk.AttentionModule()
        layer.build((None, 4, 4, 4))
        run_keras(layer, np.ones((2, 4, 4, 4), "float32"), training=True)
        with pytest.raises(AssertionError, match="torch computed"):
            torch.ones(1)


@pytest.mark.parametrize(("error", "match", "call"), [
    (ValueError, "stride must be at least 1, got 0", lambda: rk.ResidualUnit(stride=0)),
    (TypeError, "out_channels must be an int", lambda: rk.ResidualUnit(8.0)),
    (ValueError, r"bottle_ratio must be in \(0, 1\], got 2", lambda: rk.AttentionModule(bottle_ratio=2)),
    (ValueError, "r must be at least 1, got -5", lambda: rk.AttentionModule(mask="local", r=-5)),
    (TypeError, "mask_depth must be an int", lambda: rk.AttentionModule(mask="local", mask_depth="x")),
    (ValueError, "skips must be None for mask='local'", lambda: rk.AttentionModule(mask="local", skips=0)),
    (ValueError, "data_format must be one of", lambda: rk.LocalMaskBranch(data_format="NCHW")),
    (TypeError, "ResidualUnitDown has stride 2", lambda: rk.ResidualUnitDown(8, stride=1)),
    (ValueError, "skips must be at most mask_depth - 1 = 1, got 2", lambda: rk.SoftMaskBranch(mask_depth=2, skips=2)),
    (ValueError, "mask_act must be one of 'mixed'", lambda: rk.LocalMaskBranch(mask_act="sigmoid")),
    (ValueError, "mask must be one of 'soft', 'local', got 'hard'", lambda: rk.AttentionModule(mask="hard")),
    (ValueError, "learning must be one of", lambda: rk.AttentionModule(learning="none")),
    (TypeError, "p must be an int", lambda: rk.AttentionModule(p=True)),
    (ValueError, "mask_depth=3 pools 3 times and needs a map of at least 5x5, got 4x9",
     lambda: rk.AttentionModule(mask_depth=3)(keras.Input((4, 9, 8)))),
    (ValueError, "expected ndim=4, found ndim=3", lambda: rk.AttentionModule()(np.zeros((8, 8, 4), "float32"))),
    (ValueError, r"channels are known, got the shape \(None, 8, 8, None\)",
     lambda: rk.AttentionModule()(keras.Input((8, 8, None)))),
    (ValueError, "'unit' without weights", lambda: rk.load_torch_weights(rk.ResidualUnit(name="unit"), {})),
])
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_load_refuses_other_weights():
    module, layer, _ = build_pair("unit")
    before = layer.get_weights()
    state = module.state_dict()
    with pytest.raises(ValueError, match=r"1 are missing \['conv2.weight'\], 1 are unexpected \['conv4.weight'\]"):
        rk.load_torch_weights(layer, {name.replace("conv2", "conv4"): value for name, value in state.items()})
    with pytest.raises(ValueError, match=r"state\['conv2.weight'\] must have the shape \(2, 2, 3, 3\), got \(2, 2, 1"):
        rk.load_torch_weights(layer, {**state, "conv2.weight": np.zeros((2, 2, 1, 1))})
    for value, expected in zip(layer.get_weights(), before):
        np.testing.assert_array_equal(value, expected)


def test_loads_any_state_dict():
    """Of parameters with their gradients, in bfloat16, into a layer that was built in a scope; and back."""
    module = ran_layers.AttentionModule(4, p=0, t=1)
    with keras.name_scope("scope"):
        layer = rk.AttentionModule(p=0, t=1)
        layer.build((None, 6, 6, 4))
        model = keras.Sequential([keras.Input((6, 6, 4)), rk.ResidualUnit(name="unit")], name="model")
    state = module.bfloat16().state_dict(keep_vars=True)
    rk.load_torch_weights(layer, state)
    np.testing.assert_array_equal(rk.torch_state_dict(layer)["trunk.0.conv1.weight"],
                                  state["trunk.0.conv1.weight"].detach().float().numpy())
    assert "unit.conv1.weight" in rk.torch_state_dict(model)
    layer = rk.ResidualUnit(dtype="bfloat16")
    layer.build((None, 6, 6, 4))
    assert {value.dtype.name for value in rk.torch_state_dict(layer).values()} == {"float32"}
    with pytest.raises(ValueError, match=r"with the variable '.*', which no PyTorch layer here has"):
        rk.torch_state_dict(keras.Sequential([keras.Input((4, 4, 3)), keras.layers.GroupNormalization(1),
                                              keras.layers.PReLU()]))
