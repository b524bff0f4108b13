"""How a training goes on where it stopped: its arguments, what must be the same, and the command to give."""
import argparse
import shlex
from pathlib import Path
from typing import Any

from harness.checkpoint import FILE_NAME
from harness.environment import command_line
from harness.errors import RunError


def saved_arguments(state: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the run with the checkpoint's ``state`` had, so that resuming it needs no others."""
    settings = state["settings"]
    return {
        **settings, "sync_bn": settings["bn_batch"] == settings["batch_size"], "data_dir": state.get("data_dir"),
        "eval_every": state.get("eval_every", 0), "deterministic": state.get("deterministic", False),
        "initial_checkpoint": None}  # the setting is its digest, and its weights are no longer needed


def check_folder(out: Path, settings: dict[str, Any], state: dict[str, Any] | None) -> None:
    """Refuse a folder that has another run, or, if there is a ``state`` to resume, one of other ``settings``."""
    if state is not None:
        changed = [key for key, value in state["settings"].items() if settings.get(key) != value]
        if changed == ["bn_batch"]:
            raise RunError(
                f"--resume: the run in {out} normalises over batches of {state['settings']['bn_batch']} images of "
                f"{state['settings']['batch_size']}, this command over {settings['bn_batch']}; with --no-sync-bn it "
                "takes as many processes as before")
        if changed:
            raise RunError(
                f"--resume: the checkpoint in {out} has {changed[0]} = {state['settings'][changed[0]]}, this command "
                f"{settings.get(changed[0])}; give the same settings or another --out")
    elif out.is_dir() and any((out / name).exists() for name in (FILE_NAME, "result.json", "model.safetensors")):
        raise RunError(f"--out {out} already has a run; add --resume to go on with it, or name another folder")


def check_data(out: Path, digests: dict[str, str], state: dict[str, Any]) -> None:
    """Refuse to go on with a run on other images or labels than those that it began with."""
    if digests["data_sha256"] != state["data_sha256"]:
        raise RunError(f"--resume: the training images are not those that the run in {out} began with; give its "
                       "--data-dir, or start again in another --out")
    if digests.get("labels_sha256") != state.get("labels_sha256"):  # of the same images
        raise RunError(f"--resume: the run in {out} began with other wrong labels, of an earlier version; start again "
                       "in another --out")


def other_hardware(hardware: dict[str, Any], state: dict[str, Any]) -> str | None:
    """Say how ``hardware`` differs from what the run had last, which may add in another order; None if it does not."""
    last = state.get("machine", {}).get("hardware", {})
    return ", ".join(f"{key} is {hardware[key]}, was {value}" for key, value in last.items()
                     if key in hardware and hardware[key] != value) or None


def command_to_resume(args: argparse.Namespace, out: Path, processes: int) -> str:
    """Return the command that goes on with the run in ``out``, as a shell takes it in this folder."""
    scripts = Path(__file__).resolve().parents[1]
    here = Path.cwd()
    folder = scripts.relative_to(here) if scripts.is_relative_to(here) else scripts
    command = command_line("cifar.py", args.argv, processes=processes, folder=folder.as_posix(), without=())
    flags = {word.partition("=")[0] for word in args.argv}
    for flag, addition in (("--resume", " --resume"), ("--out", f" --out {shlex.quote(str(out))}")):
        command += addition if flag not in flags else ""
    return command
