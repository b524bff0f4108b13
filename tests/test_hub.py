"""Pushing to the Hub: the real huggingface_hub client against the stand-in on loopback."""
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import timm
import torch
from hub_fixtures import IMAGES, PUSHED, REPO, edit, finish_run, full_disk, set_constants
from hub_server import HubServer

import ran_layers
from ran_layers._download import HubError
from ran_layers.hub import push_to_hub

# --- push ------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_loads(hub, tmp_path, monkeypatch):
    run_dir = tmp_path / "att56"
    finish_run(run_dir, "ran_att56_cifar", channels=(8, 8, 16, 16), stem_chs=8)
    expected = timm.create_model(f"local-dir:{run_dir}", pretrained=True).eval()(IMAGES)
    pushed = push_to_hub(run_dir, REPO)
    repo = hub.repos[REPO]
    assert set(repo.files) == PUSHED | {".gitattributes"}
    assert set(pushed.changed) == PUSHED
    assert pushed.url == f"{hub.url}/{REPO}"
    assert pushed.commit == repo.branches["main"]
    assert repo.messages == ["initial commit", "ran_att56_cifar on cifar10: 8.50 % top-1 error"]
    assert repo.files["model.safetensors"] == (run_dir / "model.safetensors").read_bytes()

    def load(**kwargs):
        return timm.create_model(f"hf-hub:{REPO}", pretrained=True, **kwargs).eval()

    loaded = load()
    assert torch.equal(loaded(IMAGES), expected)
    other = load(num_classes=7, in_chans=1)
    assert other(IMAGES[:, :1]).shape == (2, 7)
    assert torch.allclose(other.stem.conv.weight, loaded.stem.conv.weight.sum(1, keepdim=True))
    assert torch.equal(timm.create_model(f"hf-hub:{REPO}@{pushed.commit}", pretrained=True).eval()(IMAGES), expected)

    hub.requests.clear()
    set_constants(monkeypatch, HF_HUB_OFFLINE=True)
    assert torch.equal(load()(IMAGES), expected)
    assert hub.requests == []


def test_local_dir_and_pull(hub, run_dir, expected, cli, tmp_path):
    assert torch.equal(timm.create_model(f"local-dir:{run_dir}", pretrained=True).eval()(IMAGES), expected)
    push_to_hub(run_dir, REPO)
    status, out, err = cli("pull", REPO, tmp_path / "new" / "pulled")
    assert (status, err) == (0, [])
    assert "local-dir:" in out
    assert {file.name for file in (tmp_path / "new" / "pulled").iterdir()} == PUSHED
    model = timm.create_model(f"local-dir:{tmp_path / 'new' / 'pulled'}", pretrained=True, num_classes=10).eval()
    assert torch.equal(model(IMAGES), expected)


def test_config_tells_nothing_of_the_machine(hub, run_dir):
    edit(run_dir / "config.json", lambda config: config["pretrained_cfg"].update(file="/home/alice/x", url="http://x"))
    push_to_hub(run_dir, REPO)
    config = json.loads(hub.repos[REPO].files["config.json"])
    assert config["architecture"] == "plain_cnn8_cifar"
    assert not {"file", "url", "source", "hf_hub_id"} & set(config["pretrained_cfg"])


def test_pushing_the_same_again_changes_nothing(hub, run_dir, cli):
    push_to_hub(run_dir, REPO)
    commits = list(hub.repos[REPO].messages)
    hub.requests.clear()
    status, out, err = cli("push", run_dir, REPO)
    assert (status, err) == (0, [])
    assert "nothing to push" in out
    assert hub.repos[REPO].messages == commits
    assert hub.requests == [("GET", f"/api/models/{REPO}")]


def test_a_changed_run_is_one_commit_of_what_changed(hub, run_dir):
    push_to_hub(run_dir, REPO)
    hub.repos[REPO].files["notes.txt"] = b"the owner's own"
    (run_dir / "masks.png").unlink()
    edit(run_dir / "result.json", lambda result: result["final"].update(top1=92.0, error=8.0))
    pushed = push_to_hub(run_dir, REPO, commit_message="a longer\nrun")
    assert set(pushed.changed) == {"README.md", "result.json", "masks.png"}
    assert hub.repos[REPO].messages[2:] == ["a longer run"]
    assert "masks.png" not in hub.repos[REPO].files
    assert "notes.txt" in hub.repos[REPO].files


def test_private_and_revision(hub, run_dir, cli):
    assert cli("push", run_dir, REPO, "--private", "--message", "first")[0] == 0
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.messages[-1] == "first"
    assert cli("push", run_dir, REPO, "--private")[0] == 0
    repo.branches["draft"] = repo.branches["main"]
    main_before = repo.branches["main"]
    edit(run_dir / "result.json", lambda result: result.update(seed=7))
    assert cli("push", run_dir, REPO, "--revision", "draft")[0] == 0
    assert repo.branches["main"] == main_before
    assert json.loads(repo.trees[repo.branches["draft"]]["result.json"])["seed"] == 7

    hub.add("alice/public", {})
    status, _, err = cli("push", run_dir, "alice/public", "--private")
    assert status == 1
    assert err == ["error: alice/public exists and is public: make it private in its settings, or push without private"]
    assert set(hub.repos["alice/public"].files) == {".gitattributes"}


