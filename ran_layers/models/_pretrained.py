"""Weights from a repository of the Hub or from a folder: only safetensors, with the checksum that the Hub states."""
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from .._download import download_weights, refuse_pickle


def safetensors_only(pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``build_model_with_cfg``, pointed at the checked weights file.

    timm's own loader takes a pickle where there are no safetensors and compares no checksum. So for ``hf-hub:`` and
    ``local-dir:`` the file is found and checked here, and timm is given its path.

    Raises:
        HubError: The file could not be had from the Hub, is damaged, or is there as a pickle only.
        FileNotFoundError: The folder has no safetensors.
    """
    cfg = kwargs.get("pretrained_cfg")
    cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
    if not pretrained or not isinstance(cfg, dict):
        return kwargs
    if cfg.get("source") == "hf-hub":
        repo_id, _, revision = cfg["hf_hub_id"].partition("@")
        path = download_weights(repo_id, revision=revision or None, cache_dir=kwargs.get("cache_dir"))
    elif cfg.get("source") == "local-dir":
        path = refuse_pickle(Path(cfg["file"]))
    else:
        return kwargs
    overlay = {"source": None, "file": str(path), "state_dict": None, "custom_load": False}
    return {**kwargs, "pretrained_cfg_overlay": {**(kwargs.get("pretrained_cfg_overlay") or {}), **overlay}}
