"""Measure `perta tune` beside PEFT with PyTorch's AdamW on the same CPUs.

    python bench/tune.py BUILD WORKDIR [--shape smollm2|tinyllama] [--tokens 128] [--updates 6]

A model of SmolLM2-135M's or TinyLlama-1.1B's shape with random weights in bfloat16; 8 samples of so
many tokens in an update; LoRA of rank 8, beside the modules that PEFT takes by default, and beside
all. Tokens a second, from the median time between updates, and from the median CPU time, which
other work on the machine disturbs less (with one thread: PyTorch's threads wait actively for each
other); and peak memory. PyTorch computes in the dtype that perta does: with weights of float32 or
of bfloat16, and with an adapter of float32.

Needs examples/requirements.txt.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from estimate import cpu_name

SHAPES = {
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tinyllama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
BATCH = 8
TORCH = """
import json, os, sys, torch, peft
from transformers import AutoModelForCausalLM
model, data, updates, dtype, targets, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
targets = targets if targets == "all-linear" else targets.split(",")
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
model.enable_input_require_grads()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
ids = torch.tensor([json.loads(line)["input_ids"] for line in open(data)])
for _ in range(int(updates)):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print("update", flush=True)
"""


def make(work: Path, shape: dict, tokens: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).bfloat16().save_pretrained(work / "model")
    rng = random.Random(1)
    lines = [[rng.randrange(shape["vocab_size"]) for _ in range(tokens)] for _ in range(BATCH)]
    (work / "ids.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in lines))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def measure(command: list) -> tuple[float, float, float]:
    """Medians of seconds and CPU seconds between the lines that begin with "update", and peak
    MiB at the last of them."""
    seen, peak = [], 0.0
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("update"):
                seen.append((time.monotonic(), cpu_seconds(run.pid)))
                peak = peak_mib(run.pid)
    if run.returncode:
        raise SystemExit(f"failed: {command}")
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(seen)]
    return *(statistics.median(step[i] for step in steps) for i in range(2)), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--modules", default="q_proj,v_proj;all-linear", help="separated by ;")
    parser.add_argument("--memory", default="1G,200M", help="budgets of perta")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-pytorch", action="store_true")
    args = parser.parse_args()
    make(args.workdir, SHAPES[args.shape], args.tokens)
    model, data, n = args.workdir / "model", args.workdir / "ids.jsonl", args.updates
    print(f"{cpu_name()}, {args.threads} threads; {BATCH} samples of {args.tokens} tokens an update")
    print("modules         by             dtype     s/update  tokens/s  CPU s/update  by CPU time  peak MiB")
    tokens = BATCH * args.tokens
    for targets in args.modules.split(";"):
        for compute, dtype in (("f32", "float32"), ("bf16", "bfloat16")):
            runs = {"PEFT + PyTorch": [sys.executable, "-c", TORCH, model, data, n, dtype, targets, args.threads]}
            if args.no_pytorch:
                runs = {}
            for memory in args.memory.split(","):
                runs[f"perta {memory}"] = [
                    args.build / "perta", "tune", "--model", model, "--data", data, "--out", args.workdir / "out",
                    "--force", "--steps", n, "--compute", compute, "--target-modules", targets,
                    "--memory", memory, "--threads", args.threads, "--progress", "none",
                ]  # fmt: skip
            for name, command in runs.items():
                seconds, cpu, peak = measure(command)
                print(f"{targets:15} {name:14} {dtype:9}{seconds:9.2f}{tokens / seconds:10.0f}{cpu:14.2f}"
                      f"{tokens * args.threads / cpu:13.0f}{peak:10.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
