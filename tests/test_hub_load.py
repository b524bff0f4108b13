"""Loading from the Hub, networks and single layers: real huggingface_hub and timm clients against the stand-in."""
import functools
import json
import os

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import yaml
from hub_fixtures import IMAGES, REPO, edit, full_disk, set_constants

from ran_layers import AttentionModule, LocalMaskBranch, ResNeXtUnit, SoftMaskBranch
from ran_layers._download import HubError
from ran_layers.hub import pull, push_to_hub
from ran_layers.hub.folder import whole_folder

# --- failures of a download ------------------------------------------------------------------------------------------


def load_with_timm(tmp_path):
    return timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()


def load_with_pull(tmp_path):
    return timm.create_model(f"local-dir:{pull(REPO, tmp_path / 'pulled')}", pretrained=True).eval()


@pytest.mark.parametrize("load", [load_with_timm, load_with_pull])
@pytest.mark.parametrize(("step", "how", "said"), [
    ("resolve", {"status": 500, "message": "internal"}, "server error"),
    ("resolve", {"cut": True}, "could not be reached|connection"),
    ("download", {"status": 503}, "server error"),
    ("download", {"cut": True}, "connection"),
    ("download", {"damage": True}, "checksum"),
], ids=["resolve 500", "resolve cut", "download 503", "download cut", "damaged"])
def test_failed_download_leaves_nothing(hub, run_dir, expected, tmp_path, load, step, how, said):
    push_to_hub(run_dir, REPO)
    if load is load_with_timm:
        timm.create_model(f"hf-hub:{REPO}", pretrained=False)  # timm fetches config.json itself: not what fails here
        how = {**how, "only": "model.safetensors"} if step == "resolve" else how
    hub.fail(step, **how)
    with pytest.raises(HubError, match=said) as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert "hf_" not in str(caught.value)
    assert not (tmp_path / "pulled").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".pulled")]
    hub.mend()
    assert torch.equal(load(tmp_path)(IMAGES), expected)


def test_download_goes_on_where_it_was_cut(hub, run_dir, expected, monkeypatch):
    set_constants(monkeypatch, DOWNLOAD_CHUNK_SIZE=1000)  # what the client keeps of a cut download: whole chunks
    push_to_hub(run_dir, REPO)
    timm.create_model(f"hf-hub:{REPO}", pretrained=False)
    hub.fail("download", cut=True, after=20_000, times=1)
    try:
        model = load_with_timm(None)
    except HubError:  # huggingface_hub below 1.0 goes on in the next call only
        model = load_with_timm(None)
    assert torch.equal(model(IMAGES), expected)
    assert hub.seen_ranges == ["bytes=20000-"]


def test_pull_that_may_not_be(hub, run_dir, cli, tmp_path, monkeypatch):
    target = tmp_path / "pulled"
    monkeypatch.delenv("HF_TOKEN")
    assert cli("pull", "alice/nonesuch", target)[2] == [
        f"error: there is no repository alice/nonesuch at {hub.url}, or it is private and the token may not see it"]
    hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert cli("pull", REPO, target, "--revision", "v9")[2] == ["error: alice/net has no revision 'v9'"]
    status, _, err = cli("pull", REPO, target)
    assert status == 1
    assert err[0].startswith("error: alice/net has no model.safetensors, only pytorch_model.bin: a pickle can run any")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not an empty folder" in cli("pull", REPO, tmp_path / "full")[2][0]
    assert not target.exists()


def test_pull_into_the_current_folder_or_through_a_link(hub, run_dir, cli, tmp_path, monkeypatch, expected):
    push_to_hub(run_dir, REPO)
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path / "link"):
        assert cli("pull", REPO, folder)[0] == 0
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(model(IMAGES), expected)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == sorted(
        path.name for path in (tmp_path / "here").iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".here", ".there"))]


