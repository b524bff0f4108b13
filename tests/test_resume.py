"""What may be resumed: checkpoints as they were written, on the same data, in a folder that nobody else has."""
import argparse
import contextlib
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cifar
from small_training import small
from test_cifar import fails, run
from test_data import NOISE, encoded, write_parquet
from test_recipes import make_trainer

from harness import ctrl_c, export, trainer
from harness.checkpoint import FILE_NAME, CheckpointWriter, claim, load_checkpoint
from harness.errors import RunError
from harness.recipes import make_recipe
from harness.resume import command_to_resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run("--epochs", "1", "--out", out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


def drop(name):
    return lambda tensors, state: tensors.pop(name)


def put(name, value):
    return lambda tensors, state: tensors.update({name: value})


def tell(name, value):
    return lambda tensors, state: state.update({name: value})


@pytest.mark.parametrize("edit", [
    drop("generator"), drop("model.head.fc.weight"), drop("optimizer.0.momentum_buffer"),
    put("model.other", torch.zeros(1)), put("model.head.fc.bias", torch.full((10,), torch.nan)),
    put("model.head.fc.bias", torch.zeros(10, dtype=torch.int64)), put("optimizer.0.momentum_buffer", torch.zeros(3)),
    tell("step", 10 ** 6), tell("step", -5), tell("step", "3"), tell("epochs", []), tell("settings", []),
    tell("settings", {}), lambda tensors, state: state["settings"].update(lr="big"),
    lambda tensors, state: state.clear(),
])
def test_an_edited_checkpoint_is_not_resumed(out, capsys, edit):
    path = out / FILE_NAME
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    state = json.loads(metadata["state"])
    edit(tensors, state)
    safetensors.torch.save_file(tensors, path, metadata={**metadata, "state": json.dumps(state)})
    before = contents(out)
    assert f"{FILE_NAME} is damaged (its content is not what its digest was made of); remove it" in fails(
        capsys, "--epochs", "1", "--out", out, "--resume")
    assert contents(out) == before


def test_what_ran_where_is_kept_when_nothing_is_left_to_train(out, monkeypatch):
    before = json.loads((out / "result.json").read_text())
    assert before["deterministic"] is False
    monkeypatch.setattr(cifar, "hardware", lambda device: {"device": "cpu", "name": "another"})
    run("--epochs", "1", "--out", out, "--resume")
    assert json.loads((out / "result.json").read_text()) == before


def test_other_threads_are_said(tmp_path, monkeypatch, capsys):
    command = small("--dataset", "digits", "--device", "cpu", "--limit", "64", "--epochs", "2", "--batch-size", "32",
                    "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(cifar.Display, "step", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            cifar.main(command)
        with pytest.raises(SystemExit):
            cifar.main([*command, "--resume"])
    assert "other hardware" not in capsys.readouterr().out
    threads = cifar.hardware(torch.device("cpu"))["threads"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    cifar.main([*command, "--resume"])
    said = f"(threads is {threads + 1}, was {threads}): equal to an undisturbed run but for rounding"
    assert f"resumed with other hardware or threads {said}" in capsys.readouterr().out


def test_settings_are_those_of_the_run_in_the_default_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = small("--dataset", "digits", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(cifar.Display, "step", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            cifar.main([*command, "--epochs", "1", "--limit", "64", "--deterministic", "--compile", "off"])
    chosen = []
    monkeypatch.setattr(cifar, "choose_kernels", chosen.append)
    cifar.main([*command, "--resume"])
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["settings"]["limit"] == 64
    assert json.loads(result.read_text())["deterministic"] is True
    assert chosen == [True]


def test_batches_to_normalise_over_are_named_as_what_decides_them(out, capsys):
    tensors, state = load_checkpoint(out)
    state["settings"]["bn_batch"] //= 2
    with CheckpointWriter(out) as writer:
        writer.save(tensors, state)
    line = fails(capsys, "--epochs", "1", "--out", out, "--resume")
    assert "over batches of 16 images of 32, this command over 32; with --no-sync-bn it takes as many processes" in line


def test_wrong_labels_of_an_earlier_version_are_not_gone_on_with(tmp_path, capsys):
    settings = ("--epochs", "1", "--limit", "64", "--label-noise", "0.5", "--out", tmp_path)
    run(*settings)
    run(*settings, "--resume")
    assert len(json.loads((tmp_path / "result.json").read_text())["labels_sha256"]) == 64
    tensors, state = load_checkpoint(tmp_path)
    for labels in (None, "another"):
        state.pop("labels_sha256", None) if labels is None else state.update(labels_sha256=labels)
        with CheckpointWriter(tmp_path) as writer:
            writer.save(tensors, state)
        assert "began with other wrong labels, of an earlier version" in fails(capsys, *settings, "--resume")
    state["data_sha256"] = "another"  # other images have other labels too
    with CheckpointWriter(tmp_path) as writer:
        writer.save(tensors, state)
    assert "--resume: the training images are not those" in fails(capsys, *settings, "--resume")


def test_a_folder_whose_name_ends_like_a_flag():
    args = argparse.Namespace(argv=["--out", "my--resume"])
    assert command_to_resume(args, Path("my--resume"), 1).endswith("--out my--resume --resume")


def test_the_middle_of_an_epoch_is_gone_on_with_on_the_same_kind_of_device():
    recipe = make_recipe("quick", "digits", {})
    tensors, state = make_trainer(recipe).state()
    make_trainer(recipe).restore(tensors, {**state, "device": "cuda"})
    with pytest.raises(RunError, match=r"the middle of an epoch on cuda and goes on there \(--device cuda\)"):
        make_trainer(recipe).restore(tensors, {**state, "device": "cuda", "step": 1})


def test_a_checkpoint_without_digest(out, capsys):
    tensors, state = load_checkpoint(out)
    safetensors.torch.save_file(tensors, out / FILE_NAME, metadata={"state": json.dumps(state)})
    assert "is damaged ('sha256')" in fails(capsys, "--epochs", "1", "--out", out, "--resume")


def test_other_images_of_the_same_name_are_refused(tmp_path, capsys):
    write_parquet(tmp_path / "first", labels=[0, 1, 2, 3], image=encoded(NOISE, "PNG"))
    write_parquet(tmp_path / "other", labels=[0, 1, 2, 4], image=encoded(NOISE, "PNG"))
    settings = ("--dataset", "cifar10", "--limit", 0, "--batch-size", 4, "--epochs", 1, "--out", tmp_path / "run")
    run(*settings, "--data-dir", tmp_path / "first")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["data_sha256"]) == 64
    before = contents(tmp_path / "run")
    line = fails(capsys, *settings, "--resume", "--data-dir", tmp_path / "other")
    assert "--resume: the training images are not those" in line
    assert contents(tmp_path / "run") == before
    (tmp_path / "first").rename(tmp_path / "moved")
    run(*settings, "--resume", "--data-dir", tmp_path / "moved")


def test_weights_that_are_no_numbers_are_neither_kept_nor_exported(tmp_path, capsys):
    line = fails(capsys, "--lr", 1e39, "--warmup", 0, "--precision", "fp32", "--limit", 64, "--batch-size",
                 64, "--epochs", 1, "--out", tmp_path / "run")
    assert line.endswith("any more after epoch 1; there was no checkpoint yet; try a lower --lr"), line
    assert list((tmp_path / "run").iterdir()) == []


def test_a_diverged_run_goes_on_from_its_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    train_epoch = trainer.Trainer.train_epoch

    def diverges(self, *args):
        if self.step:
            self.sums += torch.inf
        return train_epoch(self, *args)

    monkeypatch.setattr(trainer.Trainer, "train_epoch", diverges)
    line = fails(capsys, "--out", tmp_path / "run")
    kept = tmp_path / "run" / FILE_NAME
    assert "the loss is not a number in epoch 2; the last good checkpoint is kept" in line
    assert line.endswith(f"from there with --initial-checkpoint {kept}")
    monkeypatch.undo()
    run("--lr", 0, "--epochs", 1, "--initial-checkpoint", kept, "--out", tmp_path / "second")
    weights = safetensors.torch.load_file(tmp_path / "second" / "model.safetensors")
    tensors, _ = load_checkpoint(tmp_path / "run")
    assert torch.equal(weights["head.fc.weight"], tensors["model.head.fc.weight"])


def test_one_process_a_folder(tmp_path, capsys):
    with claim(tmp_path / "run"):
        assert f"--out {tmp_path / 'run'} is in use by another process" in fails(capsys, "--out", tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []
    run("--epochs", "1", "--out", tmp_path / "run")


def test_a_run_that_another_process_finished_in_the_meantime(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def claimed_late(folder):
        folder.mkdir()
        (folder / "result.json").touch()
        yield

    monkeypatch.setattr(cifar, "claim", claimed_late)
    assert "already has a run" in fails(capsys, "--out", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path, monkeypatch, capsys):
    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("harness.checkpoint.tempfile.TemporaryFile", read_only)
    monkeypatch.setattr(trainer.Trainer, "train_step", None)
    assert f"--out {tmp_path} cannot be written to (Read-only file system); name another" in fails(
        capsys, "--out", tmp_path)
    assert "argument --out: must be of printable characters without # and ?, and begin with one slash at most, got " \
           "'\\udcff'" in fails(capsys, "--out", "\udcff")


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("harness.checkpoint.fcntl.flock", no_locks)
    with claim(tmp_path), claim(tmp_path):
        pass
    with pytest.raises(RunError, match="what the block raises"), claim(tmp_path):
        raise RunError("what the block raises")


def test_a_finished_epoch_is_saved_before_it_is_told(tmp_path, monkeypatch):
    def nobody_reads(self, row):
        raise BrokenPipeError

    monkeypatch.setattr(cifar.Display, "epoch", nobody_reads)
    monkeypatch.setattr("harness.errors.os.dup2", lambda *_: None)
    with pytest.raises(SystemExit):
        run("--out", tmp_path)
    assert len(load_checkpoint(tmp_path)[1]["epochs"]) == 1


def test_a_disk_full_at_the_end_costs_no_training(tmp_path, monkeypatch, capsys):
    def full(*args, **_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_for_hf", full)
    assert f"cannot write the model to {tmp_path} (No space left on device); make room there" in fails(
        capsys, "--epochs", 1, "--out", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(trainer.Trainer, "train_step", None)
    run("--epochs", 1, "--resume", "--out", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_interrupted_in_the_last_evaluation(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar, "write_result", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        run("--epochs", 1, "--out", tmp_path)
    assert exit_info.value.code == 130
    told = capsys.readouterr().out
    assert "trained, but stopped before the result was written; that is done by: python benchmarks/cifar.py" in told
    assert told.strip().endswith(f"--out {tmp_path} --resume")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_asks_to_end_is_heard_unless_it_is_ignored(name):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"there is no {name} on this system")
    before = signal.getsignal(number)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(number, handler)
            received = []
            with ctrl_c.handled_by(lambda got, _, received=received: received.append(got)):
                signal.raise_signal(number)
            assert received == ([number] if handler == signal.SIG_DFL else [])
            assert signal.getsignal(number) == handler
            if handler == signal.SIG_DFL:
                with pytest.raises(KeyboardInterrupt), ctrl_c.all_as_ctrl_c():
                    signal.raise_signal(number)
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there are no hangups on this system")
@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["heard", "ignored"])
def test_a_training_hears_hangups_unless_they_are_ignored(monkeypatch, handler):
    class Stop(Exception):
        pass

    def look(_):
        seen.append(signal.getsignal(signal.SIGHUP))
        raise Stop

    seen = []
    before = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(cifar, "CheckpointWriter", look)
    try:
        signal.signal(signal.SIGHUP, handler)
        with pytest.raises(Stop):
            cifar.run_epochs(
                SimpleNamespace(args=None, out=None, world=None), SimpleNamespace(model=torch.nn.Identity()), None)
        assert (seen == [handler]) == (handler == signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_to_resume_is_for_the_folder_one_is_in(tmp_path, monkeypatch):
    args = argparse.Namespace(argv=["--out", "run"])
    monkeypatch.chdir(Path(cifar.__file__).parents[1])
    assert command_to_resume(args, Path("run"), 1) == "python benchmarks/cifar.py --out run --resume"
    monkeypatch.chdir(tmp_path)
    script = Path(command_to_resume(args, Path("run"), 1).split()[1])
    assert script.is_absolute()
    assert script.samefile(cifar.__file__)


def test_what_a_run_began_without_is_not_said_of_it(tmp_path, capsys):
    run("--epochs", "1", "--out", tmp_path)
    assert f"--resume: the run in {tmp_path} began without --deterministic; leave it out" in fails(
        capsys, "--epochs", "1", "--out", tmp_path, "--resume", "--deterministic")
    run("--epochs", "1", "--out", tmp_path, "--resume", "--eval-every", "1")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["eval_every"] == 0
    assert "eval_top1" not in result["epochs"][0]
