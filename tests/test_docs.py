"""The documentation: every code block of README and docs runs, the site builds strictly, and no link in it is broken.

A page's blocks run one after the other in an empty folder, Python in one namespace, commands in a short form: one step
of training, a stand-in for the Hub. The few that cannot run are in ``NOT_RUN``, with the reason.
"""
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from hub_fixtures import write
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<lang>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = ("sh", "bash", "console")
NOT_RUN = {
    "hf auth login": "asks for the token of a real account",
    "python -m pytest": "is this",
    "python -m ran_layers.demo": "serves until it is stopped; tests/test_demo.py runs it",
    "export": "is the shell's",
}
ON_CPU = ["--device", "cpu"]
ONE_STEP = ["--epochs", "1", "--limit", "16", "--batch-size", "16"]


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Return language, code and line of the page's code blocks."""
    text = page.read_text()
    return [(m["lang"], m["code"], text.count("\n", 0, m.start("code")) + 1) for m in FENCE.finditer(text)]


def commands(code: str) -> list[list[str]]:
    """Return the commands of a shell block: lines, and the parts of lines joined by &&."""
    lines = code.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.removeprefix("$ ").split(" && ")]
    return [argv for part in parts if (argv := shlex.split(part, comments=True))]


WITH_CODE = [page for page in PAGES if any(lang in ("python", *SHELLS) for lang, _, _ in blocks(page))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder; what the training script changes in the process is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path / "page")
    yield tmp_path / "page"
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def photos(folder):
    """The images that the pages speak of."""
    (folder / "photos").mkdir()
    for name in ("cat.png", "photos/dog.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(folder / name)


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """A folder with CIFAR-10 and CIFAR-100 of 16 and 4 rows, which hf_hub_download finds too."""
    import huggingface_hub
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    for repo, label in (("cifar10/plain_text", "label"), ("cifar100/cifar100", "fine_label")):
        path = tmp_path / "data" / "uoft-cs" / repo
        path.mkdir(parents=True)
        for split, rows in (("train", 16), ("test", 4)):
            images = [{"bytes": buffer.getvalue(), "path": None}] * rows
            pq.write_table(pa.table({"img": images, label: [i % 10 for i in range(rows)]}),
                           path / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download",
        lambda repo_id, filename, repo_type: str(tmp_path / "data" / repo_id / filename))
    return tmp_path / "data"


@pytest.fixture
def few_test_images(monkeypatch):
    """Trainings are evaluated on 20 images."""
    import cifar

    def load_few(name, data_dir=None):
        data = load_dataset(name, data_dir)
        return replace(data, test_images=data.test_images[:20], test_labels=data.test_labels[:20])

    load_dataset = cifar.load_dataset
    monkeypatch.setattr(cifar, "load_dataset", load_few)


@pytest.fixture
def published_run(folder, hub, plain_files):
    """A finished run, and the Hub with what the page has pushed at another time: a tag v1."""
    from ran_layers import push_to_hub

    (folder / "runs").mkdir()
    write(folder / "runs" / "att56", plain_files)
    push_to_hub("runs/att56", "alice/ran_att56_cifar.cifar10", private=True)
    branches = hub.repos["alice/ran_att56_cifar.cifar10"].branches
    branches["v1"] = branches["main"]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_runs(page, folder, photos, cifar_files, few_test_images, monkeypatch, request):
    if page.name == "publishing.md":
        request.getfixturevalue("published_run")
    if page.name == "keras.md":
        run_keras_page(page)
        return
    module = ModuleType("page")  # timm asks for the module of what is registered
    monkeypatch.setitem(sys.modules, "page", module)
    for lang, code, line in blocks(page):
        code = code.replace("USER/", "alice/")
        if lang == "python":
            if "export.Dim" in code and torch.__version__ < (2, 13):
                continue  # as the page says
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))
        elif lang in SHELLS:
            for argv in commands(code):
                run_command(argv, cifar_files)
        else:
            assert lang in ("text", "toml", "yaml", "bibtex"), f"{page.name}:{line}: what is a block of {lang}?"


