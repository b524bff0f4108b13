"""What the tests of publishing share: the stand-in for the Hub, a training run's folder, the command line."""
import contextlib
import json
import sys
import time

import huggingface_hub
import pytest
import timm
import torch
from hub_server import HubServer

import ran_layers  # noqa: F401 (registers the networks)

REPO = "alice/net"
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
PUSHED = {"README.md", "model.safetensors", "config.json", "result.json", "curves.png", "masks.png"}


def set_constants(monkeypatch, **values):
    """Set constants of huggingface_hub in all its modules: older versions import some of them by name."""
    for module in [module for name, module in list(sys.modules.items()) if name.startswith("huggingface_hub")]:
        for name, value in values.items():
            if name in vars(module):
                monkeypatch.setattr(module, name, value)
    if hasattr(huggingface_hub.utils, "reset_sessions"):
        huggingface_hub.utils.reset_sessions()  # older sessions look at HF_HUB_OFFLINE when they are made


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, with the clients of this process pointed at it and a cache of its own."""
    with HubServer() as server:
        # By LFS, as without hf_xet; the fixture "xet" is for the other way.
        set_constants(
            monkeypatch, ENDPOINT=server.url, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_DISABLE_XET=True,
            HUGGINGFACE_CO_URL_TEMPLATE=server.url + "/{repo_id}/resolve/{revision}/{filename}",
            HF_TOKEN_PATH=str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", server.writer)
        for name in ("NO_PROXY", "no_proxy"):  # where both are set, the latter counts
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits before each new attempt
        yield server


@pytest.fixture
def xet(hub, monkeypatch, tmp_path):
    """The stand-in for clients that have hf_xet, which then send large files by its protocol."""
    pytest.importorskip("hf_xet", reason="needs hf_xet")
    set_constants(monkeypatch, HF_HUB_DISABLE_XET=False)
    for name, value in {
            "HF_XET_CACHE": str(tmp_path / "xet"), "HF_XET_XORB_COMPRESSION_POLICY": "none",
            "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
            "HF_XET_TELEMETRY_ENABLED": "false"}.items():
        monkeypatch.setenv(name, value)
    return hub


def finish_run(folder, model_name, **args):
    """Leave in ``folder`` what the harness leaves after training a model; ``args`` make it a narrow one."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, **args)
    timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)
    result = {
        "model": model_name, "dataset": "cifar10", "recipe": "quick", "seed": 0,
        "settings": {"lr": 0.2, "batch_size": 128}, "versions": {"torch": "2.9"}, "params": 1879818, "macs": 31e6,
        "hardware": {"device": "cpu", "name": "a processor"}, "epochs": [{"epoch": 1}], "seconds": 5400.0,
        "final": {"top1": 91.5, "top5": 99.7, "top1_flip": 91.9, "error": 8.5}, "images_per_s": 220.0,
        "command": "python benchmarks/cifar.py --recipe quick",
    }
    (folder / "result.json").write_text(json.dumps(result))
    for name in ("curves.png", "masks.png"):
        (folder / name).write_bytes(b"\x89PNG " + name.encode() * 500)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def plain_files(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("run"), "plain_cnn8_cifar", channels=(8, 8, 16, 64))


@pytest.fixture
def run_dir(plain_files, tmp_path):
    """A training run's folder, of a network that is quickly built."""
    return write(tmp_path / "run", plain_files)


@pytest.fixture
def expected(run_dir):
    """What the run's network says of ``IMAGES``."""
    return timm.create_model(f"local-dir:{run_dir}", pretrained=True).eval()(IMAGES).detach()


@pytest.fixture
def cli(capfd):
    """Run the command line; return its exit code, its output and its lines on stderr."""
    from ran_layers.hub.__main__ import main

    def run(*argv):
        capfd.readouterr()
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as usage:
            status = usage.code
        out, err = capfd.readouterr()
        return status, out, err.splitlines()
    return run


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def edit(file, change):
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


@contextlib.contextmanager
def full_disk(free=2000):
    """Let no file of this process grow beyond ``free`` bytes, as on a full disk."""
    resource = pytest.importorskip("resource", reason="this system has no limit on a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
