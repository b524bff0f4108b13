"""The demo page: served on loopback alone, and used in a headless Chromium as a person would."""
import json
import os
import re
import shutil
import socket
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ran_layers import demo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(timm.create_model("ran_att56_cifar", num_classes=10).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": "ran_att56_cifar", "num_classes": 10, "label_names": NAMES,
        "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1.0}}))
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def serve(monkeypatch):
    """Run the command up to the point where it would wait for ever, and end its server afterwards."""
    gradio = pytest.importorskip("gradio", reason="needs Gradio, the extra 'demo'")
    pages = []
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: pages.append(page))
    yield demo.main
    for page in pages:
        page.close(verbose=False)


def accepts(host, port):
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex((host, port)) == 0


def test_it_answers_with_classes_and_picture(run_dir, photo):
    classes, picture = demo.look(str(photo), str(run_dir), 1)
    assert len(classes) == 5
    assert set(classes) <= set(NAMES)
    assert list(classes.values()) == sorted(classes.values(), reverse=True)
    assert picture.width > demo.look(str(photo), str(run_dir), 0)[1].width
    assert demo.look(None, str(run_dir), 1) == (None, None)


def test_an_image_goes_through_the_network_once(run_dir, photo):
    runs = []
    hook = demo.trained_model(str(run_dir)).register_forward_hook(lambda *_: runs.append(1))
    try:
        demo.look(str(photo), str(run_dir), 1)
    finally:
        hook.remove()
    assert len(runs) == 1


def test_what_cannot_be_served_gets_one_line(run_dir, monkeypatch, capsys):
    assert demo.main(["--model", str(run_dir / "none")]) == 2
    assert "must be a timm name" in capsys.readouterr().err
    assert demo.main(["--model", "ran_att128_cifar_orig"]) == 2
    assert "no trained weights" in capsys.readouterr().err
    monkeypatch.setattr(timm, "list_pretrained", lambda pattern: [])
    assert demo.main([]) == 2
    assert "--model NAME_OR_DIR" in capsys.readouterr().err
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main(["--model", str(run_dir)]) == 2
    assert 'pip install "ran-layers[demo]"' in capsys.readouterr().err


def test_what_is_said_of_the_images_depends_on_who_reaches_the_page(run_dir):
    gradio = pytest.importorskip("gradio", reason="needs Gradio, the extra 'demo'")
    for host, said in (("127.0.0.1", demo.AT_HOME), ("::1", demo.AT_HOME), ("localhost", demo.AT_HOME),
                       ("0.0.0.0", demo.ELSEWHERE), ("192.168.0.7", demo.ELSEWHERE), ("example.org", demo.ELSEWHERE)):
        page = demo.build_page([str(run_dir)], host)
        about, = (block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown))
        assert about.endswith(said), host
        assert page.delete_cache == (demo.CHECKED_EVERY, demo.KEPT_FOR)


def test_a_file_that_is_no_image_gets_to_the_page_s_own_message(run_dir, tmp_path):
    gradio = pytest.importorskip("gradio", reason="needs Gradio, the extra 'demo'")
    page = demo.build_page([str(run_dir)])
    image, = (block for block in page.blocks.values() if block.elem_id == "image")
    heic = tmp_path / "photo.heic"
    heic.write_bytes(b"no image")
    payload = gradio.data_classes.ImageData(path=str(heic))
    assert image.preprocess(payload) == str(heic)
    assert image.preprocess(None) is None
    with pytest.raises(OSError, match=r"photo.heic: not an image of PNG, JPEG, "):
        demo.look(str(heic), str(run_dir), 1)


def test_postscript_is_not_run(run_dir, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture, "EPS")
    with pytest.raises(OSError, match=r"picture\.png: not an image of PNG, JPEG, "):
        demo.look(str(picture), str(run_dir), 1)


def test_classes_of_one_name_are_both_shown(photo, tmp_path, monkeypatch):
    model = timm.create_model("ran_att56_cifar", num_classes=2, pretrained_cfg_overlay=dict(label_names=["crane"] * 2))
    monkeypatch.setattr(demo, "trained_model", lambda name: model.eval())
    classes, _ = demo.look(str(photo), "any", 0)
    assert set(classes) == {"crane", "crane (another class)"}
    assert sum(classes.values()) == pytest.approx(1)


