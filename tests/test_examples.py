"""Each example runs, in a short form, and does what it says."""
import io
import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import ran_layers  # noqa: F401  (registers the networks with timm)

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["--device", "cpu"]


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_cifar(tmp_path: Path) -> Path:
    """A folder with a few rows of random images in the form of CIFAR-10."""
    folder = tmp_path / "data" / "uoft-cs" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    for split, rows in (("train", 16), ("test", 10)):
        images = []
        for pixels in torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8).numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        table = pyarrow.table({"img": images, "label": [i % 10 for i in range(rows)]})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights as a training run leaves them, of the smallest network."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(timm.create_model("plain_cnn8_cifar").state_dict(), path)
    return path


def run(name: str, *args: str) -> dict[str, Any]:
    """Run the example ``name`` and return the figures it wrote."""
    import_module(name).main([*args, "--out", "figures.json"])
    report = json.loads(Path("figures.json").read_text())
    assert report["device"] == "cpu"
    assert report["name"]
    assert torch.__version__.startswith(report["torch"])
    return report


def test_resnet18_with_and_without_attention(small_cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(
        "resnet18_attention", "--data-dir", str(small_cifar), "--images", "16", "--epochs", "1", "--batch-size", "8",
        *SHORT)
    plain, attention = report["runs"]
    assert (plain["attention"], attention["attention"]) == (False, True)
    assert plain["parameters"] == 11_181_642  # timm's resnet18 with 10 classes
    assert attention["parameters"] > plain["parameters"]
    gain = 100 * (attention["accuracy"] - plain["accuracy"])
    assert report["gain_in_points"] == pytest.approx(gain, abs=0.01)
    assert report["time_ratio"] > 0
    assert f"attention changes the accuracy by {gain:+.2f} points" in capsys.readouterr().out


def test_both_resnets_begin_with_the_same_outputs() -> None:
    example = import_module("resnet18_attention")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain, attention = (example.create_model(flag, seed=3).eval()(images) for flag in (False, True))
    assert (plain - attention).abs().max() <= 1e-5


def test_finetuning_takes_the_weights_and_slows_early_layers(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = import_module("finetune")
    rates, first_weights = [], []

    def record(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> float:
        first_conv = model.stages[0].blocks.conv0.weight
        first_weights.append(first_conv.detach().clone())
        seconds = train(model, optimizer, *args, **kwargs)
        lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates.append(lr[id(first_conv)] / lr[id(model.head.fc.weight)])
        return seconds

    train = example.train
    digits = example.load_dataset("digits")
    few = replace(digits, test_images=digits.test_images[:20], test_labels=digits.test_labels[:20])
    monkeypatch.setattr(example, "train", record)
    monkeypatch.setattr(example, "load_dataset", lambda *args: few)
    report = run(
        "finetune", "--model", "plain_cnn8_cifar", "--weights", str(weights), "--images", "32", "--epochs", "1",
        "--batch-size", "16", "--seed", "1", *SHORT)
    assert report["accuracy"].keys() == {"finetuned", "scratch"}
    assert all(0 <= value <= 1 for value in report["accuracy"].values())
    trained = safetensors.torch.load_file(weights)["stages.0.blocks.conv0.weight"]
    assert torch.equal(first_weights[0], trained)
    assert not torch.equal(first_weights[1], trained)
    assert rates[0] == pytest.approx(0.7 ** 4)  # four stages lie before the classifier
    assert rates[1] == 1


@pytest.mark.parametrize(("example", "args", "message"), [
    ("finetune", ["--weights", "nowhere.safetensors"], "error: --weights nowhere.safetensors is not a file"),
    ("finetune", ["--model", "ran_att452_cifar_orig.cifar100"],
     "error: the package has no weights for ran_att452_cifar_orig.cifar100"),
    ("finetune", ["--model", "ran_att57_cifar"], "error: --model ran_att57_cifar is not a timm model; did"),
    ("finetune", ["--lr", "-1"], "argument --lr: must be a number above 0, got '-1'"),
    ("segmentation", ["--backbone", "nosuch"], "error: --backbone nosuch is not a timm model"),
    ("export_onnx", ["--model", "nosuch"], "error: --model nosuch is not a timm model"),
    ("finetune", ["--dataset", "cifar100", "--data-dir", "nowhere"],
     "error: no Parquet files of uoft-cs/cifar100 under"),
    ("finetune", ["--layer-decay", "nan"], "argument --layer-decay: must be a number above 0, got 'nan'"),
    ("segmentation", ["--backbone", "vit_tiny_patch16_224", "--test-images", "2"],
     "error: --backbone vit_tiny_patch16_224 gives no feature maps of 64x64 images"),
    ("finetune", ["--images", "-1"], "argument --images: must be at least 1, got -1"),
    ("finetune", ["--device", "abacus"], "error: --device abacus is not available here"),
    ("finetune", ["--out", "/proc/none/report.json"], "error: --out /proc/none/report.json cannot be written to ("),
    ("resnet18_attention", ["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
    ("resnet18_attention", ["--device", "abacus"], "error: --device abacus is not available here"),
    ("segmentation", ["--test-images", "0"], "argument --test-images: must be at least 1, got 0"),
    ("segmentation", ["--device", "abacus"], "error: --device abacus is not available here"),
    ("export_onnx", ["--weights", "nowhere.safetensors"], "error: --weights nowhere.safetensors is not a file"),
    ("export_onnx", ["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
])
def test_unusable_arguments(capsys: pytest.CaptureFixture[str], example: str, args: list[str], message: str) -> None:
    if example == "export_onnx":
        pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    with pytest.raises(SystemExit) as exit_info:
        import_module(example).main(args)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("*.json"))


def test_more_images_than_there_are_and_too_few(small_cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--data-dir", str(small_cifar), "--epochs", "1", "--batch-size", "8", *SHORT]
    report = run("resnet18_attention", *command, "--images", "100")
    assert report["images"] == 16
    assert report["time_ratio"] > 0
    with pytest.raises(SystemExit):
        import_module("resnet18_attention").main([*command, "--images", "1"])
    assert "--images and --batch-size must be at least 2" in capsys.readouterr().err


def test_an_exported_network_that_gives_no_numbers_fails(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    state = safetensors.torch.load_file(weights)
    state["head.fc.bias"][:] = torch.nan
    safetensors.torch.save_file(state, weights)
    with pytest.raises(SystemExit):
        run("export_onnx", "--model", "plain_cnn8_cifar", "--weights", str(weights), "--repeats", "1")
    assert "error: the exported network computes something else" in capsys.readouterr().err


def test_finetuning_of_a_run_of_ones_own(tmp_path: Path) -> None:
    source = timm.create_model("plain_cnn8_cifar", channels=(8, 8, 8, 8))
    timm.models.save_for_hf(source, tmp_path / "run", model_args={"channels": (8, 8, 8, 8)}, safe_serialization=True)
    report = run("finetune", "--model", f"local-dir:{tmp_path / 'run'}", "--images", "32", "--epochs", "1", *SHORT)
    assert report["model"] == f"local-dir:{tmp_path / 'run'}"


def test_segmentation_runs_and_its_labels_fit_its_images() -> None:
    report = run("segmentation", "--steps", "2", "--batch-size", "2", "--test-images", "4", *SHORT)
    assert 0 <= report["mean_iou"] <= 1
    example = import_module("segmentation")
    digits = torch.zeros(1, 32, 32)
    digits[0, 10:20, 10:20] = 0.9
    images, targets = example.make_batch(digits, torch.tensor([6]), 3, torch.Generator().manual_seed(0))
    assert torch.equal(targets == 7, images[:, 0] > 0.5)
    assert (targets == 7).flatten(1).sum(1).tolist() == [200, 200, 200]

    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot((x[:, 0] > 0.5).long() * 7, 11).permute(0, 3, 1, 2)

    assert example.mean_iou(Perfect(), [(images, targets)], torch.device("cpu")) == 1


def test_export_to_onnx_gives_the_same_outputs(weights: Path) -> None:
    report = run(
        "export_onnx", "--model", "plain_cnn8_cifar", "--weights", str(weights), "--repeats", "1",
        "--onnx", "model.onnx")
    assert Path("model.onnx").is_file()
    assert report["batch_sizes"].keys() == {"1", "16"}
    for figures in report["batch_sizes"].values():
        assert figures["largest_difference"] < 1e-4
        assert all(ms > 0 for ms in figures["milliseconds"].values())


@pytest.mark.parametrize(("model", "trained"), [("ran_att56_cifar.cifar10", True), ("plain_cnn8_cifar", False)])
def test_what_is_exported_is_trained_where_the_name_has_weights(capsys, model: str, trained: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    assert run("export_onnx", "--model", model, "--repeats", "1", "--onnx", "model.onnx")["trained"] is trained
    assert (f"random weights: {model} names none" in capsys.readouterr().out) is not trained
    expected = timm.create_model(model, pretrained=trained).eval()
    images = torch.zeros(1, 3, 32, 32)
    logits, = onnxruntime.InferenceSession("model.onnx").run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), expected(images), atol=1e-3) is trained


def test_a_backbone_is_trained_where_its_name_has_weights() -> None:
    segmenter = import_module("segmentation").Segmenter
    weights = timm.create_model("ran_att56_cifar.cifar10", pretrained=True).state_dict()
    for name, trained in (("ran_att56_cifar.cifar10", True), ("ran_att56_cifar", False)):
        stem = next(iter(segmenter(name).backbone.parameters()))
        assert any(torch.equal(stem, value) for value in weights.values()) is trained


def test_weights_of_another_network(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        import_module("finetune").main(["--model", "ran_att56_cifar", "--weights", str(weights), "--device", "cpu"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --weights {weights} are not those of ran_att56_cifar (")
    assert error.count("\n") == 1
