"""`make bench` at a size that takes seconds, so that it keeps working."""

import json
import subprocess
import sys

import pytest
from conftest import PERTA, ROOT
from test_limits import sanitized

pytest.importorskip("matplotlib", reason="bench/requirements.txt is not installed")
BUILD = PERTA.parent


@sanitized
@pytest.mark.skipif(not (BUILD / "bench/bench_codec").exists(), reason="bench/ is not built there")
def test_everything_is_measured_and_written_down(tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, ROOT / "bench/run.py", BUILD, tmp_path / "work", "--gb", "0.002"]
    command += ["--rounds", "1", "--warm", "--results", results]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    measured = json.loads((results / "results.json").read_text())
    by_regime = {(r["dtype"], r["regime"]): r for r in measured["codec"]}
    for regime in ("light", "medium", "heavy"):
        r = by_regime["BF16", regime]
        perta = r["coders"]["perta"]["bits"]
        assert perta < 0.97 * r["entropy"]
        assert perta < 0.85 * r["coders"]["XOR, byte split, zstd 1"]["bits"]
    assert 0.84 < by_regime["BF16", "light"]["unchanged"] < 0.86  # the data are the same each time
    assert [p["tensors"] for p in measured["growth"]["sizes"]] == [1, 4, 10, 40]
    assert "## Patches" in (results / "results.md").read_text()
    for picture in ("codec.svg", "growth.svg"):
        assert (results / picture).read_text().rstrip().endswith("</svg>")