def test_a_folder_is_written_within_its_file_system_and_as_the_umask_says(tmp_path):
    (tmp_path / "there").mkdir()
    with whole_folder(tmp_path / "there") as work:  # which may be a mount point
        assert work.parent == tmp_path / "there"
        (work / "file").touch()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]
    before = os.umask(0o077)
    try:
        with whole_folder(tmp_path / "new"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_pull_on_a_full_disk(hub, run_dir, cli, tmp_path):
    push_to_hub(run_dir, REPO)
    with full_disk():
        status, _, err = cli("pull", REPO, tmp_path / "pulled")
    assert status == 1
    assert len(err) == 1
    assert "no space on the disk" in err[0]
    assert not (tmp_path / "pulled").exists()
    assert cli("pull", REPO, tmp_path / "pulled")[0] == 0


def test_timm_on_a_full_disk(hub, run_dir, expected):
    push_to_hub(run_dir, REPO)
    with full_disk(free=5000), pytest.raises(HubError, match="no space on the disk"):
        load_with_timm(None)
    assert torch.equal(load_with_timm(None)(IMAGES), expected)


def test_pickles_are_refused_by_the_networks(hub, run_dir, tmp_path):
    config = (run_dir / "config.json").read_bytes()
    hub.add(REPO, {"config.json": config, "pytorch_model.bin": b"pickle"})
    with pytest.raises(HubError, match=r"only pytorch_model\.bin: a pickle can run any code"):
        load_with_timm(tmp_path)
    assert not any("pytorch_model.bin" in path for _, path in hub.requests)
    (run_dir / "model.safetensors").rename(run_dir / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin: a pickle can run any code"):
        timm.create_model(f"local-dir:{run_dir}", pretrained=True)


def test_weights_that_a_configuration_names(hub, run_dir, expected):
    push_to_hub(run_dir, REPO)
    weights, config = (run_dir / "model.safetensors").read_bytes(), (run_dir / "config.json").read_bytes()
    args = json.loads(config)["model_args"]

    def load(**overlay):
        cfg = {"hf_hub_id": REPO, **overlay}
        return timm.create_model("plain_cnn8_cifar", pretrained=True, pretrained_cfg_overlay=cfg, **args).eval()

    assert torch.equal(load()(IMAGES), expected)
    hub.add(REPO, {"config.json": config, "best.safetensors": weights, "pytorch_model.bin": b"pickle"})
    assert torch.equal(load(hf_hub_filename="best.safetensors")(IMAGES), expected)
    assert any("best.safetensors" in path for _, path in hub.requests)
    with pytest.raises(HubError, match=r"alice/net/last\.pth is not read: a pickle can run any code"):
        load(hf_hub_filename="last.pth")
    hub.add("alice/other", {"config.json": config, "pytorch_model.bin": b"pickle"})
    with pytest.raises(HubError, match=r"only pytorch_model\.bin: a pickle can run any code"):
        load(hf_hub_id="alice/other")


def test_file_damaged_in_the_cache(hub, run_dir, expected, tmp_path):
    push_to_hub(run_dir, REPO)
    load_with_timm(tmp_path)
    blob = next((tmp_path / "cache").rglob("model.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(HubError, match=r"checksum of alice/net/model\.safetensors"):
        load_with_timm(tmp_path)
    assert torch.equal(load_with_timm(tmp_path)(IMAGES), expected)


# --- single layers ---------------------------------------------------------------------------------------------------


class OwnAct(nn.ReLU):
    """An activation that only this file knows."""


LAYERS = [
    (AttentionModule, dict(mask_depth=2, p=0, t=1, learning="naive", mask_act="channel")),
    (AttentionModule, dict(act_layer=nn.SiLU, norm_layer="groupnorm1", skips=0, device="cpu")),
    (AttentionModule, dict(unit_layer=functools.partial(ResNeXtUnit, groups=4), mask="local")),
    (SoftMaskBranch, dict(mask_depth=2, unit_layer=ResNeXtUnit, groups=2, dtype=torch.float64)),
    (SoftMaskBranch, dict(norm_layer=nn.BatchNorm2d, act_layer="hard_swish", r=2)),
    (LocalMaskBranch, dict(units=1, mask_act="spatial")),
]


@pytest.mark.parametrize(("layer", "args"), LAYERS, ids=range(len(LAYERS)))
def test_layer_round_trip(layer, args, tmp_path):
    saved = layer(16, **args).eval()
    saved.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["channels"] == 16
    assert "device" not in config
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["library_name"] == "ran-layers"
    loaded = layer.from_pretrained(tmp_path)
    assert repr(loaded) == repr(saved)
    x = torch.linspace(-1, 1, 16 * 7 * 6, dtype=next(saved.parameters()).dtype).reshape(1, 16, 7, 6)
    assert torch.equal(loaded(x), saved(x))


def test_layer_over_the_hub(hub, tmp_path, monkeypatch):
    saved = AttentionModule(8, mask_depth=2, act_layer=nn.GELU).eval()
    saved.push_to_hub(REPO)
    assert {"model.safetensors", "config.json"} <= set(hub.repos[REPO].files)
    x = torch.ones(1, 8, 5, 5)
    assert torch.equal(AttentionModule.from_pretrained(REPO)(x), saved(x))
    set_constants(monkeypatch, HF_HUB_OFFLINE=True)
    assert torch.equal(AttentionModule.from_pretrained(REPO)(x), saved(x))
    set_constants(monkeypatch, HF_HUB_OFFLINE=False)

    del hub.repos[REPO].files["model.safetensors"]
    hub.repos[REPO].files["pytorch_model.bin"] = b"pickle"
    hub.repos[REPO].commit("main", dict(hub.repos[REPO].files), "only a pickle")
    with pytest.raises(HubError, match=r"only pytorch_model\.bin: a pickle can run any code"):
        AttentionModule.from_pretrained(REPO)
    with pytest.raises(HubError, match="there is no repository alice/nonesuch"):
        AttentionModule.from_pretrained("alice/nonesuch")


def test_layer_arguments_that_are_not_looked_up(tmp_path):
    AttentionModule(8, act_layer=OwnAct, trunk=nn.Identity()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"act_layer was '.*OwnAct'.*pass act_layer= to from_pretrained"):
        AttentionModule.from_pretrained(tmp_path, trunk=nn.Identity())
    with pytest.raises(ValueError, match=r"trunk was 'torch.nn.Identity' .* name; pass trunk= to from_pretrained"):
        AttentionModule.from_pretrained(tmp_path, act_layer=OwnAct)
    AttentionModule.from_pretrained(tmp_path, act_layer=OwnAct, trunk=nn.Identity())
    # A config may not name code to run: not by another module, not by what is not a layer.
    for name in ("os.system", "torch.nn.Parameter", "torch.nn.functional.relu", "torch.nn.modules.ReLU"):
        edit(tmp_path / "config.json", lambda config, name=name: config.update(act_layer={"class": name}))
        with pytest.raises(ValueError, match="is not looked up"):
            AttentionModule.from_pretrained(tmp_path, trunk=nn.Identity())
    edit(tmp_path / "config.json", lambda config: config.update(act_layer={"partial": "os.system"}))
    with pytest.raises(ValueError, match=r"act_layer is not a partial of a class in this layer's config\.json"):
        AttentionModule.from_pretrained(tmp_path, trunk=nn.Identity())


class OwnSignature(AttentionModule):
    def __init__(self, dim, **kwargs):
        super().__init__(dim, **kwargs)


def test_layers_of_numpys_numbers_and_of_ones_own_class(tmp_path):
    saved = AttentionModule(np.int64(8), mask_depth=np.int32(2), drop_path=np.float32(0.25))
    saved.save_pretrained(tmp_path / "numbers")
    loaded = AttentionModule.from_pretrained(tmp_path / "numbers")
    assert (loaded.mask_depth, loaded.trunk[0].drop_path.drop_prob) == (2, 0.25)
    OwnSignature(8).save_pretrained(tmp_path / "own")
    assert OwnSignature.from_pretrained(tmp_path / "own").channels == 8
    with pytest.raises(HubError, match=r"config.json with the arguments of AttentionModule \(missing .* 'channels'"):
        AttentionModule.from_pretrained(tmp_path / "own")


def test_layer_folders_that_are_refused(tmp_path):
    AttentionModule(8).save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    with pytest.raises(HubError, match=r"no config.json with the arguments of AttentionModule"):
        AttentionModule.from_pretrained(tmp_path)
    (tmp_path / "other.json").rename(tmp_path / "config.json")
    with pytest.raises(HubError, match=r"in config.json or beside it, that are none of AttentionModule \(.*'foo'\)"):
        AttentionModule.from_pretrained(tmp_path, foo=1)
    for branch in (SoftMaskBranch, LocalMaskBranch):
        with pytest.raises(HubError, match=f"that are none of {branch.__name__} .*unit_layer must be called with"):
            branch.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="map_location must be a device that holds numbers, got 'meta'"):
        AttentionModule.from_pretrained(tmp_path, map_location="meta")
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(HubError, match="not a whole safetensors file"):
        AttentionModule.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle can run any code"):
        AttentionModule.from_pretrained(tmp_path)


def test_a_model_in_the_place_of_its_folder():
    with pytest.raises(TypeError, match="run_dir must be the folder of a training run, got AttentionModule"):
        push_to_hub(AttentionModule(8), "alice/attention")


def test_a_repository_named_beside_weights_in_the_package(hub):
    for overlay in ({"hf_hub_id": "alice/nonesuch"}, {"hf_hub_id": "alice/nonesuch", "num_classes": 10}):
        with pytest.raises(HubError, match="there is no repository alice/nonesuch"):
            timm.create_model("ran_att56_cifar", pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(Exception, match=r"refused|urlopen"):
        timm.create_model("ran_att56_cifar", pretrained=True, pretrained_cfg_overlay={"url": "http://127.0.0.1:9/a.pth"})
    expected = timm.create_model("ran_att56_cifar", pretrained=True).eval()(IMAGES)
    for overlay in ({"crop_pct": 0.9}, {"url": None}, {"url": ""}, {"hf_hub_id": None}):
        own = timm.create_model("ran_att56_cifar", pretrained=True, pretrained_cfg_overlay=overlay).eval()(IMAGES)
        assert torch.equal(own, expected)
