"""Fetch a published run into a folder, complete and checked, or not at all."""
import shutil
from pathlib import Path

from huggingface_hub import HfApi

from .._download import PICKLES, WEIGHTS, WHY_NO_PICKLE, HubError, download_weights, explain
from .folder import whole_folder
from .push import check_repo_id, same_as_remote
from .run import FILES


def pull(repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a model repository into a folder that ``timm.create_model("local-dir:FOLDER")`` loads without network.

    Args:
        repo_id: ``user/name``.
        folder: Where to; must not exist or be empty.
        revision: Branch, tag or commit; ``main`` if None.
        token: Access token for a private repository; the one of ``hf auth login`` or ``HF_TOKEN`` if None.

    Raises:
        ValueError, FileExistsError: ``repo_id`` or ``folder`` is not what it must be.
        HubError: The repository has no safetensors, a file is damaged, or the Hub could not be reached.
        OSError: The folder cannot be written.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder")
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    except Exception as error:
        raise HubError(explain(error, repo_id, revision, token)) from None
    remote = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    for name in (WEIGHTS, "config.json"):
        if name not in remote:
            pickles = sorted(other for other in remote if other.endswith(PICKLES))
            only = f", only {', '.join(pickles)}: {WHY_NO_PICKLE}" if pickles and name == WEIGHTS else ""
            raise HubError(f"{repo_id} has no {name}{only}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as work:
        for name in (name for name in FILES if name in remote):
            path = download_weights(repo_id, filename=name, revision=info.sha, token=token)
            shutil.copyfile(path, work / name)
            if not same_as_remote(work / name, remote[name]):
                raise HubError(f"the checksum of {repo_id}/{name} is not the one the Hub states; try again")
    return folder
