"""SIGKILL at random moments, in small; `benchmarks/survive.py` with its defaults is the long form."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import survive


def test_killed_training_ends_with_the_same_weights(tmp_path):
    result = survive.survive(kills=2, epochs=6, limit=96, seed=0, folder=tmp_path)
    assert result["kills"] == len(result["killed_after_seconds"]) == 2
    assert result["model_sha256"][0] == result["model_sha256"][1]


def test_no_kill_is_no_success(capsys):
    with pytest.raises(SystemExit) as exit_info:
        survive.main(["--kills", "0"])
    assert exit_info.value.code == 2
    assert "--kills: must be at least 1, got 0" in capsys.readouterr().err
