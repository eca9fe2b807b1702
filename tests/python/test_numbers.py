"""Numbers that go wrong: each case is defined (docs/method.md, "Numbers") and reported for each
tensor."""

import json

import numpy as np
import pytest
from reference import BF16, narrow, read_folder, write_folder

ROLES = ["model", "tuned", "base", "forget", "retain"]
ONES = np.ones(8, "f4")


def write(folder, **roles):
    """One tensor "t" for each role, or several by name."""
    for role in ROLES:
        x = roles.get(role, ONES * {"model": 4, "tuned": 3, "base": 1, "forget": 2, "retain": 2}[role])
        metadata = {"perta.stat": "mean"} if role in ("forget", "retain") else None
        write_folder(folder / role, x if isinstance(x, dict) else {"t": x}, metadata=metadata)


def unlearn(perta, *more, check=0):
    return perta("unlearn", *(f"--{role}={role}" for role in ROLES), "--patch", "p", "--out", "m", *more, check=check)


def tensor(folder, name="t"):
    return next(t for t in json.loads((folder / "p/manifest.json").read_text())["tensors"] if t["name"] == name)


def test_all_zero_importance_is_counted_and_said(perta, tmp_path):
    pair = lambda a, b: {"a": np.asarray(a, "f4"), "b": np.asarray(b, "f4")}
    sides = {role: pair(ONES * k, ONES * k) for role, k in (("model", 4), ("tuned", 3), ("base", 1))}
    write(tmp_path, **sides, forget=pair(ONES * 0, ONES), retain=pair(ONES, ONES * -0.0))
    said = unlearn(perta).stdout
    assert "note: --forget: 1 tensors hold only zeros, the first of them a: they stay unchanged (w = 0)" in said
    assert "note: --retain: 1 tensors hold only zeros, the first of them b: they are edited in full" in said
    assert tensor(tmp_path, "a")["zero_forget"] == 8 and tensor(tmp_path, "a")["changed"] == 0
    assert tensor(tmp_path, "b")["zero_retain"] == 8 and tensor(tmp_path, "b")["mean_weight"] == 1
    out = read_folder(tmp_path / "m")
    assert (out["a"] == 4).all() and (out["b"] == 2).all()


def test_importance_that_underflowed_in_f16_is_counted_and_said(perta, tmp_path):
    gradients = np.array([1e-3, 1e-9, -2e-8, 1e-7, 0, 1e-12, 3e-5, 1], "f4")
    write(tmp_path, forget=gradients.astype("f2"))
    said = unlearn(perta).stdout
    assert "note: --forget: 4 of 8 values in F16 are 0; F16 holds nothing below 3e-8" in said
    assert tensor(tmp_path)["zero_forget"] == 4
    for dtype in (np.dtype("f4"), BF16):
        write_folder(tmp_path / f"forget-{dtype}", {"t": narrow(gradients, dtype)}, metadata={"perta.stat": "mean"})
        said = perta(*"unlearn --model model --tuned tuned --base base --retain retain --force".split(),
                     "--forget", f"forget-{dtype}", "--patch", "p").stdout  # fmt: skip
        assert "note" not in said and tensor(tmp_path)["zero_forget"] == 1


@pytest.mark.parametrize("alpha, note", [("0", "alpha 0: nothing changes"), ("-1", "alpha -1 is negative: the task vector is added")])
def test_alphas_of_zero_and_below(perta, tmp_path, alpha, note):
    write(tmp_path)
    assert f"note: {note}" in unlearn(perta, f"--alpha={alpha}").stdout
    assert (read_folder(tmp_path / "m")["t"] == 4 - float(alpha) * 0.5 * 2).all()
    assert tensor(tmp_path)["changed"] == (0 if alpha == "0" else 8)


@pytest.mark.parametrize("alpha", ["nan", "inf", "-inf", "1e39", "", "1,,2", "one"])
def test_alphas_that_are_no_number(perta, tmp_path, alpha):
    write(tmp_path)
    assert "--alpha" in unlearn(perta, f"--alpha={alpha}", check=2).stderr
    assert not (tmp_path / "p").exists()


def test_subnormal_numbers_are_numbers(perta, tmp_path):
    tiny = np.float32(1e-45)  # the smallest positive number
    write(tmp_path, model=ONES * 0, tuned=tiny * 3 * ONES, base=tiny * ONES, forget=tiny * 3 * ONES, retain=tiny * ONES)
    unlearn(perta)
    # w = 1 / (1 + 1/3) = 0.75; the step is 0.75 * 2 units, rounded to even
    assert (read_folder(tmp_path / "m")["t"] == -2 * tiny).all()
    assert tensor(tmp_path)["zero_forget"] == 0 and tensor(tmp_path)["changed"] == 8


def test_weights_at_their_limits(perta, tmp_path):
    """r^p overflows and underflows float32."""
    write(tmp_path, forget=np.array([1e-30, 1e30, 1e-38, 1e38] * 2, "f4"), retain=np.array([1e30, 1e-30, 1e38, 1e-38] * 2, "f4"))
    for method in (["fisher"], ["power", "--power", "8"], ["grad"]):
        unlearn(perta, "--force", "--method", *method)
        assert read_folder(tmp_path / "m")["t"].tolist() == [4, 2, 4, 2] * 2
        assert tensor(tmp_path)["mean_weight"] == 0.5


def test_a_result_too_large_for_f16_is_an_error_or_kept_and_counted(perta, tmp_path):
    model = np.array([65504, 60000, 1, 2, 3, 4, 5, 6], "f2")
    write(tmp_path, model=model, tuned=ONES * 0, base=ONES * 1000, forget=ONES, retain=ONES)
    said = unlearn(perta, check=3).stderr
    assert "tensor t, element 0 (byte " in said and "the edited value is not finite" in said
    assert not (tmp_path / "p").exists()
    said = unlearn(perta, "--nonfinite", "keep").stdout
    assert "1 parameters with NaN or Inf stay unchanged" in said
    assert tensor(tmp_path)["nonfinite"] == 1
    out = read_folder(tmp_path / "m")["t"]
    assert out[0] == 65504 and out[1] == np.float16(60500) and out[2] == 501
