"""The command under test: $PERTA, or build/perta."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PERTA = Path(os.environ.get("PERTA", ROOT / "build/perta")).resolve()


@pytest.fixture
def perta(tmp_path):
    """Run the command in the test's own folder; assert its exit status (None: any)."""

    def run(*args, check=0, env=None, **kw):
        kw = {"cwd": tmp_path, "timeout": 120} | kw
        result = subprocess.run(
            [str(PERTA), *map(str, args)],
            capture_output=True,
            text=True,
            env=os.environ | (env or {}),
            **kw,
        )
        if check is not None:
            assert result.returncode == check, f"{args}: {result.returncode}\n{result.stderr}"
        return result

    return run
