"""python -m ran_layers.hub push RUN_DIR user/name: publish a training run; pull: fetch one."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars, logging

from .._download import HubError, redact
from .pull import pull
from .push import build_files, check_repo_id, default_message, push_files, write_folder
from .run import read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 after a failure (one line on stderr), 2 for wrong usage."""
    args = _parser().parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.set_verbosity_error()  # what is retried is not news; what fails is said below, in one line
    try:
        return _push(args) if args.command == "push" else _pull(args)
    except (HubError, ValueError, OSError) as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"error: interrupted; {str(error) or 'run the same command again'}", file=sys.stderr)
        return 130


def _push(args: argparse.Namespace) -> int:
    run = read_run(args.run_dir)
    files = build_files(run, args.repo_id)
    for name, content in files.items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        print(f"{size / 1e3:12,.1f} kB  {name}")
    if "masks.png" not in files:
        print("(the run has no masks.png, so the card shows no masks)")
    if args.dry_run:
        folder = write_folder(files, args.run_dir / "hub")
        print(f"dry run: nothing was sent; {folder} is what would go to {args.repo_id}")
        return 0
    pushed = push_files(
        files, args.repo_id, private=args.private, revision=args.revision,
        commit_message=args.message or default_message(run))
    if pushed.changed:
        print(f"{pushed.url} is at {pushed.commit[:12]}: {', '.join(pushed.changed)}")
    else:
        print(f"{pushed.url} has all of it already, at {pushed.commit[:12]}: nothing to push")
    return 0


def _pull(args: argparse.Namespace) -> int:
    folder = pull(args.repo_id, args.folder, revision=args.revision)
    print(f'{folder} is there: timm.create_model("local-dir:{folder}", pretrained=True)')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ran_layers.hub",
        description="Publish a training run to the Hugging Face Hub, or fetch a published one.",
        epilog="The token comes from `hf auth login` or HF_TOKEN, the Hub's address from HF_ENDPOINT.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="publish a training run, in one commit")
    push.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the --out folder of benchmarks/cifar.py")
    push.add_argument("repo_id", type=_repo_id, metavar="user/name", help="the repository; created if it is not there")
    push.add_argument("--private", action="store_true", help="create it as a private repository")
    push.add_argument("--revision", metavar="BRANCH", help="an existing branch to push to (default: main)")
    push.add_argument("--message", type=_message, help="the commit message")
    push.add_argument(
        "--dry-run", action="store_true", help="send nothing: write RUN_DIR/hub and show what would go")
    fetch = commands.add_parser("pull", help="fetch a published run into a folder")
    fetch.add_argument("repo_id", type=_repo_id, metavar="user/name")
    fetch.add_argument("folder", type=Path, metavar="FOLDER", help="must not exist or be empty")
    fetch.add_argument("--revision", help="branch, tag or commit (default: main)")
    return parser


def _repo_id(value: str) -> str:
    try:
        return check_repo_id(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _message(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return value


if __name__ == "__main__":
    sys.exit(main())
