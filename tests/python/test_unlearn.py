"""`perta unlearn` gives the bits of the NumPy reference, on any machine."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import LONG, SANITIZED, needed, part
from reference import (
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
    power,
    read_folder,
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
    """Convert to this dtype; to BF16 through float32."""
    with np.errstate(over="ignore"):
        return narrow(np.asarray(x, np.float32 if dtype == "BF16" else None), DTYPES[dtype])


def limits(dtype):
    """The largest and smallest numbers."""
    if dtype == "BF16":
        return float.fromhex("0x1.fep127"), 2.0**-133
    info = np.finfo(DTYPES[dtype])
    return float(info.max), float(info.smallest_subnormal)


def with_specials(rng, x, dtype, ceiling):
    """One value in four becomes a zero, a subnormal, or as large as possible."""
    huge, tiny = limits(dtype)
    huge = min(huge, ceiling) / 8
    specials = cast(np.array([0, -0.0, tiny, -3 * tiny, huge, -huge]), dtype)
    chosen = rng.choice(specials, x.shape)
    return np.where(rng.random(x.shape) < 0.25, bits(chosen), bits(x)).view(x.dtype)


def make(rng, rule, model_dtype, shape, mixed):
    """One tensor of each role; mixed: each in another dtype than the model's."""
    theta = rng.standard_normal(shape)
    theta_b = theta + 0.1 * rng.standard_normal(shape)
    theta_t = theta_b + 0.05 * rng.standard_normal(shape)
    g_f, g_r = np.exp(rng.normal(-8, 4, (2, *shape))) * rng.choice([-1, 1], (2, *shape))
    dtypes = [model_dtype, model_dtype, model_dtype, "F32", "F32"]
    if mixed:
        dtypes[1:] = rng.choice(EDITABLE, 4)
    ceiling = min(limits(model_dtype)[0], limits("F16" if mixed else "F64")[0])
    out = []
    for role, values, dtype in zip(ROLES, (theta, theta_t, theta_b, g_f, g_r), dtypes, strict=True):
        real_max = limits(model_dtype if model_dtype == "F64" else "F32")[0]
        top = real_max if role in ("forget", "retain") else ceiling
        x = with_specials(rng, cast(values, dtype), dtype, top)
        if role in ("forget", "retain") and rule.stat == "meansq":
            x = np.where(bits(x) << 1 == 0, bits(x), bits(np.abs(x))).view(x.dtype)
        out.append(x)
    return out


def make_inputs(rng, rule, model_dtype, shapes=SHAPES):
    """Tensors of each role: of one dtype, of mixed dtypes, and integers."""
    roles = {role: {} for role in ROLES}
    for mixed in (False, True):
        for name, shape in shapes.items():
            parts = make(rng, rule, model_dtype, shape, mixed)
            for role, x in zip(ROLES, parts, strict=True):
                roles[role][f"{'mixed' if mixed else 'same'}.{name}"] = x
    for role in ROLES[:3]:
        roles[role]["ids"] = rng.integers(-(2**60), 2**60, (3, 5))
        roles[role]["mask"] = rng.random(9) < 0.5
    return roles


def write_inputs(folder, rule, roles, shards=1):
    """The importances are sharded differently from the model."""
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
    """Compare every tensor's bits, and every count in the record."""
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
    mean = math.fsum(c["mean_weight"] * k for c, k in zip(weighed, n, strict=True)) / max(1, sum(n))
    assert math.isclose(record["counts"]["mean_weight"], mean, rel_tol=1e-12)
    bins = sum(edited.weights for edited in want.values())
    assert record["counts"].get("weights", [0] * 10) == np.broadcast_to(bins, 10).tolist()


RULES_IN = [(rule, dtype) for rule in RULES for dtype in EDITABLE]


@pytest.mark.parametrize("rule, dtype", part(RULES_IN, sanitized=20), ids=lambda x: x if isinstance(x, str) else rule_id(x))
def test_every_method_gives_the_bits_of_numpy(perta, tmp_path, rule, dtype):
    case = RULES.index(rule) * len(EDITABLE) + EDITABLE.index(dtype)
    roles = make_inputs(np.random.default_rng(case), rule, dtype)
    write_inputs(tmp_path, rule, roles, shards=(1, 3)[RULES.index(rule) % 2])
    perta(*flags(rule))
    for alpha in ALPHAS:
        check_folder(tmp_path, alpha, unlearn(rule, float(alpha), **roles))


