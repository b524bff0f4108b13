"""Fetch weights from the Hugging Face Hub: safetensors only, checksums checked, every failure in one line."""
import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar")
WHY_NO_PICKLE = (
    "a pickle can run any code when it is loaded, so only safetensors are read; have its author save it with "
    "safetensors.torch.save_file")


class HubError(RuntimeError):
    """What failed between this machine and the Hub: one line, without a token in it."""


def download_weights(
        repo_id: str,
        *,
        filename: str = WEIGHTS,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
) -> Path:
    """Return the path of a file of ``repo_id`` in the cache, downloaded if need be, its checksum checked.

    Args:
        repo_id: ``user/name``.
        filename: File in the repository.
        revision: Branch, tag or commit; the default branch if None.
        cache_dir: Cache of huggingface_hub, its own if None.
        token: As in ``huggingface_hub.hf_hub_download``.
        **kwargs: Further arguments of ``huggingface_hub.hf_hub_download``.

    Raises:
        HubError: The file could not be had, is damaged, or is there as a pickle only.
    """
    try:
        path = Path(hf_hub_download(
            repo_id, filename, revision=revision, cache_dir=cache_dir, token=token, **kwargs))
    except (EntryNotFoundError, LocalEntryNotFoundError) as error:
        pickles = [] if isinstance(error, LocalEntryNotFoundError) else _pickles(repo_id, revision, token)
        if filename == WEIGHTS and pickles:
            raise HubError(f"{repo_id} has no {WEIGHTS}, only {', '.join(pickles)}: {WHY_NO_PICKLE}") from None
        raise HubError(explain(error, repo_id, revision, token)) from None
    except Exception as error:
        raise HubError(explain(error, repo_id, revision, token)) from None
    check_cached(path, f"{repo_id}/{filename}")
    return path


def check_cached(path: Path, name: str) -> None:
    """Compare a file of the cache with the checksum that the Hub gave for it; remove a damaged one.

    huggingface_hub names a blob of the cache after the Hub's checksum, SHA-256 for a large file and git's SHA-1 for a
    small one, but compares only sizes. Where the cache has no links (Windows without developer mode) there is no
    such name, and nothing is checked.

    Raises:
        HubError: The file is damaged.
    """
    blob = path.resolve()
    if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return
    if file_hash(blob, git=len(blob.name) == 40) != blob.name:
        said = f"the checksum of {name} is not the one the Hub states: the file was damaged on its way"
        try:
            blob.unlink()
            path.unlink()
        except OSError as error:  # a cache that others keep
            raise HubError(f"{said} and cannot be removed from the cache ({error.strerror}): {blob}") from None
        raise HubError(f"{said} and is removed from the cache; try again")


def refuse_pickle(folder: Path) -> Path:
    """Return the weights file of a folder.

    Raises:
        FileNotFoundError: The folder has none, or only pickles.
    """
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}, only {', '.join(pickles)}: {WHY_NO_PICKLE}")
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}")


def file_hash(content: Path | bytes, git: bool = False) -> str:
    """Return the SHA-256 of a file or of bytes, or with ``git`` the SHA-1 that git gives a blob."""
    if isinstance(content, Path):
        content = content.read_bytes()
    if git:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def explain(
        error: BaseException, repo_id: str, revision: str | None = None, token: str | bool | None = None) -> str:
    """Say in one line what went wrong at the Hub, whichever HTTP library and version of huggingface_hub said it."""
    if isinstance(error, HubError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    line = next((said for link in chain if (said := _explain_one(link, repo_id, revision))), None)
    if line is None:
        line = f"{repo_id}: {type(error).__name__}: {error}"
    return redact(line, token)


def redact(text: str, token: str | bool | None = None) -> str:
    """Return the text as one printable line, without tokens."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "hf_***")
    return plain(re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text))


def plain(value: Any) -> str:
    """Return a value as one line of printable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def _explain_one(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: the Hub may not be asked, since HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {repo_id} at {endpoint}, or it is private and the token may not see it"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision or 'main'!r}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space on the disk{f' for {error.filename}' if error.filename else ''}: {error.strerror}"
    if isinstance(error, json.JSONDecodeError):
        return f"{endpoint} had a server error: its answer is no JSON; try again later"
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a repository name of the form user/name"
    status = getattr(getattr(error, "response", None), "status_code", None)  # of whichever HTTP library
    if isinstance(status, int):
        return _explain_status(getattr(error, "server_message", None) or "", status, repo_id)
    if by_xet := re.search(r"HTTP status (?:client|server) error \((\d{3})", str(error)):  # hf_xet only writes it out
        return _explain_status("", int(by_xet[1]), repo_id)
    if isinstance(error, LocalEntryNotFoundError):
        # Says only that the Hub could not be reached; what comes next in the chain may say why.
        if error.__cause__ is None and error.__context__ is None:
            return f"{repo_id} is not in the cache, and {endpoint} could not be reached"
        return None
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id}: {str(error).splitlines()[-1]}"
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, (ConnectionError, TimeoutError)) or library in ("httpx", "httpx2", "requests", "urllib3"):
        return f"the connection to {endpoint} failed or was cut ({type(error).__name__}); try again"
    if isinstance(error, OSError) and "onsistency check" in str(error):
        return f"the connection to {endpoint} was cut before the end of a file of {repo_id}; try again"
    return None


def _explain_status(message: str, status: int, repo_id: str) -> str:
    said = f" ({message})" if message else f" ({status})"
    if status == 401:
        return f"the Hub did not accept the token{said}: `hf auth login` with a valid one, or set HF_TOKEN"
    if status == 403:
        return (f"this token may not write to {repo_id}{said}, or not read it: to write it needs the `write` role and "
                "rights in the namespace")
    if status == 404:
        return f"{repo_id}: the Hub does not have what was asked for{said}"
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else in the meantime{said}; try again"
    if status == 429:
        return f"the Hub asks to slow down{said}; try again later"
    if status >= 500:
        return f"the Hub had a server error {status}{f': {message}' if message else ''}; try again later"
    return f"{repo_id}: the Hub refused{said}"


def _pickles(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except Exception:  # only wanted for a better message
        return []
    return sorted(name for name in names if name.endswith(PICKLES))
