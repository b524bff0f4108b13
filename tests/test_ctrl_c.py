"""Ctrl-C before a script has begun: no traceback, and afterwards as Python has it."""
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from harness import ctrl_c  # noqa: E402


@pytest.mark.parametrize("script", [
    "cifar.py", "study.py", "throughput.py", "robustness.py", "fuse.py", "scaling.py", "survive.py"])
def test_while_torch_is_imported(script):
    # Who runs tests in the background may have the signal ignored, which a child would inherit.
    allowed = ("import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
               "os.execv(sys.executable, sys.argv[1:])")
    command = [sys.executable, "-v", str(BENCHMARKS / script), "--help"]
    with subprocess.Popen([sys.executable, "-c", allowed, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          text=True) as process:
        lines = iter(process.stderr)
        assert any(line.startswith("import 'harness.ctrl_c'") for line in lines)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in "".join(lines)
    assert process.returncode == -signal.SIGINT


def test_afterwards(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    try:
        for here, handler in ((BENCHMARKS / "cifar.py", signal.SIG_DFL),
                              (Path("elsewhere.py"), signal.default_int_handler)):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            monkeypatch.setattr(sys.modules["__main__"], "__file__", str(here), raising=False)
            ctrl_c.end_at_once()
            assert signal.getsignal(signal.SIGINT) is handler
            ctrl_c.raise_again()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(BENCHMARKS / "cifar.py"))
        ctrl_c.end_at_once()
        ctrl_c.raise_again()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
