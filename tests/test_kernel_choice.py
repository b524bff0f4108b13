"""Which networks train with the kernels for a CPU, on which machines, and in which precision."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cifar
from small_training import small

from harness import precision, run
from harness.kernels import cpu_choice, cpu_library
from harness.kernels.cpu_choice import kernels_pay, why_no_kernels
from harness.kernels.cpu_library import library
from harness.kernels.cpu_modules import share_of_kernels
from harness.precision import pick_precision

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")


@pytest.mark.parametrize(("name", "share"), [
    ("ran_att56_cifar", 0.99), ("ran_att92_cifar_orig", 0.99), ("ran_att56", 0.99), ("resnet18", 0),
    ("plain_cnn8_cifar", 0)])
def test_share_of_the_convolutions(name, share):
    with torch.device("meta"):
        found = share_of_kernels(timm.create_model(name))
    assert found == 0 if share == 0 else share < found < 1  # the stem is torch's


def test_bfloat16_is_for_those_who_gain_from_it(monkeypatch):
    model, other = timm.create_model("ran_att56_cifar"), timm.create_model("resnet18")
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: False)
    monkeypatch.setattr(precision, "_says_yes", lambda name: True)
    assert pick_precision(CPU, model, cpu_kernels=True) == "bf16"
    assert pick_precision(CPU, model, cpu_kernels=False) == pick_precision(CPU, other, cpu_kernels=True) == "fp32"
    assert pick_precision(CPU) == pick_precision(torch.device("cuda"), model, cpu_kernels=True) == "fp32"
    monkeypatch.setattr(precision, "_says_yes", lambda name: False)
    assert pick_precision(CPU, model, cpu_kernels=True) == "fp32"
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: True)
    assert pick_precision(CPU, other) == "bf16"


def test_obstacles_are_named(monkeypatch, capsys, tmp_path):
    assert "the device is cuda" in why_no_kernels(torch.device("cuda"), "off")
    assert "--compile" in why_no_kernels(CPU, "units")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: None)
    monkeypatch.setattr(cpu_choice, "library", library.__wrapped__)
    assert "no C++ compiler" in why_no_kernels(CPU, "off")
    with pytest.raises(SystemExit):
        cifar.main(["--dataset", "digits", "--device", "cpu", "--cpu-kernels", "--out", str(tmp_path / "run")])
    assert "error: --cpu-kernels are not available here: there is no C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_kernels_are_built_where_there_is_a_compiler(monkeypatch):
    """Their tests are skipped without them, so that a mistake in them would show in this one alone."""
    compiler = shutil.which("c++") or shutil.which("g++")
    with_openmp = [compiler, "-fopenmp", "-std=c++17", "-x", "c++", "-c", "-o", os.devnull, "-"]
    if compiler is None or subprocess.run(with_openmp, input=b"#include <omp.h>\n", capture_output=True).returncode:
        pytest.skip("there is no C++ compiler with OpenMP")
    monkeypatch.delenv("CXX", raising=False)
    assert library.__wrapped__() is not None


@needs_compiler
@pytest.mark.skipif(not {"avx2", "avx512f"} & set(cpu_library._processor("flags").split()),
                    reason="where vectors are short, torch's kernels may be faster")
def test_kernels_are_worth_their_use_here():
    """Vectors wider than the processor's once made them nine times slower than torch's, and no test knew."""
    assert kernels_pay.__wrapped__()


@needs_compiler
@pytest.mark.parametrize(("flags", "used"), [([], False), (["--cpu-kernels"], True)])
def test_kernels_that_are_slow_are_used_only_if_asked_for(monkeypatch, capsys, tmp_path, flags, used):
    monkeypatch.setattr(cpu_choice, "_convolution_seconds", lambda ours: 3.0 if ours else 1.0)
    monkeypatch.setattr(run, "kernels_pay", kernels_pay.__wrapped__)
    out = tmp_path / "run"
    cifar.main(small("--dataset", "digits", "--device", "cpu", "--limit", "64", "--epochs", "1", "--out", out, *flags))
    assert ("fused kernels" in capsys.readouterr().out) is used
    assert json.loads((out / "result.json").read_text())["settings"]["cpu_kernels"] is used


@needs_compiler
def test_a_resumed_run_measures_nothing_anew(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = small("--dataset", "digits", "--device", "cpu", "--limit", "64")
    for pays in (True, False):
        monkeypatch.setattr(run, "kernels_pay", lambda pays=pays: pays)
        cifar.main([*command, "--epochs", "2", *([] if pays else ["--resume"])])
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["settings"]["cpu_kernels"]


@needs_compiler
def test_the_compiler_may_be_a_command_with_arguments(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"env {os.environ.get('CXX') or shutil.which('c++') or shutil.which('g++')}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.__wrapped__() is not None


def test_a_compiler_that_fails_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.__wrapped__() is None
    assert not list((tmp_path / "ran-layers").iterdir())
