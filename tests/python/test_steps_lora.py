"""`perta unlearn --steps --tuned` accepts a PEFT LoRA adapter. Where merging rounds nothing, steps
with the adapter are steps with the merged model, byte for byte."""

import json
import math
import os
import shutil
import signal
import subprocess

import pytest
from conftest import SANITIZED, needed, part
from llama import write_llama
from test_limits import peak_mib
from test_resume import contents
from test_same_bytes import settings
from test_steps import HOLD, STEPS, make_folders, survives_kills, tensors_of
from verbs import EAGER, FAULTY, LLAMA, stop_at

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "target_modules": "all-linear"}
LORA = [word if word != "tuned" else "adapter" for word in STEPS]
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBED, HEAD = "model.embed_tokens", "lm_head"


def sixty_fourths(generator, shape, most):
    return torch.randint(-most, most + 1, shape, generator=generator).float() / 64


class Adapter:
    """Small multiples of powers of two: sums of products of these are exact in bfloat16."""

    def __init__(self, base, **config):
        self.generator = torch.Generator().manual_seed(5)
        self.base, self.config = base, CONFIG | config
        self.tensors, self.merged = {}, dict(base)

    def setting(self, pattern, key, module):
        found = (x for end, x in self.config.get(pattern, {}).items() if module.endswith(end))
        return next(found, self.config[key])

    def add(self, module):
        w = self.base[f"{module}.weight"]
        r = self.setting("rank_pattern", "r", module)
        alpha = self.setting("alpha_pattern", "lora_alpha", module)
        scaling = alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)
        a = torch.randint(-1, 2, (r, w.shape[1]), generator=self.generator).float() / 8
        b = torch.randint(-1, 2, (w.shape[0], r), generator=self.generator).float() / 8
        tau = scaling * (b @ a)
        if module == EMBED:
            self.tensors[f"{PREFIX}{module}.lora_embedding_A"] = b.t().contiguous()
            self.tensors[f"{PREFIX}{module}.lora_embedding_B"] = a.t().contiguous()
        else:
            self.tensors[f"{PREFIX}{module}.lora_A.weight"] = a
            self.tensors[f"{PREFIX}{module}.lora_B.weight"] = b
        self.merged[f"{module}.weight"] = (w.float() + tau).to(w.dtype)
        assert torch.equal(self.merged[f"{module}.weight"].float() - w.float(), tau)

    def add_whole(self, name):
        w = self.base[name]
        x = (w.float() + sixty_fourths(self.generator, w.shape, 9)).to(w.dtype)
        self.tensors[f"{PREFIX}{name}"] = self.merged[name] = x
        return x


def save(folder, like, tensors):
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make(tmp_path, name="llama", dtype=torch.float32, layers=LINEAR, others=(), whole=(), **config):
    """make_folders, with a base of sixty-fourths, an adapter, and the two merged."""
    make_folders(tmp_path, name)
    for folder in ("base", "tuned"):
        shutil.rmtree(tmp_path / folder)
    generator = torch.Generator().manual_seed(4)
    full = tensors_of(tmp_path / "full")
    base = {k: sixty_fourths(generator, x.shape, 31).to(dtype) for k, x in full.items()}
    adapter = Adapter(base, **config)
    names = (k.removesuffix(".weight") for k in full if k.endswith("proj.weight"))
    for module in [k for k in names if k.endswith(tuple(layers))] + list(others):
        adapter.add(module)
    for k in (k for k in full if any(piece in k for piece in whole)):
        adapter.add_whole(k)
    if HEAD in whole and f"{HEAD}.weight" not in full:  # tied, and kept so
        adapter.tensors[f"{PREFIX}{HEAD}.weight"] = adapter.merged[f"{EMBED}.weight"].clone()
    for folder, tensors in (("base", base), ("tuned", adapter.merged)):
        save(tmp_path / folder, tmp_path / "full", tensors)
    full = {k: x.to(dtype) for k, x in full.items()}
    (tmp_path / "full").rename(tmp_path / "old")
    save(tmp_path / "full", tmp_path / "old", full)
    write_adapter(tmp_path / "adapter", adapter.tensors, adapter.config)
    return adapter