def test_what_gradio_cannot_serve_gets_one_line(run_dir, serve, monkeypatch, capsys):
    import gradio

    def launch(page, **kwargs):
        assert os.environ["GRADIO_RUN_HISTORY"] == "false"
        raise ValueError("When localhost is not accessible, a shareable link must be created.")

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    for name in ("GRADIO_RUN_HISTORY", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert serve(["--model", str(run_dir)]) == 2
    assert "set NO_PROXY" not in capsys.readouterr().err
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    assert serve(["--model", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot serve at 127.0.0.1: When localhost is not accessible")
    assert error.endswith("; set NO_PROXY to it\n")
    with pytest.raises(SystemExit):
        demo.main(["--port", "70000"])
    assert "must be at most 65535, got 70000" in capsys.readouterr().err


def test_it_is_served_over_ipv6(run_dir, serve, capsys):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    assert serve(["--model", str(run_dir), "--host", "::1"]) == 0
    assert "http://[::1]:" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux only")
def test_it_binds_where_it_is_told(run_dir, serve, capsys):
    # All of 127.0.0.0/8 is this machine: a server on 127.0.0.1 does not answer at 127.0.0.2, one on 0.0.0.0 does.
    assert serve(["--model", str(run_dir), "--host", "127.0.0.2"]) == 0
    url = urlsplit(re.search(r"http\S+", capsys.readouterr().out)[0])
    assert (url.hostname, accepts("127.0.0.2", url.port), accepts("127.0.0.1", url.port)) == ("127.0.0.2", True, False)
    assert serve(["--model", str(run_dir), "--port", str(url.port), "--host", "127.0.0.2"]) == 2
    assert f"cannot listen at 127.0.0.2, port {url.port}: Address already in use" in capsys.readouterr().err
    assert serve(["--model", str(run_dir), "--host", "192.0.2.1"]) == 2  # an address of nobody (RFC 5737)
    assert "cannot listen at 192.0.2.1: " in capsys.readouterr().err


def test_a_person_drops_an_image(run_dir, photo, serve, capsys, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the path")
    assert serve(["--model", str(run_dir)]) == 0
    address = re.search(r"http\S+", capsys.readouterr().out)[0]
    assert (urlsplit(address).hostname, accepts("127.0.0.2", urlsplit(address).port)) == ("127.0.0.1", False)

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(60_000)
        errors, hosts = [], set()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)

        page.set_input_files("#image input[type=file]", photo)
        picture = page.locator("#masks img")
        picture.wait_for()
        page.wait_for_function("document.querySelector('#masks img').naturalWidth > 1000")
        assert re.search(rf"({'|'.join(NAMES)})\s+\d+%", page.locator("#prediction").inner_text())
        width = picture.evaluate("image => image.naturalWidth")

        page.locator("#channels input[type=number]").fill("0")  # fewer channels, a narrower picture
        page.locator("#channels input[type=number]").press("Enter")
        page.wait_for_function(f"document.querySelector('#masks img').naturalWidth < {width}")

        page.locator("#masks button[aria-label='Download']").hover()
        buttons_end, picture_starts = page.evaluate("""[
            Math.max(...[...document.querySelectorAll('#masks button[aria-label]')]
                .map(button => button.getBoundingClientRect().bottom)),
            document.querySelector('#masks img').getBoundingClientRect().top
                + parseFloat(getComputedStyle(document.querySelector('#masks img')).paddingTop)]""")
        assert buttons_end <= picture_starts  # no button over the picture's first line

        page.set_viewport_size({"width": 390, "height": 844})  # a phone
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

        bad = tmp_path / "bad.png"
        bad.write_bytes(photo.read_bytes()[:500])
        page.locator("#image button[aria-label='Remove Image'], #image button[aria-label='Clear']").first.click()
        page.set_input_files("#image input[type=file]", bad)
        message = page.get_by_text("bad.png:")
        message.wait_for()
        assert str(tmp_path.parent) not in message.inner_text()
        assert "/" not in message.inner_text()
        assert errors == []
        assert hosts <= {"127.0.0.1", None}  # None: data and blob addresses, which go nowhere
        browser.close()
