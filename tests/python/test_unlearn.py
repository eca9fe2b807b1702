"""`perta unlearn` gives the bits of the NumPy reference, whatever the machine does."""

import json
import math

import numpy as np
import pytest
from reference import (
    BF16,
    CHUNK,
    DTYPES,
    EDITABLE,
    Edited,
    Rule,
    bits,
    edit,
    folder_bytes,
    kept,
    narrow,
    read_folder,
    shard_bytes,
    unlearn,
    write_folder,
)

ROLES = ("model", "tuned", "base", "forget", "retain")
ALPHAS = ("0", "0.3", "1", "2", "-1")
SHAPES = {"scalar": (), "empty": (0, 5), "one": (1,), "seven": (7,), "matrix": (1000, 3)}
LARGE = {"large": (CHUNK + 17,)}
NEEDS_NO_IMPORTANCE = [Rule("tv"), Rule("constant", weight=0.3), Rule("random", seed=2**63 + 5)]
RULES = [
    Rule(method, stat, power)
    for stat in ("mean", "meansq")
    for method, power in [
        ("grad", 1),
        ("fisher", 1),
        ("power", 0.5),
        ("power", 1),
        ("power", 1.7),
        ("power", 3),
    ]
] + NEEDS_NO_IMPORTANCE


def rule_id(rule):
    return f"{rule.method}{rule.power}-{rule.stat}"


# --- inputs


def cast(x, dtype):
    with np.errstate(over="ignore"):
        return narrow(x.astype(np.float32 if dtype == "BF16" else x.dtype), DTYPES[dtype])


def limits(dtype):
    """Largest and smallest numbers."""
    if dtype == "BF16":
        return float.fromhex("0x1.fep127"), 2.0**-133
    info = np.finfo(DTYPES[dtype])
    return float(info.max), float(info.smallest_subnormal)


def with_specials(rng, x, dtype, ceiling):
    """One value in four becomes a zero, a subnormal, or as large as it may be."""
    huge, tiny = limits(dtype)
    huge = min(huge, ceiling) / 8
    specials = cast(np.array([0, -0.0, tiny, -3 * tiny, huge, -huge]), dtype)
    chosen = rng.choice(specials, x.shape)
    return np.where(rng.random(x.shape) < 0.25, bits(chosen), bits(x)).view(x.dtype)


def make(rng, rule, model_dtype, shape, mixed):
    """One tensor of each role; mixed: each of another dtype than the model's."""
    theta = rng.standard_normal(shape)
    theta_b = theta + 0.1 * rng.standard_normal(shape)
    theta_t = theta_b + 0.05 * rng.standard_normal(shape)
    g_f, g_r = np.exp(rng.normal(-8, 4, (2, *shape))) * rng.choice([-1, 1], (2, *shape))
    dtypes = [model_dtype, model_dtype, model_dtype, "F32", "F32"]
    if mixed:
        dtypes[1:] = rng.choice(EDITABLE, 4)
    ceiling = min(limits(model_dtype)[0], limits("F16" if mixed else "F64")[0])
    out = []
    for role, values, dtype in zip(ROLES, (theta, theta_t, theta_b, g_f, g_r), dtypes):
        real_max = limits(model_dtype if model_dtype == "F64" else "F32")[0]
        top = real_max if role in ("forget", "retain") else ceiling
        x = with_specials(rng, cast(np.asarray(values), dtype), dtype, top)
        if role in ("forget", "retain") and rule.stat == "meansq":
            x = np.where(bits(x) << 1 == 0, bits(x), bits(np.abs(x))).view(x.dtype)
        out.append(x)
    return out


def make_inputs(rng, rule, model_dtype, shapes=SHAPES):
    """Tensors of each role: same dtypes, mixed dtypes, and integers."""
    roles = {role: {} for role in ROLES}
    for mixed in (False, True):
        for name, shape in shapes.items():
            parts = make(rng, rule, model_dtype, shape, mixed)
            for role, x in zip(ROLES, parts):
                roles[role][f"{'mixed' if mixed else 'same'}.{name}"] = x
    for role in ROLES[:3]:
        roles[role]["ids"] = rng.integers(-(2**60), 2**60, (3, 5))
        roles[role]["mask"] = rng.random(9) < 0.5
    return roles


def write_inputs(folder, rule, roles, shards=1):
    """The importances are sharded otherwise than the model."""
    for role, tensors in roles.items():
        importance = role in ("forget", "retain")
        metadata = {"perta.stat": rule.stat} if importance else {"format": "pt"}
        write_folder(folder / role, tensors, 2 if importance else shards, metadata)


def flags(rule, alphas=ALPHAS):
    words = ["unlearn", "--patch", "p", "--out", "m", f"--alpha={','.join(alphas)}"]
    words += ["--method", rule.method]
    words += {
        "power": ["--power", rule.power],
        "constant": ["--weight", rule.weight],
        "random": ["--seed", rule.seed],
    }.get(rule.method, [])
    for role in ROLES[: 5 if rule.needs_importance else 3]:
        words += [f"--{role}", role]
    return words


# --- outputs


def check_folder(folder, alpha, want: dict[str, Edited]):
    """Every tensor's bits, and every count of the record."""
    sub = f"alpha-{alpha}" if alpha is not None else ""
    have = read_folder(folder / "m" / sub)
    record = json.loads((folder / "p" / sub / "manifest.json").read_text())
    counts = {tensor["name"]: tensor for tensor in record["tensors"]}
    assert have.keys() == counts.keys() == want.keys()
    for name, edited in want.items():
        assert have[name].dtype == edited.out.dtype and have[name].shape == edited.out.shape
        differ = np.flatnonzero(bits(have[name]) != bits(edited.out))
        assert differ.size == 0, f"alpha {alpha}, {name}, elements {differ[:5]}"
        action = counts[name].pop("action")
        assert action == "edited" or "mean_weight" not in edited.counts
        assert counts[name] == {"name": name} | edited.counts
    for key in ("parameters", "changed", "rounded_away", "nonfinite"):
        assert record["counts"][key] == sum(edited.counts[key] for edited in want.values())
    weighed = [e.counts for e in want.values() if "mean_weight" in e.counts]
    n = [c["parameters"] - c["nonfinite"] for c in weighed]
    mean = math.fsum(c["mean_weight"] * k for c, k in zip(weighed, n)) / max(1, sum(n))
    assert math.isclose(record["counts"]["mean_weight"], mean, rel_tol=1e-12)


@pytest.mark.parametrize("dtype", EDITABLE)
@pytest.mark.parametrize("rule", RULES, ids=rule_id)
def test_every_method_gives_the_bits_of_numpy(perta, tmp_path, rule, dtype):
    case = RULES.index(rule) * len(EDITABLE) + EDITABLE.index(dtype)
    roles = make_inputs(np.random.default_rng(case), rule, dtype)
    write_inputs(tmp_path, rule, roles, shards=(1, 3)[RULES.index(rule) % 2])
    perta(*flags(rule))
    for alpha in ALPHAS:
        check_folder(tmp_path, alpha, unlearn(rule, float(alpha), **roles))


@pytest.mark.parametrize("dtype", EDITABLE)
@pytest.mark.parametrize("rule", [Rule("grad"), Rule("random", seed=7)], ids=rule_id)
def test_tensors_of_several_chunks_give_the_bits_of_numpy(perta, tmp_path, rule, dtype):
    roles = make_inputs(np.random.default_rng(1), rule, dtype, LARGE)
    write_inputs(tmp_path, rule, roles)
    perta(*flags(rule, ["2"]))
    check_folder(tmp_path, None, unlearn(rule, 2, **roles))
