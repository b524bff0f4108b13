"""The measurement of one process against several, in small."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling


def test_forms_on_a_gpu_and_on_a_cpu(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4), raising=False)
    cpu = [tuple(form.values()) for form in scaling.forms([1, 2], torch.device("cpu"))]
    assert cpu == [(1, 1, False), (1, 4, False), (2, 2, True), (2, 2, False)]
    cuda = [tuple(form.values()) for form in scaling.forms([1, 8], torch.device("cuda"))]
    assert cuda == [(1, 1, False), (8, 1, True), (8, 1, False)]


def test_forms_take_turns_and_the_median_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(1), raising=False)
    speeds = iter([10.0, 18.0, 14.0, 11.0, 19.0, 14.5, 30.0, 17.0, 2.0])
    monkeypatch.setattr(
        scaling, "measure", lambda form, *_: (next(speeds), dict(precision="fp32", cpu_kernels=not form["sync_bn"])))
    scaling.main(["--device", "cpu", "--out", str(tmp_path), "--batch-size", "128"])
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert [(row["processes"], row["sync_bn"], row["images_per_s"]) for row in report["rows"]] == [
        (1, False, 11.0), (2, True, 18.0), (2, False, 14.0)]
    assert report["precision"] == "fp32"
    assert [row["cpu_kernels"] for row in report["rows"]] == [True, False, True]
    assert report["command"] == "python benchmarks/scaling.py --device cpu --batch-size 128"


FAKE = """
import json, os, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if arguments["--model"] == "nothing":
    sys.exit("error: --model nothing is not a timm model")
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir()
speeds = [500.0, 40.0, 44.0]  # the first epoch does not count
(folder / "result.json").write_text(json.dumps({
    "epochs": [{"images_per_s": speed} for speed in speeds], "settings": {"precision": "fp32", "cpu_kernels": True}}))
"""


def test_speed_is_that_of_the_best_epoch_after_the_first_and_failures_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar.py").write_text(FAKE)
    monkeypatch.setattr(scaling, "SCRIPT", tmp_path / "cifar.py")
    arguments = ["--processes", "1", "--rounds", "1", "--device", "cpu"]
    scaling.main(arguments)
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "1", "no", "44", "(44-44)"]
    with pytest.raises(SystemExit) as exit_info:
        scaling.main([*arguments, "--model", "nothing"])
    assert exit_info.value.code == 2
    assert "error: the training with 1 processes failed: error: --model nothing" in capsys.readouterr().err
