"""Routers of mixtures of experts: choice, weights and gradients are those of transformers' own
routers, and ties are broken as PyTorch breaks them. tests/route_of.c runs the library's code."""

import importlib
import struct
import subprocess

import numpy as np
import pytest
from conftest import PERTA

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROUTE_OF = PERTA.parent / "tests/route_of"
JOB = struct.Struct("12I4d")
SOFTMAX, SIGMOID, SQRT_SOFTPLUS, CHOSEN_SOFTMAX, CHOSEN_SIGMOID, SPARSEMIXER = range(6)
NO_GROUPS, GROUP_MAX, GROUP_TOP2 = range(3)
MASKED_OUT, MASKED_ZERO, MASKED_SCORE = range(3)


def run(job):
    if not ROUTE_OF.exists():
        pytest.skip("needs the build folder's tests/route_of")
    return subprocess.run([ROUTE_OF], input=job, stdout=subprocess.PIPE, check=True).stdout


# ---- ties ----


def topk(x, k):
    rows, n = x.shape
    got = run(JOB.pack(0, rows, n, k, *[0] * 12) + x.tobytes())
    return np.frombuffer(got, np.uint32).reshape(rows, k)


def with_ties(rng, rows, n):
    """Rows of few values: in any order, sorted up and down, rising and falling, with NaN."""
    x = rng.integers(0, rng.integers(1, 9), (rows, n)).astype(np.float32)
    up = np.sort(x, -1)
    yield x
    yield up
    yield up[:, ::-1]
    yield np.concatenate([up[:, ::2], up[:, 1::2][:, ::-1]], -1)
    yield np.where(rng.random(x.shape) < 0.1, np.float32("nan"), x)


