"""manifest.json is canonical: each record has one spelling, so that it can be signed."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
from reference import write_folder

ROLES = ("model", "tuned", "base", "forget", "retain")


def canonical(record):
    """The spelling that docs/manifest.md defines."""
    text = json.dumps(record, sort_keys=True, indent=1, separators=(",", ": "), ensure_ascii=False)
    return text.encode()


def make_inputs(folder):
    """Tensors whose names JSON escapes, and others."""
    rng = np.random.default_rng(11)
    names = ["w", "z/a", 'quote"', "back\\slash", "tab\t", "\x01\x1f\x7f", "ä.ß", "😀", "\uffff"]
    for role in ROLES:
        tensors = {name: rng.standard_normal((7, 3)).astype("f4") for name in names}
        write_folder(folder / role, tensors)


def unlearn(perta, cwd, *flags):
    words = [word for role in ROLES for word in (f"--{role}", role)]
    shutil.rmtree(cwd / "p", ignore_errors=True)
    perta("unlearn", *words, "--patch", "p", *flags, cwd=cwd)
    return {path: path.read_bytes() for path in sorted((cwd / "p").rglob("manifest.json"))}


def test_python_spells_the_record_with_the_same_bytes(perta, tmp_path):
    make_inputs(tmp_path)
    rng = np.random.default_rng(12)
    alphas = [f"{x:.6g}" for x in rng.standard_normal(20) * 10.0 ** rng.integers(-12, 12, 20)]
    alphas += ["0", "1", "-1", "1e16", "123456", "0.0001", "1e-5", "1e37", "1e-45", "5.9604644775390625e-08"]
    for flags in (
        [f"--alpha={','.join(alphas)}", "--include", "*\t*", "--include", "[!ä]*"],
        "--method power --power 0.1".split(),
        "--method power --power 7".split(),
        "--method constant --weight 1e-7".split(),
        "--method random --seed 18446744073709551615".split(),
    ):
        records = unlearn(perta, tmp_path, *flags)
        assert len(records) == (30 if "alpha" in flags[0] else 1)
        for path, data in records.items():
            assert data == canonical(json.loads(data)), path
    perta("diff", "model", "tuned", "--patch", "d")
    data = (tmp_path / "d/manifest.json").read_bytes()
    assert data == canonical(json.loads(data))


def test_two_runs_in_two_places_give_the_same_bytes(perta, tmp_path):
    """The record holds no times, no paths, and no machine-related flags."""
    runs = []
    for place, flags in (
        ("here", "--threads 1 --io pread --memory 300M"),
        ("some/where else", "--threads 3 --io mmap --out m"),
    ):
        cwd = tmp_path / place
        cwd.mkdir(parents=True)
        make_inputs(cwd)
        for path in cwd.rglob("*"):
            os.utime(path, (1, len(runs)))
        runs += unlearn(perta, cwd, *flags.split()).values()
    assert runs[0] == runs[1]
    assert str(tmp_path).encode() not in runs[0] and os.uname().nodename.encode() not in runs[0]
    assert not re.search(rb'"[^"]*(time|date|host|path|thread)[^"]*":', runs[0])


def test_names_that_checksum_files_escape(perta, tmp_path):
    """Escaped as in GNU sha256sum; xxhsum does not escape them."""
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["a\\b.txt", "\\", "\\n", "plain", "ä"]
    for name in names:
        (folder / name).write_text(name)
    manifest = perta("manifest", "odd").stdout
    assert sorted(file["name"] for file in json.loads(manifest)["files"]) == sorted(names)
    (tmp_path / "odd.json").write_text(manifest)
    perta("verify", "odd", "--manifest", "odd.json")
    (folder / "a\\b.txt").write_text("other")
    assert "a\\b.txt: differs" in perta("verify", "odd", "--manifest", "odd.json", check=1).stdout

    sums = perta("manifest", "odd", "--format", "sha256sum").stdout
    gnu = subprocess.run(["sha256sum", *sorted(names)], cwd=folder, capture_output=True, text=True)
    assert sorted(sums.splitlines()) == sorted(gnu.stdout.splitlines())
    subprocess.run(["sha256sum", "--check"], cwd=folder, input=sums, text=True, check=True)
    if shutil.which("xxhsum"):
        sums = perta("manifest", "odd", "--format", "xxhsum").stdout
        subprocess.run(["xxhsum", "--check"], cwd=folder, input=sums, text=True, check=True)

    (folder / "two\nlines").write_text("x")
    for form in ("perta", "xxhsum", "sha256sum"):
        refused = perta("manifest", "odd", "--format", form, check=3)
        assert "two?lines: has a line break" in refused.stderr and not refused.stdout
