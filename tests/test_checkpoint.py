"""Checkpoints: what is in them, when it was so, and what happens where they cannot be written."""
import sys
import threading
import weakref
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness import checkpoint
from harness.checkpoint import FILE_NAME, CheckpointWriter, Snapshot, load_checkpoint
from harness.errors import RunError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoints_hold_tensors_of_all_kinds(tmp_path, device):
    tensors = {
        "scalar": torch.tensor(7, device=device),
        "empty": torch.zeros(0, 3, device=device),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "weights": torch.randn(4, 3, 2, 2, device=device).to(memory_format=torch.channels_last),
        "part": torch.randn(6, 5, device=device)[::2, 1:3],
        "half": torch.randn(3, device=device).half(),
        "trained": torch.nn.Parameter(torch.randn(2, device=device)),
    }
    with CheckpointWriter(tmp_path) as writer:
        writer.save(tensors, {"step": 3, "text": "ä"})
    loaded, state = load_checkpoint(tmp_path)
    assert state == {"step": 3, "text": "ä"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[name], tensor.detach().cpu(), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_a_snapshot_does_not_see_what_comes_after(device):
    tensors = {str(i): torch.full((1000, 100), float(i), device=device) for i in range(5)}
    snapshot = Snapshot(tensors)
    for tensor in tensors.values():
        tensor.fill_(-1)
    assert all((array == float(name)).all() for name, array in snapshot.arrays().items())


@pytest.fixture
def slow_disk(tmp_path, monkeypatch):
    """Events: the first write has begun; it may go on. And the steps written so far."""
    begun, may_write, written, original = threading.Event(), threading.Event(), [], checkpoint.write_atomic

    def slow(path, content):
        begun.set()
        may_write.wait(20)
        original(path, content)
        written.append(load_checkpoint(tmp_path)[1]["step"])

    monkeypatch.setattr(checkpoint, "write_atomic", slow)
    return begun, may_write, written


def test_where_the_disk_is_slow_the_newest_checkpoint_is_next(tmp_path, slow_disk):
    begun, may_write, written = slow_disk
    with CheckpointWriter(tmp_path) as writer:
        writer.save({"x": torch.zeros(1)}, {"step": 1})
        assert begun.wait(20)
        snapshots = []
        for step in range(2, 9):
            writer.save({"x": torch.full((1,), float(step))}, {"step": step})
            snapshots.append(weakref.ref(writer.waiting[0]))
        assert sum(snapshot() is not None for snapshot in snapshots) == 1, "those given up must not take memory"
        may_write.set()
    assert written == [1, 8]
    assert load_checkpoint(tmp_path)[0]["x"].item() == 8


def test_what_cannot_be_copied_replaces_nothing(tmp_path, slow_disk):
    begun, may_write, written = slow_disk
    writer = CheckpointWriter(tmp_path)
    writer.save({}, {"step": 1})
    assert begun.wait(20)
    writer.save({}, {"step": 2})
    with pytest.raises(TypeError):
        writer.save({}, {"step": object()})
    may_write.set()
    writer.__exit__(TypeError, None, None)
    assert written == [1, 2]


def test_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    with CheckpointWriter(tmp_path) as writer:
        writer.save({"a": torch.ones(2)}, {"step": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    message = "No space left on device; the previous file is untouched"
    with pytest.raises(RunError, match=message), CheckpointWriter(tmp_path) as writer:
        writer.save({"a": torch.zeros(2)}, {"step": 2})
    tensors, state = load_checkpoint(tmp_path)
    assert state == {"step": 1}
    assert tensors["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_checkpoints_hold_what_was_when_they_were_saved_and_failures_are_told(tmp_path, monkeypatch):
    tensor, state = torch.zeros(3), {"epochs": [1]}
    with CheckpointWriter(tmp_path) as writer:
        writer.save({"x": tensor}, state)
        tensor += 1
        state["epochs"].append(2)
    tensors, saved = load_checkpoint(tmp_path)
    assert torch.equal(tensors["x"], torch.zeros(3))
    assert saved == {"epochs": [1]}

    def full(*_):
        raise RunError("disk full")

    monkeypatch.setattr("harness.checkpoint.write_atomic", full)
    writer = CheckpointWriter(tmp_path)
    writer.save({}, {})
    wait(writer.pending)
    with pytest.raises(RunError, match="disk full"):
        writer.save({}, {})
    with pytest.raises(RunError, match="disk full"), CheckpointWriter(tmp_path) as writer:
        writer.save({}, {})
    writer = CheckpointWriter(tmp_path)
    writer.save({}, {})
    writer.__exit__(KeyError, None, None)  # what ended the run is told
