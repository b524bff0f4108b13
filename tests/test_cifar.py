"""The training script `benchmarks/cifar.py`, in small."""
import json
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cifar  # noqa: E402
from small_training import small  # noqa: E402

from harness import augment  # noqa: E402
from harness.checkpoint import FILE_NAME, load_checkpoint  # noqa: E402
from harness.data import corrupt_labels, load_dataset  # noqa: E402
from harness.evaluate import evaluate  # noqa: E402
from harness.export import load_exported  # noqa: E402
from harness.muon import Muon, orthogonalize  # noqa: E402
from harness.options import parse_args  # noqa: E402
from harness.recipes import lr_scale, make_recipe, resolution_at, sides_seen  # noqa: E402

SMALL = ["--dataset", "digits", "--device", "cpu", "--limit", "160", "--epochs", "2"]


def run(*args: str) -> None:
    cifar.main(small(*SMALL, *args))


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run the script, expect exit code 2 and one line of error, and return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        cifar.main([*map(str, args)] if "--eval-only" in args else small(*SMALL, *args))
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_run_leaves_a_loadable_model_and_its_result(tmp_path, capsys):
    run("--out", tmp_path / "run", "--recipe", "best", "--holdout", "32")
    text = capsys.readouterr().out
    assert "0.01 M parameters, 1.4 MMACs an image" in text
    assert "epoch 2/2" in text
    assert "held-out top-1" in text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["epoch"] for row in result["epochs"]] == [1, 2]
    assert result["final"]["error"] == pytest.approx(100 - result["final"]["top1"])
    assert "held out" in result["selection"]
    assert result["settings"]["optimizer"] == "muon"
    assert result["hardware"]["device"] == "cpu"
    assert str(tmp_path) not in result["command"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")

    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert model.num_classes == 10
    assert model.pretrained_cfg["label_names"] == [str(i) for i in range(10)]

    cifar.main(["--eval-only", "--device", "cpu", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert f"test top-1 {result['final']['top1']:.2f} %" in text
    assert "trained" not in text

    evaluation = ("--eval-only", "--out", tmp_path / "run")
    assert "--dataset cifar10: the run in" in fails(capsys, *evaluation, "--dataset", "cifar10")
    assert "is of plain_cnn8_cifar; leave it out" in fails(capsys, *evaluation, "--model", "ran_att56_cifar")


def test_pretrained_weights_are_evaluated(capsys, monkeypatch):
    digits = load_dataset("digits")
    monkeypatch.setattr(cifar, "load_dataset", lambda name, data_dir: digits)  # in the place of CIFAR-10
    model = timm.create_model("ran_att56_cifar.cifar10", pretrained=True).eval()
    expected = evaluate(
        model, digits.test_images, digits.test_labels, torch.device("cpu"), torch.autocast("cpu", enabled=False))
    command = ["--eval-only", "--device", "cpu", "--precision", "fp32", "--model", "ran_att56_cifar.cifar10"]
    cifar.main(command)
    assert f"ran_att56_cifar.cifar10 on cifar10: test top-1 {expected['top1']:.2f} %" in capsys.readouterr().out

    digits.class_names = digits.class_names * 10
    for args, message in (
            ([*command, "--dataset", "cifar100"], "has weights for 10 classes, the data set has 100"),
            (["--eval-only", "--model", "plain_cnn8_cifar"], "plain_cnn8_cifar: cannot get pretrained weights"),
            (["--eval-only"], "--eval-only needs --out, the folder of a finished run, or --model")):
        with pytest.raises(SystemExit):
            cifar.main(args)
        assert message in capsys.readouterr().err


def test_a_name_of_weights_does_not_promise_them():
    def line(*args, resumed=False):
        return cifar.row_of_weights(parse_args(args), resumed).get("begins with", "")

    assert line("--model", "ran_att56_cifar") == ""
    assert "random weights, not those of the name" in line("--model", "ran_att56_cifar.cifar10")
    assert line("--model", "ran_att56_cifar.cifar10", "--initial-checkpoint", "file") == "file"
    assert line("--model", "ran_att56_cifar.cifar10", resumed=True) == ""


def test_progress_bar_ends_with_the_figures_of_the_epoch(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(cifar.Display, "step", lambda self, step, loss, top1: shown.append((loss, top1)))
    run("--epochs", "1", "--out", tmp_path / "run")
    (row,) = json.loads((tmp_path / "run" / "result.json").read_text())["epochs"]
    assert shown[-1] == pytest.approx((row["train_loss"], row["train_top1"]))


def test_model_kwargs_travel_with_the_weights(tmp_path):
    run("--model", "ran_att56_cifar", "--model-kwargs", 'attention_args={"learning": "naive"}', "--epochs", "1",
        "--limit", "64", "--out", tmp_path / "run")
    assert load_exported(tmp_path / "run").stages[0].blocks[1].residual is False
    assert (tmp_path / "run" / "masks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("step", [3, 5])
def test_interrupted_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capsys, optimizer, step):
    # Five steps an epoch: 3 stops inside an epoch, 5 at its last step.
    args = ["--optimizer", optimizer, "--lr", "0.01", "--ema-decay", "0.9", "--cutmix", "1", "--mixup", "0.5",
            "--cutout", "8", "--rotate", "10", "--shift", "0.1", "--flip", "random", "--drop-path", "0.1"]
    run(*args, "--out", tmp_path / "whole")

    calls = 0
    resize = augment.resize

    def interrupt(images, side):
        nonlocal calls
        calls += 1
        if calls == step:
            signal.raise_signal(signal.SIGTERM)
        return resize(images, side)

    with monkeypatch.context() as patch:
        patch.setattr(augment, "resize", interrupt)
        with pytest.raises(SystemExit) as exit_info:
            run(*args, "--out", tmp_path / "cut")
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert f"stopped at step {step} of 10, saved; go on with: python benchmarks/cifar.py" in capsys.readouterr().out
    # The same command goes on, and so does one that says only where: the checkpoint has the settings.
    again = small(*SMALL, *args) if step == 5 else ["--device", "cpu"]
    cifar.main([*again, "--out", str(tmp_path / "cut"), "--resume"])

    whole, cut = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert whole[0].keys() == cut[0].keys()
    for name, tensor in whole[0].items():
        assert torch.equal(tensor, cut[0][name]), name
    for a, b in zip(whole[1]["epochs"], cut[1]["epochs"], strict=True):
        assert a["train_loss"] == b["train_loss"]


def test_same_seed_same_weights_other_seed_others(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("--seed", seed, "--epochs", "1", "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_nothing_is_overwritten(tmp_path, capsys):
    out = tmp_path / "run"
    run("--epochs", "1", "--out", out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "already has a run" in fails(capsys, "--out", out)
    assert "--resume: the checkpoint" in fails(capsys, "--out", out, "--resume", "--epochs", "3")
    assert "seed = 0, this command 5" in fails(capsys, "--out", out, "--resume", "--epochs", "1", "--seed", "5")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_muon_without_a_gradient_to_orthogonalise():
    weight, bias = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    optimizer = Muon([{"params": [weight], "orthogonalize": True}, {"params": [bias]}], lr=0.1)
    bias.sum().backward()
    optimizer.step()
    assert weight.eq(1).all()
    assert bias.lt(1).all()


def test_damaged_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    assert "no checkpoint to resume" in fails(capsys, "--out", out, "--resume")
    run("--epochs", "1", "--out", out)
    content = (out / FILE_NAME).read_bytes()
    for damaged in (content[:-100], b"\xff" * 100, b"", b"\x80\x04\x95pickle"):
        (out / FILE_NAME).write_bytes(damaged)
        assert "is damaged" in fails(capsys, "--out", out, "--resume", "--epochs", "1")


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    calls = 0
    resize = augment.resize

    def poison(images, side):
        nonlocal calls
        calls += 1
        return resize(images, side) * (float("nan") if calls == 7 else 1.0)

    monkeypatch.setattr(augment, "resize", poison)
    assert "not a number in epoch 2; the last good checkpoint is kept" in fails(capsys, "--out", tmp_path / "run")
    tensors, state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_signal_does_not_save_what_is_not_a_number(tmp_path, monkeypatch, capsys):
    run("--epochs", "1", "--schedule", "constant", "--out", tmp_path / "good")
    before = (tmp_path / "good" / FILE_NAME).read_bytes()
    step = cifar.Display.step

    def interrupt(display, number, *figures):
        step(display, number, *figures)
        if number % 5 == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cifar.Display, "step", interrupt)
    message = fails(capsys, "--lr", "1e20", "--schedule", "constant", "--out", tmp_path / "bad")
    assert "not a number in epoch 1; there was no checkpoint yet" in message
    assert not (tmp_path / "bad" / FILE_NAME).exists()
    assert (tmp_path / "good" / FILE_NAME).read_bytes() == before


def test_a_run_resumed_by_its_folder_keeps_its_command(tmp_path, monkeypatch):
    out, step = tmp_path / "run", cifar.Display.step

    def interrupt(display, number, *figures):
        step(display, number, *figures)
        if number == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cifar.Display, "step", interrupt)
    with pytest.raises(SystemExit):
        run("--lr", "0.01", "--eval-every", "1", "--out", out)
    monkeypatch.setattr(cifar.Display, "step", step)
    cifar.main(["--resume", "--device", "cpu", "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert "--limit 160" in result["command"]
    assert "--lr 0.01 --eval-every 1" in result["command"]
    assert all("eval_top1" in row for row in result["epochs"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dataset": "digits"}'])
def test_a_result_that_is_none_is_not_evaluated(tmp_path, capsys, text):
    (tmp_path / "result.json").write_text(text)
    assert "--eval-only: no finished run in" in fails(capsys, "--eval-only", "--out", tmp_path)


def test_ctrl_c_before_and_after_the_training(tmp_path, monkeypatch):
    """In the training it ends with a checkpoint; elsewhere it ends the process at once, without a traceback."""
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt  # no signal: who runs tests in the background may have it ignored

    for moment in ("load_dataset", "write_result"):
        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            patch.setattr(cifar, moment, interrupted)
            with pytest.raises(SystemExit) as exit_info:
                run("--out", tmp_path / moment)
        assert exit_info.value.code == 130
        assert signal.getsignal(signal.SIGINT) is handler


def test_out_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"--out {out} cannot be made a folder" in fails(capsys, "--out", out)
    assert (tmp_path / "file").read_text() == ""


def test_report_recipe_drops_the_learning_rate_at_epochs_80_and_120():
    recipe = make_recipe("report", "cifar10", {})
    assert recipe.epochs == 160
    rates = [recipe.lr * lr_scale(recipe, epoch / recipe.epochs) for epoch in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_onecycle_and_resolutions():
    recipe = make_recipe("best", "cifar10", {})
    scales = [lr_scale(recipe, step / 100) for step in range(100)]
    assert max(scales) == pytest.approx(1) == scales[10]
    assert scales[0] == 0
    assert 0 < scales[99] < 0.02
    assert [resolution_at(recipe, progress, 32) for progress in (0, 0.39, 0.4, 1)] == [24, 24, 32, 32]


def test_the_time_left_knows_the_resolutions_to_come(monkeypatch):
    recipe = make_recipe("best", "cifar10", {})
    assert sides_seen(recipe, 0.2, 32) == pytest.approx(0.2 * 24)
    assert sides_seen(recipe, 1.0, 32) == pytest.approx(0.4 * 24 + 0.6 * 32)
    assert sides_seen(make_recipe("report", "cifar10", {}), 0.5, 32) == pytest.approx(0.5 * 32)
    clock = iter((100.0, 110.0))
    monkeypatch.setattr("harness.display.time.perf_counter", lambda: next(clock))
    display = cifar.Display(10, 10, 256, first_step=20, work=lambda progress: sides_seen(recipe, progress, 32))
    # 10 seconds for steps 20 to 30 at 24 pixels; then come 10 at 24, and 60 at 32.
    assert display.time_left(30) == pytest.approx(10 + 60 * 32 / 24)


def test_label_noise_is_of_the_share_asked_for_and_spares_no_class():
    labels = torch.arange(10).repeat(1000)
    noisy = corrupt_labels(labels, 10, 0.3, seed=0)
    wrong = noisy != labels
    assert wrong.float().mean() == pytest.approx(0.3, abs=0.02)
    assert set(((noisy - labels) % 10)[wrong].tolist()) == set(range(1, 10))
    assert torch.equal(corrupt_labels(labels, 10, 0.3, seed=0), noisy)
    assert not torch.equal(corrupt_labels(labels, 10, 0.3, seed=1), noisy)
    assert torch.equal(corrupt_labels(labels, 10, 0.0, seed=0), labels)


def test_muon_update_is_orthogonal():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 64, 1, 1), (64, 16, 1, 1), (16, 16, 3, 3), (16, 16, 3, 3)]
    updates = [torch.randn(shape, generator=generator) for shape in shapes]
    for update, result in zip(updates, orthogonalize(updates), strict=True):
        rows, columns = len(update), update[0].numel()
        u, _, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
        singular = torch.linalg.svdvals(result.flatten(1)) / max(1, rows / columns) ** 0.5
        assert result.shape == update.shape
        assert singular.min() > 0.6
        assert singular.max() < 1.3
        # The singular vectors are those of the update, and none is turned round.
        between = u.T @ result.flatten(1) @ v.T
        assert torch.linalg.matrix_norm(between - torch.diag(between.diagonal())) < 0.05 * result.norm()
        assert between.diagonal().min() > 0


def test_without_network_the_message_names_the_ways_out(tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    line = fails(capsys, "--dataset", "cifar10", "--out", tmp_path / "run")
    assert "cannot get uoft-cs/cifar10 from the Hub" in line
    assert "--data-dir" in line
    assert "--dataset digits" in line