def write_adapter(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def losses(summary):
    return [[point[key] for key in ("forget_loss", "forget_probability", "retain_loss")]
            for point in summary["path"]]  # fmt: skip


def files(folder, pattern):
    found = {path.name: path.read_bytes() for path in folder.glob(pattern)}
    assert found
    return found


CASES = {
    "two modules": {"layers": ATTENTION},
    "bfloat16": {"dtype": torch.bfloat16},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2, "up_proj": 8}, "alpha_pattern": {"q_proj": 4}},
    "patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 1, "down_proj": 16},
        "alpha_pattern": {"o_proj": 2},
    },
    "embedding and head": {"layers": [], "others": [EMBED, HEAD]},
    "embedding, every linear": {"others": [EMBED]},
    "norms whole": {"whole": ["norm"], "modules_to_save": ["norm"]},
    "head whole": {"layers": ATTENTION, "whole": [HEAD], "modules_to_save": [HEAD]},
    "nothing but whole": {"layers": [], "whole": ["mlp"], "modules_to_save": ["mlp"]},
    "qwen3": {"name": "qwen3", "whole": ["q_norm"], "modules_to_save": ["q_norm"]},
    "biases": {"name": "llama, biases", "whole": [".bias"], "bias": "all"},
    "tied": {"name": "llama, tied"},
    "tied, both whole": {
        "name": "llama, tied",
        "whole": ["embed_tokens", HEAD],
        "modules_to_save": ["embed_tokens", HEAD],
    },
    "bfloat16, tied, both whole": {
        "name": "qwen2",
        "dtype": torch.bfloat16,
        "whole": ["embed_tokens", HEAD, ".bias"],
        "modules_to_save": ["embed_tokens", HEAD],
        "bias": "all",
    },
}


@pytest.mark.parametrize("case", part(CASES.values(), sanitized=3), ids=part(CASES, sanitized=3))
def test_steps_are_those_of_the_merged_model(perta, tmp_path, case):
    adapter = make(tmp_path, **case)
    flags = ["--method", "signed-backoff", "--max-scale", "1", "--step", "0.5", "--out", "out"]
    base = ["--base", "base"] if case.get("whole") else []
    words = [word for word in LORA if word not in ("--base", "base")]
    have = json.loads(perta(*words, "3", *flags, *base).stdout)
    shutil.copytree(tmp_path / "out", tmp_path / "first")
    patch = files(tmp_path / "patch", "*.perta")
    want = json.loads(perta(*STEPS, "3", *flags, "--force").stdout)
    assert losses(have) == losses(want)
    assert files(tmp_path / "first", "*.safetensors") == files(tmp_path / "out", "*.safetensors")
    assert files(tmp_path / "patch", "*.perta") == patch
    changed = {k for k, x in tensors_of(tmp_path / "full").items()
               if not torch.equal(x, tensors_of(tmp_path / "out")[k])}  # fmt: skip
    assert changed == {k for k, x in adapter.base.items() if not torch.equal(x, adapter.merged[k])}
    # Only what the adapter changes has scales; of those, as many moved as with the merged model.
    total = sum(x.numel() for x in adapter.base.values())
    scaled = sum(x.numel() for k, x in adapter.base.items() if k in changed)
    for a, b in zip(have["path"], want["path"], strict=True):
        for key in ("moved", "mean_scale"):
            assert a[key] * scaled == pytest.approx(b[key] * total, rel=1e-12)


def test_levels_are_held(perta, tmp_path):
    make(tmp_path)
    level = json.loads(perta(*LORA, "3").stdout)["path"][3]["forget_probability"] * (1 + 1e-3)
    have = json.loads(perta(*LORA, "6", *HOLD, level, "--force").stdout)
    patch = files(tmp_path / "patch", "*.perta")
    want = json.loads(perta(*STEPS, "6", *HOLD, level, "--force").stdout)
    assert (losses(have), have["chosen"]) == (losses(want), want["chosen"])
    assert files(tmp_path / "patch", "*.perta") == patch


