"""SIGKILL at random moments, in small; `benchmarks/survive.py` with its defaults is the long form."""
import contextlib
import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import survive


def test_killed_training_ends_with_the_same_weights(tmp_path):
    result = survive.survive(kills=2, epochs=6, limit=96, seed=0, folder=tmp_path)
    assert result["kills"] == len(result["killed_after_seconds"]) == 2
    assert result["model_sha256"][0] == result["model_sha256"][1]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_training_outlives_it():
    with subprocess.Popen([sys.executable, survive.__file__, "--kills", "1", "--epochs", "200"], start_new_session=True,
                          stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not any("cifar.py" in command for command in processes_of(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    assert processes_of(process.pid) == []


def processes_of(session):
    """Return the commands of the running processes of a session."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            state, _, _, session_of_it, *_ = file.read_text().rpartition(")")[2].split()
            if int(session_of_it) == session and state != "Z":
                commands.append(file.with_name("cmdline").read_text())
    return commands


@pytest.mark.parametrize("script", ["survive", "scaling", "robustness", "fuse", "throughput"])
def test_where_nothing_can_be_written_nothing_is_measured(script, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(script)
    (tmp_path / "file").touch()
    for name in ("survive", "measure", "measure_all", "load"):  # what takes long
        monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(SystemExit) as exit_info:
        module.main(["--out", str(tmp_path / "file")])
    assert exit_info.value.code == 2
    assert f"error: --out {tmp_path / 'file' / script}.json cannot be written to (Not a directory)" in (
        capsys.readouterr().err)


def test_no_kill_is_no_success(capsys):
    with pytest.raises(SystemExit) as exit_info:
        survive.main(["--kills", "0"])
    assert exit_info.value.code == 2
    assert "--kills: must be at least 1, got 0" in capsys.readouterr().err
