"""Kill a training again and again at random moments, resume it, and compare its weights with an undisturbed one's.

    python benchmarks/survive.py --kills 20 --out benchmarks/results
"""
from harness import ctrl_c, extras  # noqa: F401  (before torch, see there)

# isort: split
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from harness.arguments import Parser, positive
from harness.checkpoint import FILE_NAME, check_out, write_json
from harness.display import count, duration
from harness.environment import command_line, hardware, versions
from harness.errors import RunError, one_line_errors

SCRIPT = Path(__file__).parent / "cifar.py"


def survive(kills: int, epochs: int, limit: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train twice on digits, once undisturbed and once with ``kills`` SIGKILLs; return what happened.

    Raises:
        RunError: A training failed, ended before the last kill, or the weights differ.
    """
    common = [sys.executable, str(SCRIPT), "--dataset", "digits", "--device", "cpu", "--model", "plain_cnn8_cifar",
              "--recipe", "best", "--epochs", str(epochs), "--limit", str(limit)]
    started = time.monotonic()
    if subprocess.run([*common, "--out", str(folder / "undisturbed")], stdout=subprocess.DEVNULL).returncode:
        raise RunError("the undisturbed training failed; see above")
    lasted = time.monotonic() - started
    result = json.loads((folder / "undisturbed" / "result.json").read_text())
    epoch_seconds = result["seconds"] / epochs
    # What a run measures to decide may come out otherwise in another.
    kernels = "--cpu-kernels" if result["settings"]["cpu_kernels"] else "--no-cpu-kernels"
    common += ["--precision", result["settings"]["precision"], kernels]
    start_seconds = lasted - epochs * epoch_seconds
    # Not further than this many epochs into each attempt, so that the training is not over before the last kill.
    furthest = epochs // (kills + 1)

    rng = random.Random(seed)
    moments: list[float] = []
    out = folder / "killed"
    while True:
        resume = ["--resume"] if (out / FILE_NAME).is_file() else []
        started = time.monotonic()
        child = subprocess.Popen([*common, "--out", str(out), *resume], stdout=subprocess.PIPE, text=True)
        try:
            if len(moments) == kills:
                child.communicate()
                break
            # After a random number of epochs a random part of the next; before the first, of the start too.
            after = rng.randrange(furthest + 1)
            pause = rng.random() * (epoch_seconds if after else start_seconds + epoch_seconds)
            assert child.stdout is not None
            ended = (line.startswith("epoch ") for line in child.stdout)
            while after and (is_epoch := next(ended, None)) is not None:
                after -= is_epoch
            child.wait(pause)
            break
        except subprocess.TimeoutExpired:
            child.kill()
            moments.append(round(time.monotonic() - started, 2))
        finally:
            child.kill()  # nothing, where it is over
            child.wait()
    if child.returncode:
        raise RunError(f"the training failed after {count(len(moments), 'kill')}; see above")
    if len(moments) < kills:
        raise RunError(f"the training was over after {len(moments)} of {count(kills, 'kill')}; give more --epochs")
    digests = [hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()
               for name in ("undisturbed", "killed")]
    if digests[0] != digests[1]:
        raise RunError(f"after {count(len(moments), 'kill')} the weights differ from the undisturbed training's")
    return dict(
        kills=len(moments), killed_after_seconds=moments, undisturbed_seconds=round(lasted, 1), model_sha256=digests,
        hardware=hardware(torch.device("cpu")), versions=versions())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=positive, default=20, help="times the training is killed")
    parser.add_argument("--epochs", type=positive, default=40, help="of the training")
    parser.add_argument("--limit", type=positive, default=640, help="training images")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="folder for survive.json")
    args = parser.parse_args(argv)
    with one_line_errors(), ctrl_c.all_as_ctrl_c():  # no training outlives this process
        if args.out:
            check_out(args.out / "survive.json")
        with tempfile.TemporaryDirectory() as folder:
            result = survive(args.kills, args.epochs, args.limit, args.seed, Path(folder))
        print(f"{count(result['kills'], 'kill')}, the same weights as the undisturbed training of "
              f"{duration(result['undisturbed_seconds'])}")
        if args.out:
            command = command_line("survive.py", sys.argv[1:] if argv is None else argv)
            write_json(args.out / "survive.json", dict(command=command, **result))


if __name__ == "__main__":
    main()