def test_the_record_names_the_adapter(perta, tmp_path):
    make(tmp_path, layers=ATTENTION)
    perta(*LORA, "1")
    manifest = json.loads((tmp_path / "patch/manifest.json").read_text())
    recipe = manifest["recipe"]
    assert (recipe["tuned"], recipe["lora"]) == ("lora", {"r": 4, "lora_alpha": 8})
    assert (recipe["method"], recipe["steps"]) == ("signed-backoff", 1)
    assert [s["name"] for s in manifest["inputs"]["tuned"]["shards"]] == ["adapter_model.safetensors"]
    actions = {tensor["name"]: tensor["action"] for tensor in manifest["tensors"]}
    assert actions["model.norm.weight"] == "kept: not in the adapter"
    assert actions["model.layers.0.self_attn.q_proj.weight"] == "edited"
    perta("verify", "patch")
    assert not list(tmp_path.glob("*.perta*"))


def test_globs_choose_among_what_the_adapter_changes(perta, tmp_path):
    make(tmp_path, layers=ATTENTION)
    perta(*LORA, "2", "--exclude", "*v_proj*", "--out", "out")
    full, out = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "out")
    changed = {name for name in full if not torch.equal(full[name], out[name])}
    assert changed == {name for name in full if "q_proj" in name}
    words = [*LORA, "2", "--include", "*mlp*", "--patch", "never"]
    assert "--include and --exclude leave no tensor to edit" in perta(*words, check=2).stderr
    assert not list(tmp_path.glob("never*"))


def test_every_run_gives_the_same_bytes(perta, tmp_path):
    """In tensors of several chunks, too, and with LoRAs of an embedding and of a head."""
    make(tmp_path, others=[EMBED, HEAD], whole=["norm"], modules_to_save=["norm"])
    big = torch.randn((40000, 32), generator=torch.Generator().manual_seed(7)) / 8
    for folder in ("full", "base"):
        tensors = tensors_of(tmp_path / folder) | {f"{name}.weight": big.clone() for name in (EMBED, HEAD)}
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / folder / "config.json").read_text())
        (tmp_path / folder / "config.json").write_text(json.dumps(config | {"vocab_size": 40000}))
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    for name, shape in (("embed_tokens.lora_embedding_A", (4, 40000)), ("lm_head.lora_B.weight", (40000, 4))):
        name = next(key for key in tensors if key.endswith(name))
        tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    save_file(tensors, path, {"format": "pt"})
    command = [*LORA, "2"]
    runs = []
    for flags in settings(perta, command):
        summary = json.loads(perta(*command, *flags, "--force").stdout)
        runs.append((losses(summary), files(tmp_path / "patch", "*.perta")))
    assert len(runs) > 1 and all(run == runs[0] for run in runs)


@pytest.mark.parametrize("apart", part([3, 5, 8], plain=1, sanitized=1))
def test_a_run_that_is_killed_goes_on(perta, tmp_path, apart):
    make(tmp_path, whole=["norm"], modules_to_save=["norm"])
    command = [*LORA, "2", "--out", "out"]
    survives_kills(perta, tmp_path, command, apart)


def test_another_adapter_does_not_continue_a_run(perta, tmp_path):
    """Neither its weights nor its config may change, between runs or within one."""
    adapter = make(tmp_path)
    command = [*LORA, "2"]
    perta(*command)
    want = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    assert stop_at(tmp_path, command, "commit", 6) == (-signal.SIGKILL, "")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(adapter.config | {"lora_alpha": 9}))
    refusal = perta(*command, "--resume", check=2).stderr
    assert "--resume cannot continue: adapter_config.json" in refusal
    config.write_text(json.dumps(adapter.config))
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.rename(tmp_path / "kept")
    save_file({k: 2 * x for k, x in adapter.tensors.items()}, path, {"format": "pt"})
    assert "--resume cannot continue: tuned" in perta(*command, "--resume", check=2).stderr
    (tmp_path / "kept").rename(path)
    refusal = perta(*command, "--resume", "--base", "full", check=2).stderr
    assert "--resume cannot continue: base" in refusal
    perta(*command, "--resume")
    assert contents(tmp_path / "patch") == want


