"""Precision, memory formats, compilers and exporters, on the layer alone and on a whole network."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from torch.testing import assert_close

import ran_layers  # noqa: F401  registers the networks
from ran_layers import AttentionModule

CASES = {
    "soft": (lambda: AttentionModule(8, mask_depth=2), (2, 8, 9, 12)),
    "local": (lambda: AttentionModule(8, mask="local", mask_act="spatial"), (2, 8, 5, 4)),
    "channel": (lambda: AttentionModule(8, mask_act="channel", learning="naive"), (2, 8, 5, 4)),
    # One of the three modules, which take long to export; docs/models.md and examples/export_onnx.py have the whole.
    "network": (lambda: timm.create_model("ran_att56_cifar", modules=(1, 0, 0, 0)), (2, 3, 32, 32)),
}


@pytest.fixture(params=CASES)
def case(request):
    """A model in evaluation mode and an input for it."""
    build, shape = CASES[request.param]
    return build().eval(), torch.randn(*shape)


def test_bfloat16_autocast(case):
    model, x = case
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = (model(x).float() - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_channels_last(case):
    model, x = case
    expected = model(x)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if got.ndim == 4:
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_compiles_without_a_graph_break(case):
    model, x = case
    expected = model(x)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_compiles_for_training():
    model, x = AttentionModule(8, mask_depth=2), torch.randn(2, 8, 9, 12)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected = _gradients(model, model, x)
    assert_close(_gradients(compiled, compiled._orig_mod, x), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(case, script):
    model, x = case
    scripted = script(model)
    assert_close(scripted(x), model(x))
    other = torch.randn(1, x.shape[1], 32, 35)
    assert_close(scripted(other), model(other))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_keeps_the_checks_of_the_input(script):
    scripted = script(AttentionModule(8, mask_depth=3).eval())
    with pytest.raises(torch.jit.Error, match="mask_depth=3 needs a map of at least 5x5, got 4x6"):
        scripted(torch.randn(1, 8, 4, 6))
    with pytest.raises(torch.jit.Error, match=r"Module of 8 channels takes .*, got \[1, 4, 9, 9\]"):
        scripted(torch.randn(1, 4, 9, 9))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("graph", ["script", "fx"])
def test_graphs_keep_the_check_of_the_trunk(graph, script):
    model = AttentionModule(8, trunk=nn.Conv2d(8, 1, 1), p=0).eval()
    model = script(model) if graph == "script" else torch.fx.symbolic_trace(model)
    if graph == "fx":
        model.graph.eliminate_dead_code()
        model.recompile()
    with pytest.raises((ValueError, torch.jit.Error), match=r"of shape \[1, 1, 4, 6\] for an input of shape \[1, 8, 4"):
        model(torch.randn(1, 8, 4, 6))


@pytest.mark.parametrize("compiler", ["compile", "export"])
def test_compilers_refuse_a_trunk_that_changes_the_shape(compiler):
    model, x = AttentionModule(8, trunk=nn.Conv2d(8, 1, 1), p=0).eval(), torch.randn(2, 8, 4, 6)
    run = torch.compile(model, backend="eager") if compiler == "compile" else lambda x: torch.export.export(model, (x,))
    with pytest.raises(Exception, match="trunk must keep the shape"):
        run(x)
    torch._dynamo.reset()


def test_torch_fx(case):
    model, x = case
    traced = torch.fx.symbolic_trace(model)
    assert_close(traced(x), model(x))
    other = torch.randn(1, x.shape[1], 32, 35)  # nothing of the first size is left in the graph
    assert_close(traced(other), model(other))


@pytest.mark.parametrize("case", ["local", "channel", "network"], indirect=True)  # soft: with dynamic shapes below
def test_torch_export(case):
    model, x = case
    exported = torch.export.export(model, (x,)).module()
    assert_close(exported(x), model(x))


# A traced dimension cannot become 1 further down: with two poolings 5 pixels are the fewest that do not.
DYNAMIC = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", min=5, max=64),
           3: torch.export.Dim("width", min=5, max=64)}


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch before 2.13 refuses max_pool2d of any size")
def test_torch_export_with_dynamic_shapes():
    model, x = AttentionModule(8, mask_depth=2).eval(), torch.randn(2, 8, 9, 12)
    exported = torch.export.export(model, (x,), dynamic_shapes=(DYNAMIC,)).module()
    for shape in [(1, 8, 5, 33), (3, 8, 20, 6)]:
        other = torch.randn(*shape)
        assert_close(exported(other), model(other))


def onnx_session(model, x, path, **kwargs):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False, **kwargs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


@pytest.mark.parametrize("case", ["local", "channel", "network"], indirect=True)  # soft: with dynamic shapes below
def test_onnx(case, tmp_path):
    model, x = case
    run = onnx_session(model, x, tmp_path / "model.onnx")
    assert_close(run(x), model(x), rtol=1e-3, atol=1e-4)


def test_onnx_with_dynamic_shapes(tmp_path):
    model, x = AttentionModule(8, mask_depth=2).eval(), torch.randn(2, 8, 9, 12)
    run = onnx_session(model, x, tmp_path / "model.onnx", dynamic_shapes=(DYNAMIC,))
    for shape in [(1, 8, 5, 33), (3, 8, 20, 6)]:
        other = torch.randn(*shape)
        assert_close(run(other), model(other), rtol=1e-3, atol=1e-4)


def _gradients(model, owner, x):
    owner.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in owner.parameters()]


def test_gradient_checkpointing_of_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), AttentionModule(8, mask_depth=2)).eval()
    x = torch.randn(2, 3, 11, 9)
    expected = _gradients(model, model, x)
    got = _gradients(lambda y: torch.utils.checkpoint.checkpoint_sequential(model, 2, y, use_reentrant=False), model, x)
    assert_close(got, expected)