def run_keras_page(page: Path) -> None:
    """Run the Python blocks in a process of their own, as Keras fixes its backend when it is imported."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    for lang, code, _ in blocks(page):
        if lang in SHELLS:
            for argv in commands(code):
                run_command(argv, None)
    source = "\n".join(code for lang, code, _ in blocks(page) if lang == "python")
    env = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run_command(argv: list[str], data: Path | None) -> None:
    """Run one command of a page in a short form, or check what can be checked of it."""
    command = " ".join(argv)
    if any(command.startswith(start) for start in NOT_RUN):
        return
    if argv[:2] == ["pip", "install"]:
        check_extras(argv[2:])
    elif argv[:2] == ["python", "benchmarks/cifar.py"]:
        run_cifar(argv[2:], data)
    elif argv[:2] == ["torchrun", "--nproc-per-node"] and argv[3] == "benchmarks/cifar.py":
        assert int(argv[2]) > 1
        run_cifar(argv[4:], data)  # in one process; tests/test_distributed.py starts several
    elif argv[:2] == ["python", "benchmarks/study.py"]:
        run_study(argv[2:])
    elif argv[:3] == ["python", "-m", "ran_layers.hub"]:
        from ran_layers.hub.__main__ import main
        assert main(argv[3:]) == 0, command
    elif argv[:3] == ["python", "-m", "ran_layers.maps"]:
        from ran_layers.maps import main
        assert main(argv[3:]) == 0, command
    elif argv[0] == "python" and argv[1].startswith("benchmarks/"):
        parse_arguments(argv[1:])
    elif argv[0] == "python" and argv[1].startswith(("docs/", "examples/")):
        assert (ROOT / argv[1]).is_file(), command  # tests of their own run them
    else:
        pytest.fail(f"no test runs: {command}")


def parse_arguments(argv: list[str]) -> None:
    """Run a script as far as its arguments are parsed: tests of their own run the rest."""
    class ParsedError(Exception):
        """The script goes on to its work."""

    def stop() -> None:
        raise ParsedError

    module = importlib.import_module(Path(argv[0]).stem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "one_line_errors", stop)
        with pytest.raises(ParsedError):
            module.main(argv[1:])


def check_extras(args: list[str]) -> None:
    """Packages are not installed by a test; the extras that are named must be there."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)[1]
    known = re.findall(r"^(\w+) =", extras, re.MULTILINE)
    for arg in args:
        named = re.fullmatch(r"(?:\.|ran-layers)\[([\w,]+)\]", arg)
        assert set(named[1].split(",") if named else []) <= set(known), arg


def run_study(args: list[str]) -> None:
    """Let the study plan and write in a folder of its own; tests/test_study.py runs small experiments."""
    import study

    from studies import report as study_report

    docs = Path("study_docs")
    docs.mkdir(exist_ok=True)
    shutil.copyfile(ROOT / "docs" / "results.md", docs / "results.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_report, "draw", lambda table, finished: b"")  # tests/test_study.py draws
        patch.setattr(study, "execute", lambda run, args, deadline: False)
        patch.setattr(study, "macs_of", lambda model, kwargs: 1_000_000)  # counting those of all networks takes long
        study.main([*args, "--docs", str(docs), "--runs", "study_runs"])


def run_cifar(args: list[str], data: Path) -> None:
    """Train for one step on few images, or resume or evaluate what such a training left."""
    import cifar

    from harness import options

    args = [{"DIR": "runs/ran_att56_cifar-cifar10-quick-0"}.get(arg, arg) for arg in args]
    if "--help" in args:
        with pytest.raises(SystemExit) as exit_info:
            cifar.main(args)
        assert exit_info.value.code == 0
        return
    run = options.parse_args(args)
    if not (run.resume or run.eval_only):  # a reader picks one of the page's commands for a folder
        further = "-further" if run.initial_checkpoint else ""
        folder = run.out or Path("runs") / f"{run.model}-{run.dataset}-{run.recipe or 'quick'}-{run.seed}{further}"
        shutil.rmtree(folder, ignore_errors=True)
    cifar.main([*args, *ON_CPU, *([] if run.eval_only else ONE_STEP), "--data-dir", str(data)])


def test_the_tables_in_the_pages_are_up_to_date():
    written = subprocess.run(  # in a process of its own: tests register networks with timm
        [sys.executable, "-c", "import tables\nfor page in tables.pages(): print(page, page.read_text() == "
                               "tables.with_tables(page))"],
        cwd=ROOT / "docs", env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    assert written.stdout.count("True") > 5
    assert "False" not in written.stdout, f"python docs/tables.py\n{written.stdout}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_is_linked_to_is_there(name):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text())
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


class Links(HTMLParser):
    """What a page links to and shows, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in ("img", "script", "iframe", "source") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, which the extra 'docs' brings")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_no_link_of_the_site_is_broken_and_nothing_is_loaded_from_elsewhere(site):
    pages = {page: Links(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) >= len(PAGES) - 1
    broken = []
    for page, found in pages.items():
        broken += [f"{page.name} loads {url}" for url in found.loaded if urlsplit(url).scheme not in ("", "data")]
        for url in [*found.links, *found.loaded]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{page.name} -> {url}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{page.name} -> {url} (no such anchor)")
    assert not broken, "\n".join(broken)


def test_formulas_and_tables_are_made(site):
    layers = (site / "layers.html").read_text()
    assert layers.count("<math") > 10
    assert "arithmatex" not in layers
    models = (site / "models.html").read_text()
    assert "31,810,728" in models
    assert "52,466,344" in models
    assert not any("<!-- " in page.read_text().partition("<article")[2].partition("</article>")[0]
                   for page in site.glob("*.html"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, which the extra 'test' brings")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_pages_fit_a_phone_and_show_their_images(site, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    problems = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    # The icon of a page is still loading when a fast machine goes to the next one, which aborts it. That the file is
    # there the test of the links has seen.
    page.on("requestfailed", lambda request: request.failure != "net::ERR_ABORTED" and problems.append(
        f"cannot load {request.url}: {request.failure}"))
    for file in sorted(site.rglob("*.html")):
        if file.name == "404.html":
            continue
        page.goto(file.as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        missing = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        problems += [f"{file.name} is {width} px wide"] if width > 390 else []
        problems += [f"{file.name} shows no {image}" for image in missing]
    assert not problems, "\n".join(problems)
