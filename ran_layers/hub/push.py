"""Push a training run to a model repository of the Hub: one commit, or none if nothing changed."""
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .._download import WEIGHTS, HubError, explain, file_hash, plain
from .card import model_card
from .folder import whole_folder
from .run import FILES, Run, read_run, refuse_tokens

Files = dict[str, bytes | Path]


class Pushed(NamedTuple):
    """What a push did: the repository's page, its commit, and the files that the commit changed (none: no commit)."""

    url: str
    commit: str
    changed: tuple[str, ...]


def push_to_hub(
        run_dir: str | Path,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
) -> Pushed:
    """Publish a training run as a model repository that ``timm.create_model("hf-hub:user/name")`` loads.

    The repository is created if it is not there. All files go in one commit on top of the state that was compared
    with, so that the repository is either as it was or complete. A repository that this call created is removed again
    if the push fails. Pushing what is there already makes no commit.

    Args:
        run_dir: Folder that ``benchmarks/cifar.py`` left: ``model.safetensors``, ``config.json``, ``result.json``, and
            if there, ``curves.png`` and ``masks.png``.
        repo_id: ``user/name``.
        private: Create the repository as a private one. An existing one must be private already.
        revision: An existing branch to push to; ``main`` if None.
        commit_message: First line of the commit; names the model and its error if None.
        token: Access token; the one of ``hf auth login`` or ``HF_TOKEN`` if None.

    Raises:
        TypeError, ValueError, FileNotFoundError: ``repo_id`` or ``run_dir`` is not what it must be; the message says
            what.
        HubError: The Hub refused or could not be reached; one line says why.

    Example:
        >>> ran_layers.push_to_hub("runs/att56", "alice/ran_att56_cifar.cifar10")  # doctest: +SKIP
    """
    run = read_run(run_dir)
    return push_files(
        build_files(run, repo_id, token), repo_id, private=private, revision=revision, token=token,
        commit_message=default_message(run) if commit_message is None else commit_message)


def build_files(run: Run, repo_id: str, token: str | None = None) -> Files:
    """Return what a push sends, by name: a path where the run's file goes as it is, else the content.

    Raises:
        ValueError: ``repo_id`` is none, or a file holds an access token.
    """
    check_repo_id(repo_id)
    files: Files = {
        "README.md": model_card(run, repo_id).encode(),
        WEIGHTS: run.folder / WEIGHTS,
        "config.json": (json.dumps(run.config, indent=2) + "\n").encode(),
        "result.json": run.folder / "result.json",
        **{name: run.folder / name for name in run.pictures},
    }
    refuse_tokens(files, token or get_token())
    return files


def default_message(run: Run) -> str:
    """Return the commit message of a push that gives none."""
    return f"{run.model} on {run.dataset}: {run.error:.2f} % top-1 error"


def push_files(
        files: Files,
        repo_id: str,
        *,
        commit_message: str,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
) -> Pushed:
    """Send what :func:`build_files` returned; arguments and errors as in :func:`push_to_hub`."""
    message = plain(commit_message)
    if not message:
        raise ValueError("commit_message must not be empty")
    token = token or get_token()
    if not token:
        raise HubError(
            "no access token of the Hub: run `hf auth login`, or set HF_TOKEN to a token with the `write` role "
            "(https://huggingface.co/settings/tokens)")
    try:
        return _push(HfApi(token=token), repo_id, files, private, revision, message)
    except HubError:
        raise
    except Exception as error:
        raise HubError(explain(error, repo_id, revision, token)) from None


def write_folder(files: Files, folder: Path) -> Path:
    """Write the files to a folder, which appears or changes as a whole; return it.

    Raises:
        FileExistsError: The folder holds something that a push does not write.
        OSError: It cannot be written.
    """
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if foreign:
        raise FileExistsError(f"{folder} holds {foreign[0]}, which is not a file of a push: move the folder away")
    with whole_folder(folder) as work:
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, work / name)
            else:
                (work / name).write_bytes(content)
    return folder


def check_repo_id(repo_id: str) -> str:
    """Return ``repo_id`` if it has the form ``user/name``.

    Raises:
        ValueError: It has not.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            f"repo_id must be user/name, of letters, digits, '-', '_' and '.', at most 96 of them, got {repo_id!r}")
    return repo_id


def same_as_remote(content: bytes | Path, sibling: Any) -> bool:
    """Whether a file is the one that the Hub lists: by SHA-256 if it is a large file there, else by git's SHA-1."""
    if sibling.lfs is not None:
        return file_hash(content) == sibling.lfs["sha256"]
    return file_hash(content, git=True) == sibling.blob_id


def _push(api: HfApi, repo_id: str, files: Files, private: bool, revision: str | None, message: str) -> Pushed:
    created = False
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        if revision not in (None, "main"):
            raise HubError(
                f"{repo_id} does not exist yet, so it has no revision {revision!r}: push without a revision first"
            ) from None
        api.create_repo(repo_id, private=private)
        created = True
    try:
        if created:
            info = api.model_info(repo_id, files_metadata=True)
        elif private and not info.private:
            raise HubError(f"{repo_id} exists and is public: make it private in its settings, or push without private")
        return _commit(api, repo_id, files, info, revision, message)
    except BaseException as error:
        if created and not _remove_if_empty(api, repo_id):
            stays = f"the new repository {repo_id} stays, empty; pushing again fills it"
            if isinstance(error, KeyboardInterrupt):  # remains that
                raise KeyboardInterrupt(stays) from None
            if not isinstance(error, Exception):
                raise
            raise HubError(f"{explain(error, repo_id, revision, api.token)} ({stays})") from None
        raise


def _commit(api: HfApi, repo_id: str, files: Files, info: Any, revision: str | None, message: str) -> Pushed:
    url = f"{api.endpoint}/{repo_id}"
    changed, stale = _differences(files, info)
    if not changed and not stale:
        return Pushed(url, info.sha, ())
    operations: list[Any] = [CommitOperationAdd(name, files[name]) for name in changed]
    operations += [CommitOperationDelete(name) for name in stale]
    try:
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=info.sha).oid
    except Exception:
        landed = _landed(api, repo_id, files, revision)
        if landed is None:
            raise
        commit = landed
    return Pushed(url, commit, (*changed, *stale))


def _differences(files: Files, info: Any) -> tuple[list[str], list[str]]:
    """Return the names that are new or changed, and those that an earlier push left and this one does not have."""
    remote = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    changed = [name for name, content in files.items()
               if name not in remote or not same_as_remote(content, remote[name])]
    return changed, [name for name in FILES if name in remote and name not in files]


def _landed(api: HfApi, repo_id: str, files: Files, revision: str | None) -> str | None:
    """Return the commit if the Hub has all of the files: the connection may have been cut after the commit itself."""
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except Exception:
        return None
    return info.sha if _differences(files, info) == ([], []) else None


def _remove_if_empty(api: HfApi, repo_id: str) -> bool:
    """Remove the repository that this push created, unless somebody put a file into it; return whether it is gone."""
    try:
        names = {sibling.rfilename for sibling in api.model_info(repo_id).siblings or ()}
        if names - {".gitattributes"}:
            return True  # somebody else's by now: theirs to keep
        api.delete_repo(repo_id)
    except Exception:
        return False
    return True
