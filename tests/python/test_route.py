"""Routers of mixtures of experts: choice, weights and gradients are those of transformers' own
routers, and ties are broken as PyTorch breaks them. tests/route_of.c runs the library's code."""

import importlib
import struct
import subprocess

import numpy as np
import pytest
import torch
from conftest import PERTA

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
    return np.frombuffer(run(JOB.pack(0, rows, n, k, *[0] * 12) + x.tobytes()), np.uint32).reshape(
        rows, k
    )


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


def route(
    logits,
    bias,
    dweights,
    *,
    k,
    scoring,
    grouping=0,
    masked=0,
    groups=(0, 0),
    norm=None,
    norm_min=0.0,
    scale=1.0,
    jitter=0.0,
):
    """Return value, which, weights and dlogits, of each row. norm: None, or the norm_eps."""
    rows, n = logits.shape
    job = JOB.pack(
        1,
        rows,
        n,
        k,
        scoring,
        grouping,
        masked,
        *groups,
        norm is not None,
        bias is not None,
        0,
        norm or 0.0,
        norm_min,
        scale,
        jitter,
    )
    if bias is not None:
        job += bias.tobytes()
    row = np.dtype(
        [
            ("rc", np.int32),
            ("which", np.uint32, k),
            ("weights", np.float32, k),
            ("dlogits", np.float32, n),
        ]
    )
    return np.frombuffer(run(job + np.concatenate([logits, dweights], -1).tobytes()), row)


