"""The command under test: $PERTA, or build/perta."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PERTA = Path(os.environ.get("PERTA", ROOT / "build/perta")).resolve()
LONG = bool(os.environ.get("PERTA_LONG"))  # make check-long: all of what make check does in part
HANGS = 1800  # seconds: longer than any command takes on a busy machine, with sanitizers
# No commit point is made because of elapsed time; tests that want some make one at every chance
# (EAGER in verbs.py).
os.environ["PERTA_COMMIT_SECONDS"] = "inf"


def is_sanitized(program):
    """Decided by what is linked into it: __asan_init or __tsan_init."""
    return bool(re.search(rb"__[at]san_init", program.read_bytes()))


SANITIZED = is_sanitized(PERTA)  # sanitizers make it several times slower


MODEL = " (not in this build)" not in subprocess.run([PERTA, "--help"], capture_output=True, text=True).stdout
NEED_MODEL = ["test_ask", "test_audit", "test_box", "test_config", "test_config_sweep", "test_data", "test_demo", "test_estimate", "test_eval", "test_families", "test_family_keys", "test_family_verbs", "test_forget", "test_generate", "test_gradient_norm", "test_quality", "test_quantize", "test_resume", "test_route", "test_steps", "test_steps_lora", "test_survive", "test_torch", "test_tune"]


# Tests that compare numbers run once, in the plain build. Sanitizers run where they can find
# something: in parsers, journals, hostile files, the loop, threads, and each verb. The long tier
# runs everything in both.
NUMBERS = [
    "test_audit",
    "test_demo",
    "test_quality",
    "test_bench",
    "test_which",
    "test_torch",
    "test_dequantize::test_fp8_is_transformers",
    "test_dequantize::test_mxfp4_is_transformers",
    "test_dequantize::test_compressed_tensors_multiplies_in_the_scales_dtype",
    "test_config_sweep",
    "test_route",
    "test_families",
    "test_family_keys",
    "test_family_verbs",
    "test_forget",
    "test_ask",
    "test_tokenize",
    "test_metrics",
    "test_gradient_norm::test_norms_are_pytorchs",
    "test_gradient_norm::test_long_samples_batches_threads_and_memory_give_the_same_bits",
    "test_peft",
    "test_data::test_masks_and_positions_are_transformers",
    "test_data::test_any_mask_and_any_positions",
    "test_data::test_other_answers_and_steps_have_them_too",
    "test_estimate::test_loss_and_gradients_are_pytorchs",
    "test_estimate::test_attention_that_has_made_up_its_mind",
    "test_estimate::test_weights_of_every_dtype",
    "test_estimate::test_bf16_products_stay_near",
    "test_estimate::test_every_run_gives_the_same_bytes",
    "test_eval::test_numbers_are_transformers",
    "test_generate::test_tokens_are_transformers",
    "test_generate::test_an_adapter_counts",
    "test_generate::test_end_tokens_are_found_as_transformers_finds_them",
    "test_rope::test_tables_are_those_of_transformers",
    "test_quantize::test_formats_are_numpys_bit_for_bit",
    "test_tune::test_losses_and_adapters_are_pefts",
    "test_tune::test_schedules_decay_and_clipping_are_transformers",
    "test_tune::test_eval_and_estimate_with_an_adapter_are_pefts",
    "test_tune::test_a_small_adapter_counts_in_bf16",
    "test_tune::test_initial_factors_are_documented",
    "test_tune::test_the_bytes_depend_on_neither_threads_nor_memory",
    "test_box::test_box_and_model_are_pytorchs",
    "test_box::test_levels_are_held_in_the_box",
    "test_box::test_several_patches_are_those_of_runs_of_their_own",
    "test_steps::test_scales_and_model_are_pytorchs",
    "test_steps::test_what_is_forgotten_is_held",
    "test_steps::test_rules_stop_the_way",
    "test_steps::test_several_patches_are_those_of_runs_of_their_own",
    "test_steps_lora::test_every_run_gives_the_same_bytes",
    "test_survive::test_points_are_those_of_other_commands_and_gradients_are_pytorchs",
    "test_survive::test_a_level_is_held_under_every_condition",
]


def skip_what_needs_a_model(words):
    """A build with -Dmodel=disabled passes all other tests."""
    words = [str(word) for word in words]
    if not MODEL and (words[0] in ("estimate", "eval", "tune", "demo") or "--steps" in words):
        pytest.skip("this build has no matrix products")


def pytest_collection_modifyitems(items):
    if "torch" in sys.modules:  # models are small: threads that wait for each other gain nothing
        sys.modules["torch"].set_num_threads(1)
    for item in items:
        name = item.module.__name__
        if SANITIZED and not LONG and (name in NUMBERS or f"{name}::{item.originalname}" in NUMBERS):
            item.add_marker(pytest.mark.skip(reason="numbers: in the plain build"))
        if not MODEL and item.module.__name__ in NEED_MODEL:
            item.add_marker(pytest.mark.skip(reason="this build has no matrix products"))


def part(cases, plain=None, sanitized=None):
    """A part of the cases (None: all, 0: none), evenly spread from the first on; in the long tier all
    of them."""
    cases = list(cases)
    n = sanitized if SANITIZED else plain
    if LONG or n is None:
        return cases
    return cases[:: -(-len(cases) // n)] if n else []


@pytest.fixture
def perta(tmp_path):
    """Run the command in the test's own folder; assert its exit status (None: any)."""

    def run(*args, check=0, env=None, **kw):
        kw = {"cwd": tmp_path, "timeout": HANGS} | kw
        skip_what_needs_a_model(args)
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


MIB = 1 << 20


def needed(perta, words, budget="1M", env=None):
    """The budget that the refusal of a too small one names."""
    refusal = perta(*words, "--memory", budget, check=2, env=env).stderr
    return re.search(r"needs (\d+M)", refusal)[1]


def in_a_larger_process():
    """For perta(): 2 MiB more are resident from the start, in an environment (sanitizers copy
    it, and so need twice that there)."""
    env = {f"PAD{i}": "x" * (MIB // 16) for i in range(32)}
    # A quarter of the stack is available for the environment.
    stack = (64 * MIB, resource.getrlimit(resource.RLIMIT_STACK)[1])
    return {"env": env, "preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_STACK, stack)}
