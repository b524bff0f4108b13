"""Training that begins with the weights of another run: `benchmarks/cifar.py --initial-checkpoint`."""
import hashlib
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cifar
from small_training import small

from harness.options import parse_args
from harness.recipes import make_recipe

SMALL = ["--device", "cpu", "--limit", "160", "--epochs", "1"]


def run(out: Path, *args: object, dataset: str = "digits") -> dict[str, torch.Tensor]:
    """Train, and return the weights."""
    cifar.main(small(*SMALL, "--dataset", dataset, "--out", out, *args))
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a finished run."""
    out = tmp_path_factory.mktemp("first")
    run(out)
    return out / "model.safetensors"


def error(capsys: pytest.CaptureFixture[str], out: Path, *args: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(out, *args)
    assert exit_info.value.code == 2
    assert not out.exists()
    return capsys.readouterr().err.strip()


def test_a_run_without_learning_keeps_the_weights_it_began_with(first, tmp_path, capsys):
    weights = run(tmp_path / "second", "--initial-checkpoint", first, "--lr", 0, "--seed", 1)
    assert f"begins with: {first}" in capsys.readouterr().out
    params = {name for name in weights if "running" not in name and "num_batches" not in name}
    before = load_file(first)
    assert params
    assert all(torch.equal(weights[name], before[name]) for name in params)
    result = json.loads((tmp_path / "second" / "result.json").read_text())
    assert result["settings"]["initial_checkpoint"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert f"--initial-checkpoint {first}" in result["command"]
    before = json.loads(first.with_name("result.json").read_text())
    assert [(run["command"], run["epochs"], run["error"]) for run in result["earlier"]] == [
        (before["command"], 1, before["final"]["error"])]


def test_an_interrupted_run_needs_the_weights_no_more(first, tmp_path, monkeypatch):
    undisturbed = run(tmp_path / "undisturbed", "--initial-checkpoint", first)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(first.read_bytes())
    step = cifar.Display.step

    def interrupt(display, number, *figures):
        step(display, number, *figures)
        if number == 1:
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cifar.Display, "step", interrupt)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", "--initial-checkpoint", copy)
    finally:
        signal.signal(signal.SIGTERM, handler)
    monkeypatch.setattr(cifar.Display, "step", step)
    copy.unlink()
    resumed = run(tmp_path / "stopped", "--resume")
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())
    third = run(tmp_path / "third", "--initial-checkpoint", tmp_path / "stopped" / "model.safetensors")
    assert third
    result = json.loads((tmp_path / "third" / "result.json").read_text())
    assert len(result["earlier"]) == 1  # the weights before those lay in a folder of their own, without a record


def test_other_weights_are_refused_to_resume_with(first, tmp_path, capsys):
    run(tmp_path / "run", "--initial-checkpoint", first)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--resume", "--initial-checkpoint", tmp_path / "run" / "model.safetensors")
    assert "has initial_checkpoint = " in capsys.readouterr().err


def test_a_classifier_of_other_classes_begins_anew(first):
    args = parse_args(small(*SMALL, "--dataset", "digits"))
    data = cifar.load_dataset("digits", None)
    data.class_names = data.class_names[:7]
    model, _ = cifar.build_model(args, make_recipe("quick", "digits", {}), data)
    classifier = {name: value.clone() for name, value in model.get_classifier().state_dict().items()}
    weights = load_file(first)
    cifar.load_initial_weights(model, weights, first)
    after = model.state_dict()
    name = model.pretrained_cfg["classifier"]
    assert all(torch.equal(after[f"{name}.{part}"], value) for part, value in classifier.items())
    assert all(torch.equal(after[key], value) for key, value in weights.items() if not key.startswith(name + "."))


def test_the_folder_is_another_than_that_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--initial-checkpoint", "runs/plain_cnn8_cifar-digits-quick-0/model.safetensors"]):
        cifar.main(small(*SMALL, "--dataset", "digits", *more))
    assert {path.name for path in Path("runs").iterdir()} == {
        "plain_cnn8_cifar-digits-quick-0", "plain_cnn8_cifar-digits-quick-0-further"}


def test_unusable_weights(first, tmp_path, capsys):
    out = tmp_path / "run"
    assert "No such file" in error(capsys, out, "--initial-checkpoint", tmp_path / "none.safetensors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / first.name).write_bytes(first.read_bytes())
    (tmp_path / "other" / "result.json").write_text("{}")
    assert "result.json is damaged" in error(capsys, out, "--initial-checkpoint", tmp_path / "other" / first.name)
    pickle = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(1)}, pickle)
    assert f"{pickle} is not a safetensors file" in error(capsys, out, "--initial-checkpoint", pickle)
    message = error(capsys, out, "--initial-checkpoint", first, "--model", "resnet18")
    assert f"--initial-checkpoint {first}: " in message
    assert "it must be of the same --model" in message