DEEPSEEK = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
V3 = {
    "k": 4,
    "scoring": SIGMOID,
    "grouping": GROUP_TOP2,
    "groups": (4, 2),
    "norm": 1e-20,
    "scale": 2.5,
}
BIAS = "e_score_correction_bias"
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
# module, router's class, config, router, the name of its bias. Several of them share code in
# transformers; each is a file of its own there, and may change on its own.
ROUTERS = [
    (
        "qwen2_moe",
        "Qwen2MoeTopKRouter",
        {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False},
        {"k": 4, "scoring": SOFTMAX},
        None,
    ),
    (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
        {"k": 8, "scoring": SOFTMAX, "norm": 0},
        None,
    ),
    (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        {"num_experts": 7, "num_experts_per_tok": 7, "norm_topk_prob": False},
        {"k": 7, "scoring": SOFTMAX},
        None,
    ),
    (
        "qwen3_next",
        "Qwen3NextTopKRouter",
        {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True},
        {"k": 10, "scoring": SOFTMAX, "norm": 0},
        None,
    ),
    (
        "olmoe",
        "OlmoeTopKRouter",
        {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
        {"k": 8, "scoring": SOFTMAX},
        None,
    ),
    (
        "flex_olmo",
        "FlexOlmoTopKRouter",
        {"num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": True},
        {"k": 5, "scoring": SOFTMAX, "norm": 0},
        None,
    ),
    ("mixtral", "MixtralTopKRouter", LOCAL, {"k": 2, "scoring": SOFTMAX, "norm": 0}, None),
    ("minimax", "MiniMaxTopKRouter", LOCAL, {"k": 2, "scoring": SOFTMAX, "norm": 0}, None),
    (
        "hunyuan_v1_moe",
        "HunYuanMoEV1Gate",
        {"num_experts": 16, "moe_topk": 3},
        {"k": 3, "scoring": SOFTMAX, "norm": 0},
        None,
    ),
    (
        "jamba",
        "JambaTopKRouter",
        {"num_experts": 16, "num_experts_per_tok": 2},
        {"k": 2, "scoring": SOFTMAX},
        None,
    ),
    (
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        {"moe_num_experts": 64, "moe_k": 6, "moe_norm_min": 1e-12},
        {"k": 6, "scoring": SOFTMAX, "norm": 0, "norm_min": 1e-12},
        f"moe_statics.{BIAS}",
    ),
    (
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        {"moe_num_experts": 12, "moe_k": 3, "moe_norm_min": 0.6},
        {"k": 3, "scoring": SOFTMAX, "norm": 0, "norm_min": 0.6},
        f"moe_statics.{BIAS}",
    ),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {**DEEPSEEK, "topk_method": "greedy"},
        {"k": 4, "scoring": SOFTMAX, "scale": 2.5},
        None,
    ),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {**DEEPSEEK, "topk_method": "group_limited_greedy"},
        {
            "k": 4,
            "scoring": SOFTMAX,
            "scale": 2.5,
            "grouping": GROUP_MAX,
            "groups": (4, 2),
            "masked": MASKED_SCORE,
        },
        None,
    ),
    (
        "deepseek_v2",  # fewer experts in the chosen groups than are chosen
        "DeepseekV2TopkRouter",
        {
            **DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "topk_group": 1,
            "num_experts_per_tok": 6,
        },
        {
            "k": 6,
            "scoring": SOFTMAX,
            "scale": 2.5,
            "grouping": GROUP_MAX,
            "groups": (4, 1),
            "masked": MASKED_SCORE,
        },
        None,
    ),
    ("deepseek_v3", "DeepseekV3TopkRouter", DEEPSEEK, V3, BIAS),
    (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {**DEEPSEEK, "norm_topk_prob": False},
        {**V3, "norm": None},
        BIAS,
    ),
    (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {**DEEPSEEK, "topk_group": 1, "num_experts_per_tok": 6},
        {**V3, "k": 6, "groups": (4, 1)},
        BIAS,
    ),
    (
        "deepseek_v3",  # the real one
        "DeepseekV3TopkRouter",
        {
            **DEEPSEEK,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
        },
        {**V3, "k": 8, "groups": (8, 4)},
        BIAS,
    ),
    (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {
            **DEEPSEEK,
            "n_routed_experts": 384,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
        },
        {**V3, "k": 8, "groups": (1, 1)},
        BIAS,
    ),  # Kimi-K2
    ("glm4_moe", "Glm4MoeTopkRouter", DEEPSEEK, V3, BIAS),
    ("glm4_moe_lite", "Glm4MoeLiteTopkRouter", DEEPSEEK, V3, BIAS),
    ("dots1", "Dots1TopkRouter", DEEPSEEK, V3, BIAS),
    ("solar_open", "SolarOpenTopkRouter", DEEPSEEK, V3, BIAS),
    ("exaone_moe", "ExaoneMoeTopkRouter", {**DEEPSEEK, "num_experts": 16}, V3, BIAS),
    (
        "mistral4",
        "Mistral4TopkRouter",
        DEEPSEEK,
        {**V3, "scoring": SOFTMAX, "masked": MASKED_ZERO},
        None,
    ),
    (
        "minimax_m2",
        "MiniMaxM2TopKRouter",
        {"num_local_experts": 256, "num_experts_per_tok": 8},
        {"k": 8, "scoring": SIGMOID, "norm": 0},
        "argument",
    ),
    (
        "lfm2_moe",
        "Lfm2MoeTopKRouter",
        {
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "use_expert_bias": True,
        },
        {"k": 4, "scoring": SIGMOID, "norm": 1e-6},
        "argument",
    ),
    (
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {**LOCAL, "routed_scaling_factor": 1.5},
        {"k": 2, "scoring": SQRT_SOFTPLUS, "norm": 1e-20, "scale": 1.5},
        BIAS,
    ),
    (
        "gpt_oss",
        "GptOssTopKRouter",
        {"num_local_experts": 32, "num_experts_per_tok": 4},
        {"k": 4, "scoring": CHOSEN_SOFTMAX},
        None,
    ),
    (
        "granitemoe",
        "GraniteMoeTopKRouter",
        {"num_local_experts": 40, "num_experts_per_tok": 8},
        {"k": 8, "scoring": CHOSEN_SOFTMAX},
        None,
    ),
    (
        "granitemoeshared",
        "GraniteMoeSharedTopKRouter",
        LOCAL,
        {"k": 2, "scoring": CHOSEN_SOFTMAX},
        None,
    ),
    (
        "llama4",
        "Llama4Router",
        {"num_local_experts": 16, "num_experts_per_tok": 1},
        {"k": 1, "scoring": CHOSEN_SIGMOID},
        None,
    ),
    (
        "llama4",
        "Llama4Router",
        {"num_local_experts": 5, "num_experts_per_tok": 3},
        {"k": 3, "scoring": CHOSEN_SIGMOID},
        None,
    ),
    (
        "phimoe",
        "PhimoeTopKRouter",
        {"num_local_experts": 16, "router_jitter_noise": 0.01},
        {"k": 2, "scoring": SPARSEMIXER, "jitter": 0.01},
        None,
    ),
    (
        "phimoe",
        "PhimoeTopKRouter",
        {"num_local_experts": 6, "router_jitter_noise": 0.2},
        {"k": 2, "scoring": SPARSEMIXER, "jitter": 0.2},
        None,
    ),
]