@pytest.mark.parametrize("dtype", EDITABLE)
@pytest.mark.parametrize("rule", part([Rule("grad"), Rule("random", seed=7)], sanitized=1), ids=rule_id)
def test_tensors_of_several_chunks_give_the_bits_of_numpy(perta, tmp_path, rule, dtype):
    roles = make_inputs(np.random.default_rng(1), rule, dtype, LARGE)
    write_inputs(tmp_path, rule, roles)
    perta(*flags(rule, ["2"]))
    check_folder(tmp_path, None, unlearn(rule, 2, **roles))


def test_the_power_of_the_reference_is_a_power():
    x = np.array([0, 2.0**-1000, 0.25, 1, 2, 9, 1e90, np.inf])
    with np.errstate(all="ignore"):
        for p in (0.5, 1, 1.7, 3):
            assert np.allclose(power(x, p, np.float64), x**p, rtol=1e-12, atol=5e-324)


# --- the same bytes, whatever runs


def instruction_sets():
    have = set(Path("/proc/cpuinfo").read_text().split())
    v4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    v3 = {"avx2", "bmi1", "bmi2", "f16c", "fma"}
    return ["v2"] + ["v3"] * (v3 <= have) + ["v4"] * (v4 <= have)


def machines(n_wanted):
    """About that many of all combinations, so that each value of each setting is in several."""
    settings = {
        "isa": instruction_sets(),
        "depth": [1, 2, 8],
        "threads": [1, 2, 4],
        "memory": ["least", "200M", "1G"],
        "io": ["direct", "mmap", "pread"],
    }
    if not LONG:
        n_wanted //= 4 if SANITIZED else 2
    every = list(itertools.product(*settings.values()))
    stride = len(every) // n_wanted
    while math.gcd(stride, 6) > 1:
        stride += 1
    return [dict(zip(settings, values, strict=True)) for values in every[::stride]]


def run_on(perta, machine, *command):
    """Run with these settings. The least memory is what the refusal of a too small budget asks
    for."""
    words = [*command, "--io", machine["io"], "--threads", machine["threads"], "--memory"]
    env = {"PERTA_ISA": machine["isa"], "PERTA_QUEUE_DEPTH": str(machine["depth"])}
    if machine["memory"] != "least":
        return perta(*words, machine["memory"], env=env)
    return perta(*words, needed(perta, words[:-1], env=env), env=env)


def test_the_bytes_are_the_same_whatever_runs(perta, tmp_path):
    rule = Rule("power", power=1.7)
    roles = make_inputs(np.random.default_rng(2), rule, "BF16", SHAPES | LARGE)
    write_inputs(tmp_path, rule, roles, shards=3)
    perta(*flags(rule, ["0.7"]))
    want = folder_bytes(tmp_path / "p"), folder_bytes(tmp_path / "m")
    assert {"manifest.json", "model-00003-of-00003.safetensors.perta"} <= want[0].keys()
    for machine in machines(24):
        run_on(perta, machine, *flags(rule, ["0.7"]), "--force")
        have = folder_bytes(tmp_path / "p"), folder_bytes(tmp_path / "m")
        assert have == want, machine