@pytest.mark.parametrize("seed", range(5))
def test_ties_are_broken_as_pytorch_breaks_them(seed):
    rng = np.random.default_rng(seed)
    for n in {*range(1 + seed, 301, 23), 8, 64, 128, 256, 1024}:
        for k in {1, n, *rng.integers(1, n + 1, 3), min(n, 8), max(1, n // 64)}:
            for x in with_ties(rng, 8, n):
                x = x.copy()
                which = topk(x, k)
                for dtype in (torch.float32, torch.bfloat16):
                    here = torch.from_numpy(x).to(dtype)
                    np.testing.assert_array_equal(which, torch.topk(here, k, -1)[1])
                    chosen = torch.topk(here, k, -1, sorted=False)[1]
                    np.testing.assert_array_equal(np.sort(which), np.sort(chosen))


def killer(n):
    """Its partitions are as uneven as they can be, so that the search for a nth element gives up and
    takes a heap (Musser 1997)."""
    half = n // 2
    up = np.arange(1, half + 1)
    odd = np.where(up % 2, up, half + up - 1)
    return -np.concatenate([odd, 2 * up, np.arange(2 * half + 1, n + 1)]).astype(np.float32)[None]


@pytest.mark.parametrize("n", [40, 128, 256, 300, 1024])
def test_ties_where_partitions_are_uneven(n):
    for by in (1, 2, 3, 7):
        x = np.ceil(killer(n) / np.float32(by))
        for k in {n // 64 + 1, n // 3, n // 2, n - 1, n}:
            np.testing.assert_array_equal(topk(x, k), torch.topk(torch.from_numpy(x), k, -1)[1])


# ---- routers ----


def route(logits, bias, gradients, k, scoring, grouping=0, masked=0, groups=(0, 0), norm=None, norm_min=0.0, scale=1.0, jitter=0.0):
    """Return value, which, weights and dlogits, of each row. gradients are those that the weight of
    each expert has if it is chosen; norm is the norm_eps, or None."""
    rows, n = logits.shape
    words = [1, rows, n, k, scoring, grouping, masked, *groups, norm is not None, bias is not None, 0]
    job = JOB.pack(*words, norm or 0.0, norm_min, scale, jitter)
    job += b"" if bias is None else bias.tobytes()
    job += np.concatenate([logits, gradients], -1).tobytes()
    row = [("rc", "i4"), ("which", "u4", k), ("weights", "f4", k), ("dlogits", "f4", n)]
    return np.frombuffer(run(job), row)


def softmax(k, **more):
    return {"k": k, "scoring": SOFTMAX, **more}


def v3(k=4, groups=(4, 2), **more):
    router = {"k": k, "scoring": SIGMOID, "grouping": GROUP_TOP2, "groups": groups, "norm": 1e-20, "scale": 2.5}
    return {**router, **more}


def deepseek(n=16, k=4, groups=(4, 2), **more):
    keys = {"n_routed_experts": n, "num_experts_per_tok": k, "n_group": groups[0], "topk_group": groups[1]}
    return {**keys, "norm_topk_prob": True, "routed_scaling_factor": 2.5, **more}


def local(n, k, **more):
    return {"num_local_experts": n, "num_experts_per_tok": k, **more}


def qwen(n, k, **more):
    return {"num_experts": n, "num_experts_per_tok": k, **more}


BIAS = "e_score_correction_bias"
LIMITED = {"topk_method": "group_limited_greedy"}
GROUP_LIMITED = {"grouping": GROUP_MAX, "masked": MASKED_SCORE, "scale": 2.5}
# Module, router's class, config, router, its bias: a path within it, or an argument of its forward
# pass. Several of them share code in transformers, but each has a file of its own, which may change.
ROUTERS = [
    ("qwen2_moe", "Qwen2MoeTopKRouter", qwen(60, 4, norm_topk_prob=False), softmax(4), None),
    ("qwen3_moe", "Qwen3MoeTopKRouter", qwen(128, 8, norm_topk_prob=True), softmax(8, norm=0), None),
    ("qwen3_moe", "Qwen3MoeTopKRouter", qwen(7, 7, norm_topk_prob=False), softmax(7), None),
    ("qwen3_next", "Qwen3NextTopKRouter", qwen(512, 10), softmax(10, norm=0), None),
    ("olmoe", "OlmoeTopKRouter", qwen(64, 8, norm_topk_prob=False), softmax(8), None),
    ("flex_olmo", "FlexOlmoTopKRouter", qwen(7, 5, norm_topk_prob=True), softmax(5, norm=0), None),
    ("mixtral", "MixtralTopKRouter", local(8, 2), softmax(2, norm=0), None),
    ("minimax", "MiniMaxTopKRouter", local(8, 2), softmax(2, norm=0), None),
    ("hunyuan_v1_moe", "HunYuanMoEV1Gate", {"num_experts": 16, "moe_topk": 3}, softmax(3, norm=0), None),
    ("jamba", "JambaTopKRouter", qwen(16, 2), softmax(2), None),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", {"moe_num_experts": 64, "moe_k": 6}, softmax(6, norm=0, norm_min=1e-12), f"moe_statics.{BIAS}"),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", {"moe_num_experts": 12, "moe_k": 3, "moe_norm_min": 0.6}, softmax(3, norm=0, norm_min=0.6), f"moe_statics.{BIAS}"),
    ("deepseek_v2", "DeepseekV2TopkRouter", deepseek(topk_method="greedy"), softmax(4, scale=2.5), None),
    ("deepseek_v2", "DeepseekV2TopkRouter", deepseek(**LIMITED), softmax(4, groups=(4, 2), **GROUP_LIMITED), None),
    ("deepseek_v2", "DeepseekV2TopkRouter", deepseek(160, 6, (8, 3), **LIMITED), softmax(6, groups=(8, 3), **GROUP_LIMITED), None),
    # more experts than the chosen groups have
    ("deepseek_v2", "DeepseekV2TopkRouter", deepseek(16, 6, (4, 1), **LIMITED), softmax(6, groups=(4, 1), **GROUP_LIMITED), None),
    ("deepseek_v3", "DeepseekV3TopkRouter", deepseek(16, 6, (4, 1)), v3(6, (4, 1)), BIAS),
    ("deepseek_v3", "DeepseekV3TopkRouter", deepseek(), v3(), BIAS),
    ("deepseek_v3", "DeepseekV3TopkRouter", deepseek(norm_topk_prob=False), v3(norm=None), BIAS),
    ("deepseek_v3", "DeepseekV3TopkRouter", deepseek(256, 8, (8, 4)), v3(8, (8, 4)), BIAS),
    ("deepseek_v3", "DeepseekV3TopkRouter", deepseek(384, 8, (1, 1)), v3(8, (1, 1)), BIAS),  # Kimi-K2
    ("glm4_moe", "Glm4MoeTopkRouter", deepseek(), v3(), BIAS),
    ("glm4_moe_lite", "Glm4MoeLiteTopkRouter", deepseek(), v3(), BIAS),
    ("dots1", "Dots1TopkRouter", deepseek(), v3(), BIAS),
    ("solar_open", "SolarOpenTopkRouter", deepseek(), v3(), BIAS),
    ("exaone_moe", "ExaoneMoeTopkRouter", deepseek(num_experts=16), v3(), BIAS),
    ("mistral4", "Mistral4TopkRouter", deepseek(), v3(scoring=SOFTMAX, masked=MASKED_ZERO), None),
    ("minimax_m2", "MiniMaxM2TopKRouter", local(256, 8), {"k": 8, "scoring": SIGMOID, "norm": 0}, "argument"),
    ("lfm2_moe", "Lfm2MoeTopKRouter", qwen(32, 4), {"k": 4, "scoring": SIGMOID, "norm": 1e-6}, "argument"),
    ("deepseek_v4", "DeepseekV4TopKRouter", local(8, 2, routed_scaling_factor=1.5), {"k": 2, "scoring": SQRT_SOFTPLUS, "norm": 1e-20, "scale": 1.5}, BIAS),
    ("gpt_oss", "GptOssTopKRouter", local(32, 4), {"k": 4, "scoring": CHOSEN_SOFTMAX}, None),
    ("granitemoe", "GraniteMoeTopKRouter", local(40, 8), {"k": 8, "scoring": CHOSEN_SOFTMAX}, None),
    ("granitemoeshared", "GraniteMoeSharedTopKRouter", local(8, 2), {"k": 2, "scoring": CHOSEN_SOFTMAX}, None),
    ("llama4", "Llama4Router", local(16, 1), {"k": 1, "scoring": CHOSEN_SIGMOID}, None),
    ("llama4", "Llama4Router", local(5, 3), {"k": 3, "scoring": CHOSEN_SIGMOID}, None),
    ("phimoe", "PhimoeTopKRouter", local(16, 2), {"k": 2, "scoring": SPARSEMIXER, "jitter": 0.01}, None),
    ("phimoe", "PhimoeTopKRouter", local(6, 2, router_jitter_noise=0.2), {"k": 2, "scoring": SPARSEMIXER, "jitter": 0.2}, None),
]


def config_of(module, keys):
    name = f"transformers.models.{module}.configuration_{module}"
    classes = vars(importlib.import_module(name)).values()
    kinds = [c for c in classes if isinstance(c, type) and c.__module__ == name and c.__name__.endswith("Config")]
    kind = next((c for c in kinds if c.__name__.endswith("TextConfig")), kinds[0])
    return kind(**keys)


def router_of(module, name, keys, n, path, bias):
    """Its weight is the identity, so that logits are what it is given."""
    kind = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    router = kind(config_of(module, {**keys, "hidden_size": n, "num_attention_heads": 1})).eval()
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.eye(n) if weight.shape == (n, n) else torch.zeros(weight.shape))
        if path not in (None, "argument"):
            owner, _, name = path.rpartition(".")
            getattr(router.get_submodule(owner), name).copy_(torch.from_numpy(bias))
    return router


def transformers_route(router, x, bias):
    """which and weights."""
    if type(router).__name__ == "Llama4Router":  # scores of all experts, 0 for those not chosen
        which = torch.topk(x, router.top_k, -1)[1]
        return which, router(x)[0].gather(-1, which)
    _, weights, which = router(x) if bias is None else router(x, torch.from_numpy(bias))
    return which, weights


KINDS = ["normal", "spread", "far", "few", "equal", "saturated", "saturating", "close"]


def logits_of(kind, rng, rows, n):
    normal = rng.standard_normal((rows, n))
    return {
        "normal": normal,
        "spread": normal * 6,
        "far": normal - 25,
        "few": rng.integers(-1, 2, (rows, n)),
        "equal": normal[:, :1].repeat(n, 1),
        "saturated": np.where(rng.random((rows, n)) < 0.5, 40 + normal, -30 - normal),
        "saturating": 16.9 + normal * 0.15,  # many a sigmoid is 1 in float32
        "close": normal * 3e-9,  # scores are equal in float32
    }[kind].astype(np.float32)


def bias_of(kind, rng, n):
    has_ties = kind in ("few", "equal", "saturating", "close")
    return (rng.integers(0, 2, n) / 8 if has_ties else rng.standard_normal(n) * 0.1).astype(np.float32)


def in_order_of_experts(which, values):
    order = np.argsort(which, -1)
    return np.take_along_axis(which, order, -1), np.take_along_axis(values, order, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(ROUTERS)), ids=[f"{r[0]}-{i}" for i, r in enumerate(ROUTERS)])
def test_routers_are_transformers(number, kind):
    module, name, keys, described, path = ROUTERS[number]
    rng = np.random.default_rng([number, KINDS.index(kind)])
    n = next(v for key, v in keys.items() if key.endswith("_experts"))
    logits, gradients = logits_of(kind, rng, 400, n), rng.standard_normal((400, n)).astype(np.float32)
    bias = bias_of(kind, rng, n) if path else None
    router = router_of(module, name, keys, n, path, bias)
    x = torch.from_numpy(logits).requires_grad_()
    which, weights = transformers_route(router, x, bias if path == "argument" else None)
    (weights * torch.from_numpy(gradients).gather(-1, which)).sum().backward()

    got = route(logits, bias, gradients, **described)
    assert not got["rc"].any()
    ours, our_weights = in_order_of_experts(got["which"], got["weights"])
    theirs, their_weights = in_order_of_experts(which.numpy(), weights.detach().numpy())
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(our_weights, their_weights, rtol=1e-6, atol=1e-37)
    errors = np.linalg.norm(got["dlogits"] - x.grad.numpy(), axis=-1)
    assert (errors < 1e-6 * np.linalg.norm(gradients, axis=-1)).all()
