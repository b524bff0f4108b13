"""Training steps as they run on a GPU: what can be tested anywhere, and what needs a CUDA device."""
import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cifar

from harness.averaging import MovingAverage
from harness.compiling import compile_model
from harness.errors import RunError
from harness.gpu import HalfWeights, price_of_determinism, unchanged, why_no_gpu_kernels
from harness.recipes import Recipe
from harness.trainer import Trainer
from ran_layers import AttentionModule

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def small_net(device: str = "cpu", channels: tuple[int, ...] = (16, 16, 32, 32), **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("ran_att56_cifar", num_classes=4, channels=channels, stem_chs=8, **kwargs)
    return model.to(device, memory_format=torch.channels_last)


def autocast(device: str, precision: str = "bf16") -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def images(device: str, rows: int = 8, side: int = 16) -> torch.Tensor:
    x = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.to(device).contiguous(memory_format=torch.channels_last)


def trainer(
        device: str, compile_mode: str = "off", precision: str = "fp32", gpu_kernels: bool = False,
        channels: tuple[int, ...] = (16, 16, 32, 32), **recipe: Any,
) -> Trainer:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(4, (64,), generator=generator).to(device)
    return Trainer(
        small_net(device, channels), Recipe(epochs=4, batch_size=16, **recipe), pixels, labels,
        autocast=autocast(device, precision), compile_mode=compile_mode, gpu_kernels=gpu_kernels)


@pytest.mark.parametrize("device", DEVICES)
def test_half_weights_have_the_gradients_of_autocast(device):
    model = small_net(device)
    plain = copy.deepcopy(model).train()
    half = HalfWeights(model)
    half.net.train()
    classes = torch.arange(8, device=device) % 4
    for _ in range(2):  # the second pass would show gradients left over from the first
        model.zero_grad()
        half.load()
        with autocast(device):
            loss = F.cross_entropy(half.net(images(device)), classes)
        loss.backward()
        half.give_gradients()
        plain.zero_grad()
        with autocast(device):
            expected = F.cross_entropy(plain(images(device)), classes)
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert (got - wanted).norm() < 0.1 * wanted.norm()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    for (name, buffer), expected_buffer in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected_buffer, rtol=0.02, atol=0.02, msg=name)


def test_half_weights_keep_what_is_shared_and_leave_alone_what_computes_with_its_weights():
    first, second, standardised = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), timm.layers.StdConv2d(3, 8, 3)
    second.weight = first.weight
    half = HalfWeights(torch.nn.Sequential(first, second, standardised))
    assert half.net[0].weight is half.net[1].weight
    assert half.net[0].weight.dtype == half.net[1].bias.dtype == torch.bfloat16
    assert half.net[2].weight is standardised.weight
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    half.net[1](half.net[0](x)).sum().backward()
    half.give_gradients()
    with_float32 = copy.deepcopy(torch.nn.Sequential(first, second))
    with_float32.zero_grad()
    with_float32(x.float()).sum().backward()
    torch.testing.assert_close(first.weight.grad, with_float32[0].weight.grad, rtol=0.05, atol=0.05)


def test_moving_average_is_timms():
    model = small_net()
    average, expected = MovingAverage(model, 0.9), ModelEmaV3(model, decay=0.9, use_warmup=True)
    for step in range(1, 6):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(step)
        average.set_step(step)
        average.average()
        expected.update(model, step=step)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected.module.state_dict()[name], msg=name)


def test_what_runs_to_warm_up_changes_nothing():
    training = trainer("cpu", optimizer="muon", ema_decay=0.9, drop_path=0.1, resolutions=(0.0, 24, 0.5, 32))
    before = {name: value.clone() for name, value in training.state()[0].items()}
    with unchanged(training._all_tensors, training.device):
        for batch in training.empty_batches():
            training._learn(*batch)
    after = training.state()[0]
    assert [batch[0].shape[-1] for batch in training.empty_batches()] == [24, 32]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    momentum = [value for name, value in after.items() if name not in before]
    assert momentum  # the optimiser's, which the first step makes from zeros
    assert all(not value.any() for value in momentum)
    assert all(p.grad is None for p in training.model.parameters())