def test_several_alphas_in_one_run_give_what_single_runs_give(perta, tmp_path):
    rule = Rule("random", seed=3)
    write_inputs(tmp_path, rule, make_inputs(np.random.default_rng(3), rule, "F16"), shards=3)
    perta(*flags(rule))
    for folder in ("p", "m"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-all")
    for alpha in ALPHAS:
        perta(*flags(rule, [alpha]), "--force")
        for folder in ("p", "m"):
            together = folder_bytes(tmp_path / f"{folder}-all/alpha-{alpha}")
            assert folder_bytes(tmp_path / folder) == together


# --- which tensors


@pytest.mark.parametrize(
    "globs, is_edited",
    [
        ("--include same.*", lambda name: name.startswith("same.")),
        ("--exclude *.matrix", lambda name: not name.endswith(".matrix")),
        ("--include *.seven --include *.one", lambda name: name.endswith((".seven", ".one"))),
        ("--include same.* --exclude *.[ms]*", lambda name: name in ("same.empty", "same.one")),
    ],
)
def test_globs_choose_the_tensors(perta, tmp_path, globs, is_edited):
    rule = Rule("grad")
    roles = make_inputs(np.random.default_rng(4), rule, "BF16")
    write_inputs(tmp_path, rule, roles)
    perta(*flags(rule, ["1"]), *globs.split())
    want = unlearn(rule, 1, **roles)
    for name, theta in roles["model"].items():
        if not is_edited(name):
            want[name] = kept(theta)
    check_folder(tmp_path, None, want)


def one_layer(dtype, name="layer", n=1000):
    """Inputs of one tensor, all finite and of moderate size."""
    rng = np.random.default_rng(5)
    return {role: {name: cast(rng.standard_normal(n), dtype)} for role in ROLES}


@pytest.mark.parametrize("missing", ["error", "tv", "keep"])
@pytest.mark.parametrize("lacking", [["forget"], ["retain"], ["forget", "retain"]])
def test_a_tensor_without_importance(perta, tmp_path, missing, lacking):
    rule = Rule("fisher")
    roles = make_inputs(np.random.default_rng(6), rule, "F32")
    want = unlearn(rule, 1, **roles)
    for role in lacking:
        del roles[role]["same.matrix"]
    operands = [roles[role]["same.matrix"] for role in ROLES[:3]]
    if missing == "tv":
        want["same.matrix"] = edit(Rule("tv"), 1, "same.matrix", *operands)
    else:
        want["same.matrix"] = kept(operands[0])
    write_inputs(tmp_path, rule, roles)
    command = [*flags(rule, ["1"]), "--missing", missing]
    if missing == "error":
        assert "same.matrix" in perta(*command, check=3).stderr
        assert not (tmp_path / "p").exists() and not (tmp_path / "m").exists()
    else:
        perta(*command)
        check_folder(tmp_path, None, want)


TIED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("stored", TIED)
def test_tied_embeddings_stand_for_one_another(perta, tmp_path, stored):
    rule = Rule("grad")
    other = next(name for name in TIED if name != stored)
    roles = one_layer("BF16", stored)
    want = unlearn(rule, 1, **roles)
    for role in ("tuned", "forget"):
        roles[role] = {other: roles[role][stored]}
    write_inputs(tmp_path, rule, roles)
    assert other in perta(*flags(rule, ["1"]), check=3).stderr
    config = json.dumps({"tie_word_embeddings": True})
    (tmp_path / "model/config.json").write_text(config)
    perta(*flags(rule, ["1"]))
    check_folder(tmp_path, None, want)
    assert (tmp_path / "m/config.json").read_text() == config


def test_ten_thousand_tiny_tensors(perta, tmp_path):
    rule = Rule("grad")
    rng = np.random.default_rng(8)
    names = [f"layer.{i}" for i in range(10_000)]
    table = {role: rng.standard_normal((10_000, 3)).astype(np.float32) for role in ROLES}
    roles = {role: dict(zip(names, rows, strict=True)) for role, rows in table.items()}
    write_inputs(tmp_path, rule, roles, shards=3)
    perta(*flags(rule, ["1"]))
    whole = edit(rule, 1, "", *table.values()).out
    have = read_folder(tmp_path / "m")
    assert np.array_equal(np.stack([have[name] for name in names]), whole)


# --- numbers that are not finite


def spoil(roles, role, at, value):
    tensor = roles[role]["layer"].copy()
    tensor[at] = value
    roles[role]["layer"] = tensor


@pytest.mark.parametrize("dtype", EDITABLE)
@pytest.mark.parametrize("role", ROLES)
def test_a_number_that_is_not_finite_is_an_error_with_a_place(perta, tmp_path, role, dtype):
    roles = one_layer(dtype)
    spoil(roles, role, 700, np.nan)
    spoil(roles, role, 801, np.inf)
    write_inputs(tmp_path, Rule("grad"), roles)
    message = perta(*flags(Rule("grad"), ["1"]), check=3).stderr
    assert f"{role}/model" in message and "tensor layer, element 700 " in message
    assert not (tmp_path / "p").exists() and not (tmp_path / "m").exists()


def test_a_negative_mean_square_is_an_error(perta, tmp_path):
    rule = Rule("grad", "meansq")
    roles = one_layer("F32")
    for role in ("forget", "retain"):
        roles[role]["layer"] = np.abs(roles[role]["layer"])
    spoil(roles, "retain", 5, -1)
    write_inputs(tmp_path, rule, roles)
    assert "layer, element 5 " in perta(*flags(rule, ["1"]), check=3).stderr


def test_a_result_that_overflows_is_an_error(perta, tmp_path):
    roles = one_layer("F16")
    spoil(roles, "model", 3, 60000)
    spoil(roles, "tuned", 3, -60000)
    write_inputs(tmp_path, Rule("tv"), roles)
    assert "layer, element 3 " in perta(*flags(Rule("tv"), ["1"]), check=3).stderr


@pytest.mark.parametrize("stat", ["mean", "meansq"])
@pytest.mark.parametrize("dtype", EDITABLE)
def test_numbers_that_are_not_finite_are_kept_and_counted(perta, tmp_path, dtype, stat):
    rule = Rule("grad", stat)
    roles = one_layer(dtype)
    if stat == "meansq":
        for role in ("forget", "retain"):
            roles[role]["layer"] = np.abs(roles[role]["layer"])
        spoil(roles, "retain", 4, -1)
    for i, role in enumerate(ROLES):
        spoil(roles, role, [10 + i, 50], np.nan)
        spoil(roles, role, [20 + i, 51], -np.inf)
    largest = limits(dtype)[0]
    spoil(roles, "model", 3, largest)
    spoil(roles, "tuned", 3, -largest)
    spoil(roles, "retain", 3, 0)
    want = unlearn(rule, 1, **roles)
    assert want["layer"].counts["nonfinite"] == 13 + (stat == "meansq")
    write_inputs(tmp_path, rule, roles)
    perta(*flags(rule, ["1"]), "--nonfinite", "keep")
    check_folder(tmp_path, None, want)


# --- what the importances hold


def test_importances_that_hold_different_statistics_are_refused(perta, tmp_path):
    write_inputs(tmp_path, Rule("grad"), one_layer("F32"))
    write_folder(tmp_path / "squares", one_layer("F32")["retain"], 1, {"perta.stat": "meansq"})
    command = [word if word != "retain" else "squares" for word in flags(Rule("grad"), ["1"])]
    message = perta(*command, check=2).stderr
    assert "meansq" in message and not (tmp_path / "p").exists()


def test_importances_that_do_not_say_are_means_and_a_note_says_so(perta, tmp_path):
    roles = one_layer("F32")
    for role, tensors in roles.items():
        write_folder(tmp_path / role, tensors)
    result = perta(*flags(Rule("fisher"), ["1"]), "--json")
    assert "perta takes it as mean gradients" in " ".join(json.loads(result.stdout)["notes"])
    check_folder(tmp_path, None, unlearn(Rule("fisher"), 1, **roles))


def test_importances_that_the_method_does_not_take_are_noted(perta, tmp_path):
    roles = one_layer("F32")
    for role, tensors in roles.items():
        write_folder(tmp_path / role, tensors)
    command = "unlearn --model model --tuned tuned --base base --method tv --patch p --json".split()
    for given, named in (["forget", "retain"], "--forget and --retain are"), (["retain"], "--retain is"):
        words = [word for role in given for word in (f"--{role}", role)]
        notes = json.loads(perta(*command, *words, "--force").stdout)["notes"]
        assert notes == [f"--method tv uses no importance: {named} not read"]
    assert not json.loads(perta(*command, "--force").stdout)["notes"]


def test_a_vocabulary_that_differs_is_named(perta, tmp_path):
    roles = one_layer("F32", "lm_head.weight")
    for role in ROLES:
        rows = 99 if role == "tuned" else 100
        roles[role] = {"lm_head.weight": roles[role]["lm_head.weight"].reshape(100, 10)[:rows]}
    write_inputs(tmp_path, Rule("tv"), roles)
    message = perta(*flags(Rule("tv"), ["1"]), check=3).stderr
    assert "vocabulary" in message and "100" in message and "99" in message
