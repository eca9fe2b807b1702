"""The page about a patch: complete, self-contained, and rendered by a real browser if there is
one."""

import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import HANGS
from reference import write_folder

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
HOSTILE = "a.0.</script><img src=x onerror=alert(1)>"


@pytest.fixture
def patch(perta, tmp_path):
    rng = np.random.default_rng(3)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["model.norm.weight", HOSTILE]
    for role in ["model", "tuned", "base", "forget", "retain"]:
        write_folder(tmp_path / role, {n: rng.normal(size=(8, 9)).astype(np.float32) for n in names})
    folders = [f"--{role}={role}" for role in ["model", "tuned", "base", "forget", "retain"]]
    perta("unlearn", *folders, "--patch", "patch")
    return tmp_path / "patch"


def record_of(page: str, name: str = "manifest") -> dict:
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


def test_the_page_holds_the_record_and_nothing_from_outside(perta, patch, tmp_path):
    perta("report", "patch", "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert record_of(page) == json.loads((patch / "manifest.json").read_text())
    assert "onerror=alert(1)>" in page and "<img" not in page
    assert re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?\w+:", page) == []
    assert not list(tmp_path.glob("*.perta-partial"))


def test_a_file_that_is_there_stays(perta, patch, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    assert "--force replaces it" in perta("report", "patch", "--html", "page.html", check=2).stderr
    assert (tmp_path / "page.html").read_text() == "mine"
    refused = perta("report", "patch", "--html", "page.html", "--force", check=2).stderr
    assert "page.html: exists, and perta did not write it" in refused
    assert (tmp_path / "page.html").read_text() == "mine"
    perta("report", "patch", "--html", "other.html")
    before = (tmp_path / "other.html").stat().st_ino
    perta("report", "patch", "--html", "other.html", "--force")
    assert (tmp_path / "other.html").stat().st_ino != before
    assert (tmp_path / "other.html").read_text().startswith("<!doctype html>")
    assert "not a regular file" in perta("report", "patch", "--html", "model", "--force", check=2).stderr
    assert "nowhere" in perta("report", "patch", "--html", "nowhere/page.html", check=4).stderr


def test_what_is_no_patch_is_refused(perta, patch, tmp_path):
    assert "model" in perta("report", "model", "--html", "page.html", check=3).stderr
    assert not (tmp_path / "page.html").exists()


def test_an_audit_is_shown_of_this_patch_alone(perta, patch, tmp_path):
    digest = hashlib.sha256((patch / "manifest.json").read_bytes()).hexdigest()
    whole = {"perta_audit": 1, "patch": {"manifest_sha256": digest}, "verdict": HOSTILE, "x": [0.1, None]}
    audit = tmp_path / "audit.json"

    def report(value, check):
        audit.write_text(value if isinstance(value, str) else json.dumps(value))
        return perta("report", "patch", "--html", "page.html", "--audit", "audit.json", check=check).stderr

    assert "audit.json: the audit of another patch than patch" in report(whole | {"patch": {"manifest_sha256": "0" * 64}}, 1)
    for other in ({}, [], whole | {"perta_audit": 2}, whole | {"patch": {}}, whole | {"patch": {"manifest_sha256": 3}}):
        assert "audit.json: not an audit.json of this version" in report(other, 3)
    assert "audit.json: " in report(json.dumps(whole)[:-9], 3)
    assert "audit.json: " in report("", 3)
    assert "no such file" in perta("report", "patch", "--html", "page.html", "--audit", "none", check=3).stderr
    assert not (tmp_path / "page.html").exists()
    report(whole, 0)
    page = (tmp_path / "page.html").read_text()
    assert record_of(page, "audit") == whole and "<img" not in page
    assert record_of(page) == json.loads((patch / "manifest.json").read_text())
    perta("report", "patch", "--html", "page.html", "--force")
    assert record_of((tmp_path / "page.html").read_text(), "audit") is None


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_browser_draws_it(perta, patch, tmp_path):
    perta("report", "patch", "--html", "page.html")
    shot = tmp_path / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2400"]
    page = f"file://{tmp_path}/page.html"
    run = {"check": True, "capture_output": True, "text": True, "timeout": HANGS}
    dom = subprocess.run([*command, "--dump-dom", page], **run).stdout
    subprocess.run([*command, f"--screenshot={shot}", page], **run)
    drawn = dom.partition("<script")[0]
    assert "cannot be drawn" not in drawn and "What this patch makes a model forget" in drawn
    assert ">360<" in drawn and "layer 2" in drawn and "Distribution of the weights w" in drawn
    assert "&lt;img src=x" in drawn and "<img" not in drawn
    assert shot.stat().st_size > 20_000


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_browser_draws_what_a_one_way_patch_says(perta, patch, tmp_path):
    folders = [f"--{role}={role}" for role in ["model", "tuned", "base", "forget", "retain"]]
    perta("unlearn", *folders, "--patch", "public", "--one-way")
    perta("report", "public", "--html", "page.html")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/page.html"]
    drawn = subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANGS).stdout.partition("<script")[0]
    assert "cannot be drawn" not in drawn and ">360<" in drawn and "layer 2" in drawn
    assert "undefined" not in drawn and "NaN" not in drawn and "mean w" not in drawn


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_browser_draws_the_path(perta, tmp_path):
    """The page shows where the patch leads, which need not be the end of the path."""
    pytest.importorskip("torch")
    from test_steps import STEPS, make_folders

    make_folders(tmp_path)
    flags = ["--max-retain-rise", "-100"]  # the first step exceeds it
    assert json.loads(perta(*STEPS, "1", *flags).stdout)["chosen"] == 0
    perta("report", "patch", "--html", "page.html")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/page.html"]
    drawn = subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANGS).stdout.partition("<script")[0]
    assert "The path" in drawn and "The patch leads to step 0." in drawn
    assert "mean probability of 0.00299, and have 0.00299 there" in drawn