def config_of(module, keys):
    name = f"transformers.models.{module}.configuration_{module}"
    classes = vars(importlib.import_module(name)).values()
    kinds = [
        c
        for c in classes
        if isinstance(c, type) and c.__module__ == name and c.__name__.endswith("Config")
    ]
    kind = next((c for c in kinds if c.__name__.endswith("TextConfig")), kinds[0])
    return kind(**keys)


def router_of(module, name, keys, n, bias):
    """The module, whose weight is the identity, so that logits are what it is given."""
    kind = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    router = kind(config_of(module, {**keys, "hidden_size": n, "num_attention_heads": 1})).eval()
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.eye(n)) if weight.dim() == 2 and len(weight) == n else weight.zero_()
        if bias is not None and bias[0] != "argument":
            owner, _, name = bias[0].rpartition(".")
            getattr(router.get_submodule(owner), name).copy_(torch.from_numpy(bias[1]))
    return router


def transformers_route(router, logits, bias):
    """which, weights, and the tensor whose gradient is dlogits."""
    x = torch.from_numpy(logits).requires_grad_()
    if bias is not None and bias[0] == "argument":
        _, weights, which = router(x, torch.from_numpy(bias[1]))
    elif type(router).__name__ == "Llama4Router":
        scores, _ = router(x)
        which = torch.topk(x, router.top_k, -1)[1]
        weights = scores.gather(-1, which)
    else:
        _, weights, which = router(x)
    return which, weights, x


KINDS = ["normal", "spread", "far", "few", "equal", "saturated"]


def logits_of(kind, rng, rows, n):
    normal = rng.standard_normal((rows, n))
    return {
        "normal": normal,
        "spread": normal * 6,
        "far": normal - 25,
        "few": rng.integers(-1, 2, (rows, n)),
        "equal": normal[:, :1].repeat(n, 1),
        "saturated": np.where(rng.random((rows, n)) < 0.5, 40 + normal, -30 - normal),
    }[kind].astype(np.float32)


def in_order_of_experts(which, values):
    order = np.argsort(which, -1)
    return np.take_along_axis(which, order, -1), np.take_along_axis(values, order, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "number", range(len(ROUTERS)), ids=[f"{r[0]}-{i}" for i, r in enumerate(ROUTERS)]
)
def test_routers_are_transformers(number, kind):
    module, name, keys, expected, bias_name = ROUTERS[number]
    rng = np.random.default_rng([number, KINDS.index(kind)])
    rows, k = 400, expected["k"]
    n = next(
        keys[key]
        for key in ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
        if key in keys
    )
    logits = logits_of(kind, rng, rows, n)
    bias = None
    if bias_name:
        values = (
            rng.integers(0, 2, n) / 8 if kind in ("few", "equal") else rng.standard_normal(n) * 0.1
        )
        bias = (bias_name, values.astype(np.float32))
    router = router_of(module, name, keys, n, bias)
    which, weights, x = transformers_route(router, logits, bias)
    # the gradient by each expert's weight: the order of the chosen may be another
    of_expert = rng.standard_normal((rows, n)).astype(np.float32)
    (weights * torch.from_numpy(of_expert).gather(-1, which)).sum().backward()

    got = route(logits, bias and bias[1], np.zeros((rows, k), np.float32), **expected)
    assert not got["rc"].any()
    dweights = np.take_along_axis(of_expert, got["which"].astype(np.int64), -1)
    again = route(logits, bias and bias[1], dweights, **expected)
    assert (again["which"] == got["which"]).all() and (again["weights"] == got["weights"]).all()
    ours, our_weights = in_order_of_experts(again["which"], again["weights"])
    theirs, their_weights = in_order_of_experts(which.numpy(), weights.detach().numpy())
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(our_weights, their_weights, rtol=1e-6, atol=1e-37)
    error = np.linalg.norm(again["dlogits"] - x.grad.numpy(), axis=-1) / np.linalg.norm(
        of_expert, axis=-1
    )
    assert error.max() < 1e-6
