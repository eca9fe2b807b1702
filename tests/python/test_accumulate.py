"""`perta accumulate` gives the bits of the NumPy reference."""

import numpy as np
import pytest
import safetensors.numpy
from reference import CHUNK, bits, folder_bytes, read_folder, running_mean, write_folder
from test_unlearn import cast, machines, run_on

SHAPES = {"scalar": (), "empty": (0, 4), "one": (1,), "seven": (7,), "matrix": (100, 31)}


def gradient(rng, dtype, shapes=SHAPES):
    """The gradient of a sample: magnitudes over many powers of two, so that sums are rounded."""
    return {
        name: cast(rng.standard_normal(shape) * np.exp2(rng.integers(-12, 5, shape)), dtype)
        for name, shape in shapes.items()
    }


def write_file(path, tensors):
    safetensors.numpy.save_file(tensors, path)
    return path.name


def check_folder(folder, samples):
    """Compare both statistics, bit for bit."""
    for stat in ("mean", "meansq"):
        have = read_folder(folder / stat)
        assert have.keys() == samples[0].keys()
        for name, array in have.items():
            want = running_mean([sample[name] for sample in samples], stat == "meansq")
            assert array.shape == want.shape and np.array_equal(bits(array), bits(want)), name


def accumulate(perta, *paths, **kw):
    return perta("accumulate", "--out", "imp", "--stat", "mean,meansq", *paths, **kw)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_means_have_the_bits_of_numpy(perta, tmp_path, n, dtype):
    rng = np.random.default_rng(n)
    samples = [gradient(rng, dtype) for _ in range(n)]
    paths = [write_file(tmp_path / f"{i}.safetensors", s) for i, s in enumerate(samples)]
    accumulate(perta, *paths)
    check_folder(tmp_path / "imp", samples)


def test_the_carry_keeps_what_a_plain_sum_loses(perta, tmp_path):
    """2^24 + 1 is not a float32: a plain sum would stay at 2^24."""
    samples = [{"w": np.full(5, x, "f4")} for x in (2.0**24, *[1.0] * 15)]
    paths = [write_file(tmp_path / f"{i}.safetensors", s) for i, s in enumerate(samples)]
    accumulate(perta, *paths)
    assert (read_folder(tmp_path / "imp/mean")["w"] == np.float32((2**24 + 15) / 16)).all()


def test_samples_may_differ_in_dtype_and_sharding(perta, tmp_path):
    rng = np.random.default_rng(0)
    samples = [gradient(rng, dtype) for dtype in ("BF16", "F32", "F16")]
    for i, sample in enumerate(samples):
        write_folder(tmp_path / f"sample{i}", sample, shards=3 - i)
    accumulate(perta, "sample0", "sample1", "sample2")
    check_folder(tmp_path / "imp", samples)
    assert len(list((tmp_path / "imp/mean").glob("*.safetensors"))) == 3


def test_the_bytes_are_the_same_whatever_runs(perta, tmp_path):
    rng = np.random.default_rng(1)
    samples = [gradient(rng, "BF16", SHAPES | {"large": (CHUNK + 17,)}) for _ in range(7)]
    paths = [write_file(tmp_path / f"{i}.safetensors", s) for i, s in enumerate(samples)]
    accumulate(perta, *paths)
    check_folder(tmp_path / "imp", samples)
    want = folder_bytes(tmp_path / "imp")
    command = "accumulate --out imp --stat mean,meansq --force".split()
    for machine in machines(12):
        run_on(perta, machine, *command, *paths)
        assert folder_bytes(tmp_path / "imp") == want, machine


# --- what is refused


def refusal(perta, folder, *samples):
    paths = [write_file(folder / f"{i}.safetensors", s) for i, s in enumerate(samples)]
    message = accumulate(perta, *paths, check=3).stderr
    assert not list(folder.glob("imp/*"))
    return message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_an_error_with_a_place(perta, tmp_path, value):
    good, bad = ({"w": np.ones(3000, "f4")} for _ in range(2))
    bad["w"][2001:] = value
    message = refusal(perta, tmp_path, good, bad)
    assert "1.safetensors: tensor w, element 2001 " in message


def test_a_square_that_overflows_is_an_error(perta, tmp_path):
    sample = {"w": np.array([0, 0, 1, 2e19], "f4")}
    assert "tensor w, element 3:" in refusal(perta, tmp_path, sample)


@pytest.mark.parametrize(
    "other",
    [
        {"v": np.ones(6, "f4")},
        {"w": np.ones(5, "f4")},
        {"w": np.ones((2, 3), "f4")},
        {"w": np.ones(6, np.int32)},
        {"w": np.ones(6, "f4"), "v": np.ones(6, "f4")},
    ],
    ids=["name", "size", "shape", "dtype", "number"],
)
def test_samples_with_other_tensors_are_an_error(perta, tmp_path, other):
    assert "1.safetensors" in refusal(perta, tmp_path, {"w": np.ones(6, "f4")}, other)
