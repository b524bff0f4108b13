"""Weights from a repository of the Hub or from a folder: only safetensors, with the checksum that the Hub states."""
from pathlib import Path
from typing import Any

from timm.models import resolve_pretrained_cfg

from .._download import WEIGHTS, WHY_NO_PICKLE, HubError, download_weights, refuse_pickle


def safetensors_only(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``build_model_with_cfg``, pointed at the checked weights file.

    timm's own loader takes a pickle where there are no safetensors and compares no checksum. So what is to come from
    the Hub or from ``local-dir:`` is found and checked here, and timm is given its path. A file or address that the
    user names in ``pretrained_cfg_overlay`` is read by timm.

    Raises:
        HubError: The file could not be had from the Hub, is damaged, or is there as a pickle only.
        FileNotFoundError: The folder has no safetensors.
    """
    if not pretrained:
        return kwargs
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    from_elsewhere = overlay.get("hf_hub_id") or overlay.get("url")
    if from_elsewhere and cfg.source != "local-dir" and not (overlay.get("file") or overlay.get("state_dict")):
        # The file in the package is not what the user names; timm would take it all the same.
        overlay = {**overlay, "file": None}
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    if cfg.source == "local-dir":
        path = refuse_pickle(Path(str(cfg.file)))
    elif cfg.source == "hf-hub" or (cfg.hf_hub_id and not (cfg.state_dict or cfg.file)):
        repo_id, _, revision = str(cfg.hf_hub_id).partition("@")
        filename = cfg.hf_hub_filename or WEIGHTS
        if not filename.endswith(".safetensors"):
            raise HubError(f"{repo_id}/{filename} is not read: {WHY_NO_PICKLE}")
        path = download_weights(
            repo_id, filename=filename, revision=revision or None, cache_dir=kwargs.get("cache_dir"))
    else:
        return {**kwargs, "pretrained_cfg_overlay": overlay}
    found = {"source": None, "file": str(path), "state_dict": None, "custom_load": False}
    return {**kwargs, "pretrained_cfg_overlay": {**overlay, **found}}