@pytest.mark.parametrize("at", part(range(8, 16), plain=2, sanitized=1))
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_changes_during_a_run_is_an_error(perta, tmp_path, name, at):
    """The run is halted at a commit point while the file is replaced. Once it is as it was, the
    run can be resumed."""
    adapter = make(tmp_path)
    command = [*LORA, "2", "--progress", "none"]
    perta(*command)
    want = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    doubled = {k: 2 * x for k, x in adapter.tensors.items()}
    write_adapter(tmp_path / "other", doubled, adapter.config | {"lora_alpha": 9})
    faults = {"PERTA_FAULTS": f"fast=1,signal=commit:{at}:{int(signal.SIGSTOP)}"}
    with subprocess.Popen([FAULTY, *command], cwd=tmp_path, env=EAGER | faults, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:  # fmt: skip
        os.waitid(os.P_PID, run.pid, os.WSTOPPED)
        (tmp_path / "adapter" / name).rename(tmp_path / "kept")
        (tmp_path / "other" / name).rename(tmp_path / "adapter" / name)
        run.send_signal(signal.SIGCONT)
        said = run.communicate()[1]
    assert run.returncode == 3 and f"adapter/{name}: changed since" in said
    (tmp_path / "kept").rename(tmp_path / "adapter" / name)
    perta(*command, "--resume")
    assert contents(tmp_path / "patch") == want


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_numbers_that_are_not_finite_have_their_place(perta, tmp_path, factor):
    adapter = make(tmp_path)
    name = f"{PREFIX}model.layers.1.mlp.down_proj.{factor}.weight"
    adapter.tensors[name][1, 2] = float("nan")
    shutil.rmtree(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", adapter.tensors, adapter.config)
    message = perta(*LORA, "2", check=3).stderr
    elem = adapter.tensors[name].shape[1] + 2
    assert f"adapter_model.safetensors: tensor {name}, element {elem} (byte " in message
    assert "not a finite number" in message and "--nonfinite" not in message
    assert not (tmp_path / "patch").exists()


def test_what_an_edit_refuses_is_refused(perta, tmp_path):
    """Before anything is written, with the same words."""
    adapter = make(tmp_path, whole=["norm"], modules_to_save=["norm"])
    words = [word for word in LORA if word not in ("--base", "base")]
    edit = "unlearn --model full --tuned adapter --method tv --patch patch".split()
    for flags in ([], ["--dry-run"]):
        message = perta(*words, "2", *flags, check=2).stderr
        assert message == perta(*edit, check=2).stderr
        assert "--base DIR is needed: the adapter adapter stores " in message
    for change, what in (({"use_dora": True}, "use_dora"), ({"r": 3}, "its rank is 3")):
        config = json.dumps(adapter.config | change)
        (tmp_path / "adapter/adapter_config.json").write_text(config)
        message = perta(*LORA, "2", check=3).stderr
        assert what in message and "adapter" in message
    assert not list(tmp_path.glob("patch*"))
    words = ["full" if word == "adapter" else word for word in words]
    assert "--base DIR is needed" in perta(*words, "2", check=2).stderr


sanitized = pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")


@sanitized
def test_factors_count_in_the_budget(perta, tmp_path):
    """An adapter of rank 768: a worker keeps 3 MiB of its columns, and as much of its rows."""
    wide = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2}
    write_llama(tmp_path / "full", LLAMA | wide)
    for side, ids in (("forget", [5, 9, 3, 7]), ("retain", [8, 2, 6])):
        (tmp_path / f"{side}.jsonl").write_text(json.dumps({"input_ids": ids}))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in ("q_proj", "v_proj", "o_proj"):
        for kind, shape in (("A", (768, 1024)), ("B", (1024, 768))):
            name = f"{PREFIX}model.layers.0.self_attn.{module}.lora_{kind}.weight"
            tensors[name] = torch.randn(shape, generator=generator) / 100
    write_adapter(tmp_path / "adapter", tensors, CONFIG | {"r": 768})
    words = [word for word in LORA if word not in ("--base", "base")] + ["1", "--io", "pread", "--force"]
    results = []
    for threads in ("1", "16"):
        budget = needed(perta, [*words, "--threads", threads])
        flags = ["--threads", threads, "--memory", budget]
        assert peak_mib([*words, *flags], tmp_path) <= int(budget[:-1])
        results.append(files(tmp_path / "patch", "*.perta"))
    assert results[0] == results[1]