@pytest.mark.parametrize(("name", "units"), [
    ("ran_att56_cifar", 36), ("resnet18", 8), ("hrnet_w18_small", 0), ("plain_cnn8_cifar", 0)])
def test_compiled_is_each_unit_or_a_network_without_any(name, units):
    model = timm.create_model(name)
    compiled = compile_model(model, "units")
    assert sum(module._compiled_call_impl is not None for module in model.modules()) == units
    assert (compiled is model) == bool(units)
    assert compile_model(model, "off") is model


def test_units_within_units_are_compiled_with_them():
    model = compile_model(timm.create_model("resnet26", block_args=dict(attn_layer=AttentionModule)), "units")
    compiled = {type(module) for module in model.modules() if module._compiled_call_impl is not None}
    assert compiled == {timm.models.resnet.Bottleneck}


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", [
    dict(optimizer="muon", lr=0.005, muon_sgd_lr=0.02, ema_decay=0.9), dict(optimizer="sgd", lr=0.02),
    dict(optimizer="adam", lr=0.01)], ids=str)
@pytest.mark.parametrize("resolutions", [(), (0.0, 24, 0.5, 32)], ids=str)
def test_replayed_steps_are_those_of_a_cpu(recipe, resolutions, monkeypatch):
    # Float32 products and sums that a GPU does not shorten; the drawing of crops is the devices' own, so there is none.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recipe = dict(recipe, flip="none", pad=0, resolutions=resolutions, warmup=0.0)
    on_gpu, on_cpu = trainer("cuda", **recipe), trainer("cpu", **recipe)
    on_gpu.compile()
    assert len(on_gpu.replayed.graphs) == (2 if resolutions else 1)
    for training in (on_gpu, on_cpu):
        training.model.train()
        training.order = torch.arange(64, device=training.device)
    losses = []
    for step in range(4 if not resolutions else 10):
        for training in (on_gpu, on_cpu):
            training.step += 4 * (step == 5)  # into the other resolution
            before = training.sums.clone()
            training.train_step()
            losses.append((training.sums - before)[0].item())
    assert losses[::2][:3] == pytest.approx(losses[1::2][:3], rel=1e-3)
    assert losses[::2] == pytest.approx(losses[1::2], rel=0.1)  # rounding grows from step to step


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["units", "model"])
def test_compiled_steps_are_those_of_eager_ones(mode):
    recipe = dict(optimizer="muon", lr=0.02, ema_decay=0.9)
    losses = []
    for compile_mode in ("off", mode):
        training = trainer("cuda", compile_mode, "bf16", **recipe)
        training.compile()
        training.model.train()
        for _ in range(4):
            training.train_step()
        losses.append((training.sums[0] / 4).item())
        counters = {int(value) for name, value in training.model.state_dict().items() if "num_batches" in name}
        assert counters == {4}
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["off", "units"])
def test_kernels_train_as_torch_does(mode):
    recipe = dict(optimizer="muon", lr=0.02, ema_decay=0.9, resolutions=(0.0, 24, 0.5, 32))
    losses, averages = [], []
    for gpu_kernels in (False, True):
        training = trainer("cuda", mode, "bf16", gpu_kernels, channels=(64, 64, 128, 128), **recipe)
        fused = [module for module in training.half.net.modules() if type(module).__name__ == "FusedUnit"]
        assert (len(fused) > 20) is gpu_kernels
        training.compile()
        training.model.train()
        for step in range(16):
            if step % training.steps_per_epoch == 0:
                training.start_epoch(step // training.steps_per_epoch)
            training.train_step()
        losses.append((training.sums[0] / 4).item())
        averages.append(torch.cat([value.flatten() for name, value in training.averaged.state_dict().items()
                                   if "running" in name]))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    torch.testing.assert_close(*averages, rtol=0.05, atol=0.05)


def test_units_with_kernels_are_not_compiled():
    pytest.importorskip("triton", reason="comes with PyTorch's builds for GPUs")
    from harness.kernels.gpu_modules import use_gpu_kernels

    model = timm.create_model("ran_att56_cifar")
    use_gpu_kernels(model)
    assert compile_model(model, "units") is model
    compiled = {type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None}
    assert compiled == {"ResidualUnit", "MaskHead"}  # those that change the map, or are too wide
    assert {"FusedUnit", "FusedHead"} <= {type(module).__name__ for module in model.modules()}
    few = torch.nn.Sequential(AttentionModule(64), torch.nn.Conv2d(64, 1024, 3))
    use_gpu_kernels(few)
    with pytest.raises(RunError, match="--gpu-kernels: this network would be compiled as a whole"):
        compile_model(few, "units")
    with pytest.raises(RunError, match="--gpu-kernels: this network has no residual unit"):
        use_gpu_kernels(timm.create_model("plain_cnn8_cifar"))


def test_what_keeps_the_kernels_for_a_gpu_away(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_info:
        cifar.main(["--dataset", "digits", "--device", "cpu", "--gpu-kernels", "--out", str(tmp_path / "run")])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == (
        "error: --gpu-kernels are not available here: they are for NVIDIA GPUs that compute in bfloat16\n")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    assert why_no_gpu_kernels(device, "units") is None or importlib.util.find_spec("triton") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert why_no_gpu_kernels(device, "units") is why_no_gpu_kernels(device, "off") is None
    assert "one process" in why_no_gpu_kernels(device, "units", processes=2)
    assert "--deterministic" in why_no_gpu_kernels(device, "units", deterministic=True)
    assert "--compile model" in why_no_gpu_kernels(device, "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "no Triton" in why_no_gpu_kernels(device, "units")


@pytest.mark.cuda
def test_compiling_units_computes_the_same():
    model = small_net("cuda").eval()
    expected = model(images("cuda"))
    torch.testing.assert_close(compile_model(model, "units")(images("cuda")), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_the_harness_on_a_gpu(tmp_path, capsys):
    command = ["--dataset", "digits", "--epochs", "3", "--batch-size", "64", "--optimizer", "muon", "--lr", "0.02",
               "--compile", "off", "--ema-decay", "0.9"]
    cifar.main([*command, "--out", str(tmp_path / "whole")])
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert "NVIDIA" in result["hardware"]["name"]
    assert result["settings"]["precision"] == "bf16"
    assert result["final"]["top1"] > 50
    capsys.readouterr()
    cifar.main(["--eval-only", "--out", str(tmp_path / "whole")])
    assert f"test top-1 {result['final']['top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.cuda
def test_deterministic_runs_on_a_gpu_and_their_resumption_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    command = ["--dataset", "digits", "--epochs", "2", "--compile", "off", "--deterministic", "--batch-size", "64"]
    try:
        for name in ("one", "two"):
            cifar.main([*command, "--out", str(tmp_path / name)])
        signals = iter([0] * 25 + [2])  # stopped in the second epoch
        original = Trainer.train_epoch
        monkeypatch.setattr(
            Trainer, "train_epoch", lambda self, display, _: original(self, display, lambda: next(signals)))
        with pytest.raises(SystemExit):
            cifar.main([*command, "--out", str(tmp_path / "three")])
        monkeypatch.setattr(Trainer, "train_epoch", original)
        cifar.main(["--resume", "--compile", "off", "--deterministic", "--out", str(tmp_path / "three")])
    finally:
        torch.use_deterministic_algorithms(False)
    weights = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")}
    assert len(weights) == 1
    assert json.loads((tmp_path / "one" / "result.json").read_text())["deterministic_price"] > -0.5


@pytest.mark.cuda
def test_price_of_determinism_keeps_the_setting(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert -0.9 < price_of_determinism(small_net("cuda"), images("cuda"), autocast("cuda"), steps=3) < 9
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.cuda
def test_throughput_on_a_gpu(tmp_path, monkeypatch):
    import throughput

    monkeypatch.setattr(throughput, "PRICE_OF_ATTENTION", ())  # to compile one network, not three
    throughput.main(["--models", "ran_att56_cifar", "--batch-sizes", "16", "--rounds", "1", "--seconds", "0.05",
                     "--out", str(tmp_path)])
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert {row["form"] for row in result["cases"]} == {"harness", "dataloader"}
    assert all(row["peak_bytes"] > 0 and row["train"]["images_per_s"] > 0 for row in result["cases"])