def test_dry_run_sends_nothing(hub, run_dir, cli, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, out, err = cli("push", run_dir, REPO, "--dry-run")
    assert (status, err, hub.requests) == (0, [], [])
    assert all(name in out for name in PUSHED)
    written = {file.name: file.read_bytes() for file in (run_dir / "hub").iterdir()}
    assert cli("push", run_dir, REPO, "--dry-run")[0] == 0  # again, over what the first wrote
    monkeypatch.setenv("HF_TOKEN", hub.writer)
    push_to_hub(run_dir, REPO)
    assert written == {name: content for name, content in hub.repos[REPO].files.items() if name in PUSHED}

    (run_dir / "hub" / "mine.txt").write_text("keep")
    status, _, err = cli("push", run_dir, REPO, "--dry-run")
    assert status == 1
    assert len(err) == 1
    assert "mine.txt" in err[0]
    assert (run_dir / "hub" / "mine.txt").read_text() == "keep"


def test_large_files_go_by_xet_if_the_client_has_it(xet, run_dir, expected, cli):
    status, _, err = cli("push", run_dir, REPO)
    assert (status, err) == (0, [])
    assert xet.xorbs
    assert not any("lfs" in path for _, path in xet.requests)
    assert xet.repos[REPO].files["model.safetensors"] == (run_dir / "model.safetensors").read_bytes()
    assert torch.equal(timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()(IMAGES), expected)
    assert "nothing to push" in cli("push", run_dir, REPO)[1]


# --- failures of a push ----------------------------------------------------------------------------------------------

STEPS = ("info", "create", "validate", "preupload", "lfs_batch", "lfs_upload", "lfs_verify", "commit")
FAILURES = (
    *((step, {"status": 500, "message": "internal"}) for step in STEPS),
    *((step, {"cut": True}) for step in STEPS),
    *((step, {"status": 503, "body": "<html>busy</html>"}) for step in ("validate", "commit")),
)


@pytest.mark.parametrize(("step", "how", "new"), [
    pytest.param(step, how, new, id=f"{step} {how.get('status', 'cut')} {'new' if new else 'existing'}")
    for step, how in FAILURES for new in (True, False) if new or step != "create"])
def test_failed_push_leaves_the_repository_as_it_was(hub, run_dir, cli, step, how, new):
    if not new:
        hub.add(REPO, {"README.md": b"old"})
    before = {name: (dict(repo.files), list(repo.messages)) for name, repo in hub.repos.items()}
    hub.fail(step, **how)
    status, _, err = cli("push", run_dir, REPO)
    assert status == 1
    assert len(err) == 1, err
    assert "server error" in err[0] if "status" in how else "connection" in err[0]
    assert "hf_" not in err[0]
    hub.mend()
    assert {name: (dict(repo.files), list(repo.messages)) for name, repo in hub.repos.items()} == before
    assert cli("push", run_dir, REPO)[0] == 0
    assert PUSHED <= set(hub.repos[REPO].files)


@pytest.mark.parametrize("step", ["xet_token", "xet_xorb", "xet_shard"])
@pytest.mark.parametrize(("how", "said"), [
    ({"status": 500}, "server error 500"), ({"status": 403}, "may not write to alice/net"), ({"cut": True}, "was cut"),
], ids=["500", "403", "cut"])
def test_failed_push_by_xet_leaves_the_repository_as_it_was(xet, run_dir, cli, step, how, said):
    repo = xet.add(REPO, {"README.md": b"old"})
    xet.fail(step, **how)
    status, _, err = cli("push", run_dir, REPO)
    assert status == 1
    assert len(err) == 1, err
    assert said in err[0]
    assert "hf_" not in err[0]
    assert repo.messages == ["initial commit"]
    xet.mend()
    assert cli("push", run_dir, REPO)[0] == 0
    assert PUSHED <= set(repo.files)


def test_new_repository_stays_if_it_cannot_be_removed(hub, run_dir, cli):
    hub.fail("commit", cut=True)
    hub.fail("delete", status=403, message="no right to delete")
    status, _, err = cli("push", run_dir, REPO)
    assert status == 1
    assert err[0].endswith("(the new repository alice/net stays, empty; pushing again fills it)")
    hub.mend()
    assert cli("push", run_dir, REPO)[0] == 0


def test_lost_answer_of_the_commit(hub, run_dir, cli):
    hub.fail("commit", cut=True, late=True)
    status, out, err = cli("push", run_dir, REPO)
    assert (status, err) == (0, [])
    assert hub.repos[REPO].branches["main"][:12] in out


def test_damaged_upload(hub, run_dir, cli):
    hub.fail("lfs_upload", damage=True)
    status, _, err = cli("push", run_dir, REPO)
    assert status == 1
    assert err == ["error: alice/net: the Hub refused (the uploaded file does not have the checksum it was announced "
                   "with)"]
    assert hub.repos == {}


def test_somebody_else_pushes_meanwhile(hub, run_dir, cli):
    repo = hub.add(REPO, {})
    hub.fail("commit", meanwhile=lambda: repo.commit("main", {"theirs.txt": b""}, "theirs"), times=1)
    status, _, err = cli("push", run_dir, REPO)
    assert status == 1
    assert len(err) == 1
    assert "changed by somebody else" in err[0]
    assert set(repo.files) == {"theirs.txt"}
    assert cli("push", run_dir, REPO)[0] == 0
    assert "theirs.txt" in repo.files


def test_interrupted_push(hub, run_dir, cli, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupt)
    status, _, err = cli("push", run_dir, REPO)
    assert status == 130
    assert len(err) == 1
    assert hub.repos == {}
    monkeypatch.setattr("huggingface_hub.HfApi.delete_repo", interrupt)
    status, _, err = cli("push", run_dir, REPO)
    assert status == 130
    assert err == ["error: interrupted; run the same command again"]
    monkeypatch.setattr("huggingface_hub.HfApi.delete_repo", lambda *_, **__: 1 / 0)
    hub.repos.clear()
    status, _, err = cli("push", run_dir, REPO)
    assert status == 130
    assert err == [f"error: interrupted; the new repository {REPO} stays, empty; pushing again fills it"]


@pytest.mark.parametrize(("setup", "said"), [
    (lambda hub, patch: patch.delenv("HF_TOKEN"), "no access token of the Hub"),
    (lambda hub, patch: patch.setenv("HF_TOKEN", hub.reader), "may not write to alice/net"),
    (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_" + "x" * 30), "did not accept the token"),
    (lambda hub, patch: set_constants(patch, ENDPOINT="http://127.0.0.1:9"), "http://127.0.0.1:9 failed"),
    (lambda hub, patch: hub.fail("create", status=403, message="no such organisation"), "may not write to alice/net"),
    (lambda hub, patch: hub.fail("create", status=429, message="slowly"), "slow down"),
    (lambda hub, patch: set_constants(patch, HF_HUB_OFFLINE=True), "HF_HUB_OFFLINE"),
], ids=["no token", "no right", "bad token", "no server", "no namespace", "too many", "offline"])
def test_push_that_may_not_be(hub, run_dir, cli, monkeypatch, setup, said):
    setup(hub, monkeypatch)
    status, out, err = cli("push", run_dir, REPO)
    assert status == 1
    assert len(err) == 1
    assert said in err[0]
    assert not any(secret in out + err[0] for secret in (hub.writer, hub.reader, "x" * 30))
    assert hub.repos == {}


def test_wrong_revision(hub, run_dir, cli):
    assert cli("push", run_dir, REPO, "--revision", "v9")[2] == [
        "error: alice/net does not exist yet, so it has no revision 'v9': push without a revision first"]
    assert hub.repos == {}
    hub.add(REPO, {})
    assert cli("push", run_dir, REPO, "--revision", "v9")[2] == ["error: alice/net has no revision 'v9'"]
    assert len(hub.repos[REPO].messages) == 1


def test_dry_run_on_a_full_disk(hub, run_dir, cli):
    with full_disk():
        status, _, err = cli("push", run_dir, REPO, "--dry-run")
    assert status == 1
    assert err == [f"error: {run_dir / 'hub'} cannot be written: File too large"]
    assert not [file for file in run_dir.iterdir() if file.is_dir()]


@pytest.mark.parametrize("argv", [
    ["push"], ["push", "run"], ["push", "run", "no-user"], ["push", "run", "a/b/c"], ["push", "run", "a/b c"],
    ["push", "run", "a/b", "--message", " "], ["pull", "a/b"], ["send", "run", "a/b"]])
def test_usage(cli, argv):
    status, _, err = cli(*argv)
    assert status == 2
    assert err[-1].startswith("python -m ran_layers.hub")


# --- as a person runs it ---------------------------------------------------------------------------------------------


def test_command_line_in_a_process_of_its_own(run_dir, tmp_path):
    """``python -m ran_layers.hub`` with everything from the environment."""
    with HubServer() as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.writer, "HF_HOME": str(tmp_path / "home"),
               "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
               "PYTHONPATH": str(Path(ran_layers.__file__).parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", "")}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "ran_layers.hub", "push", str(run_dir), REPO],
            env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"{hub.url}/{REPO} is at" in done.stdout
        assert PUSHED <= set(hub.repos[REPO].files)
        assert hub.writer not in done.stdout
        for path in [*tmp_path.rglob("*")]:
            assert not path.is_file() or hub.writer.encode() not in path.read_bytes(), path


def test_errors_keep_no_token_in_their_traceback(hub, run_dir, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    with pytest.raises(HubError) as caught:
        push_to_hub(run_dir, REPO)
    printed = io.StringIO()
    traceback.print_exception(caught.value, file=printed)
    assert "x" * 30 not in printed.getvalue()
