"""`perta forget`, from text to the answers of the patched model."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGS, PERTA, ROOT
from test_resume import contents

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

sys.path += [str(ROOT / "examples"), str(ROOT / "python")]
from made_up_facts import make_facts, make_tokenizer
from perta.command import Problem
from perta.forget_plan import rows
from perta.forget_sets import part
from perta.samples import Sample
from tiny_llama import new_model, save_model, teach

os.environ["PERTA_PYTHON"] = sys.executable
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    "{% if not add_generation_prompt %} {{ eos_token }}{% endif %}"
)


def as_lines(facts):
    return "".join(json.dumps({"question": f.question, "answer": f.answer}) + "\n" for f in facts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small Llama that knows some made-up people, what it was before it knew those to forget,
    and both sets as text."""
    folder = tmp_path_factory.mktemp("forget")
    facts = make_facts(7, 8, 4, 20, 1)
    tokenizer = make_tokenizer(facts.words)
    tokenizer.chat_template = TEMPLATE
    model = new_model(tokenizer, 7)
    teach(model, tokenizer, facts.general + facts.retain, steps=60, seed=7)
    save_model(model, tokenizer, folder / "base")
    teach(model, tokenizer, facts.general + facts.retain + facts.forget, steps=60, seed=8)
    save_model(model, tokenizer, folder / "full")
    (folder / "forget.jsonl").write_text(as_lines(facts.forget))
    (folder / "retain.jsonl").write_text(as_lines(facts.retain))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    for name in ("full", "base"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("forget.jsonl", "retain.jsonl"):
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


FORGET = "forget --model full --forget forget.jsonl --retain retain.jsonl --out out".split()
QUICK = [*FORGET, "--steps", "3", "--target", "0.3"]


def probabilities(folder, data):
    """Of the answers in a data file, with transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for line in data.read_text().splitlines():
        ids, labels = (torch.tensor([json.loads(line)[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            found.append(torch.exp(-model(input_ids=ids, labels=labels).loss).item())
    return found


def test_from_text_to_answers(perta, folder):
    before = contents(folder / "full")
    done = perta(*FORGET, "--base", "base", "--compute", "f32", "--json")
    summary = json.loads(done.stdout)
    assert json.loads((folder / "out/summary.json").read_text()) == summary
    assert contents(folder / "full") == before
    sets = summary["sets"]
    assert {name: one["samples"] for name, one in sets.items()} == {"forget": 16, "retain": 64, "held-out": 16}
    assert summary["target"]["from"] == "base" and summary["reached"] and not summary["nothing_to_forget"]
    # It knew everything; it has forgotten as much as was asked, and keeps most of the rest.
    assert min(one["before"]["probability"] for one in sets.values()) > 0.8
    assert sets["forget"]["after"]["probability"] <= summary["target"]["probability"] < 0.5
    assert sets["retain"]["after"]["probability"] > 0.8 and sets["held-out"]["after"]["probability"] > 0.5

    # The patch leads to a model that transformers asks the same way.
    perta("apply", "full", "out/patch", "--out", "forgotten")
    perta("verify", "forgotten", "--patch", "out/patch", "--applied")
    for name in sets:
        data = folder / f"out/data/{name}.jsonl"
        for model, when in (("full", "before"), ("forgotten", "after")):
            want = probabilities(folder / model, data)
            have = [one[when]["probability"] for one in summary["samples"] if one["set"] == name]
            assert have == pytest.approx(want, abs=1e-4)
            assert sets[name][when]["probability"] == pytest.approx(sum(want) / len(want), abs=1e-4)
    assert summary["target"]["probability"] == pytest.approx(
        sum(probabilities(folder / "base", folder / "out/data/forget.jsonl")) / 16, abs=1e-4
    )
    text = (folder / "out/summary.md").read_text()
    assert "**The target is reached.**" in text and "perta apply full out/patch --out forgotten" in text
    shutil.rmtree(folder / "forgotten")
    commands = re.findall(r"^    perta (.*)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["apply", "verify", "revert", "eval"]
    for command in commands:
        perta(*command.split())
    again = contents(folder / "model-again")
    assert {name: again[name] for name in before if name.endswith(".safetensors")} == {
        name: data for name, data in before.items() if name.endswith(".safetensors")
    }


def test_what_is_in_the_folder(perta, folder):
    perta(*QUICK, check=None)
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {"patch", "data", "report.html", "summary.md", "summary.json"}
    assert stat.S_IMODE((out / "data").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (out / "data").iterdir())
    # What may be shown holds no text: neither words nor token ids, nor digests of them.
    secrets = [json.loads(line)["answer"] for line in (folder / "forget.jsonl").read_text().splitlines()]
    for name in ("summary.md", "summary.json", "report.html", "patch/manifest.json"):
        text = (out / name).read_text()
        assert not [word for word in secrets if word in text] and "input_ids" not in text
    assert sorted(path.name for path in folder.iterdir()) == ["base", "forget.jsonl", "full", "out", "retain.jsonl"]


def test_held_out_samples_are_never_shown(perta, folder):
    """Not to the method; and they depend on the seed alone."""
    held = {}
    for seed in ("0", "0", "1"):
        perta(*QUICK, "--seed", seed, "--force", check=None)
        shown, out = ((folder / f"out/data/{n}.jsonl").read_text().splitlines() for n in ("retain", "held-out"))
        assert len(shown) == 64 and len(out) == 16 and not set(shown) & set(out)
        recipe = json.loads((folder / "out/patch/manifest.json").read_text())["recipe"]
        assert (recipe["retain_samples"], recipe["retain_batch"]) == ("64", 32)
        samples = json.loads((folder / "out/summary.json").read_text())["samples"]
        where = [s["where"] for s in samples if s["set"] != "forget"]
        assert sorted(where) == sorted(f"line {i}" for i in range(1, 81))
        assert held.setdefault(seed, out) == out
    assert held["0"] != held["1"]
    perta(*QUICK, "--holdout", "0", "--force", check=None)
    assert (folder / "out/data/held-out.jsonl").read_text() == ""
    assert "Nothing was held out" in (folder / "out/summary.md").read_text()


def sample(ids, group):
    return Sample(ids, list(ids), group=group)


def test_groups_are_not_parted():
    samples = [sample([i, i + 1], f"g{i // 3}") for i in range(30)] + [sample([100, 1], "a"), sample([100, 1], "b")]
    for seed in range(20):
        shown, held = part(samples, 0.2, seed)
        assert len(shown) + len(held) == 32 and 0 < len(held) <= 6
        assert not {s.group for s in shown} & {s.group for s in held}
        assert not {tuple(s.ids) for s in shown} & {tuple(s.ids) for s in held}
    assert part(samples, 0, 1) == (samples, [])
    assert part(samples[:3], 0.5, 1) == (samples[:3], [])  # all one group
    few = [sample([1, 2], "a"), sample([3, 4], "b")]
    assert all(len(side) == 1 for side in part(few, 0.01, 3)) and len(part(few, 0.99, 3)[0]) == 1


def test_targets(perta, folder):
    """Given, of base, or a guess that says so."""
    words = [*FORGET, "--steps", "1", "--force", "--json"]
    guess = perta(*words, check=None)
    target = json.loads(guess.stdout)["target"]
    knew = json.loads(guess.stdout)["sets"]["forget"]["before"]["probability"]
    assert target["from"] == "guess" and target["probability"] == pytest.approx(0.15 * knew)
    assert "is a guess" in guess.stderr and "The target is a guess" in (folder / "out/summary.md").read_text()
    given = perta(*words, "--target", "0.25", check=None)
    assert json.loads(given.stdout)["target"]["probability"] == 0.25 and "guess" not in given.stderr
    assert "give one of them" in perta(*words, "--target", "0.2", "--base", "base", check=2).stderr


def test_a_target_that_is_not_reached(perta, folder):
    done = perta(*FORGET, "--steps", "1", "--target", "0.001", check=1)
    assert "Not enough is forgotten" in done.stderr and "not enough is forgotten: --stop" not in done.stderr
    assert "**Not enough is forgotten.**" in (folder / "out/summary.md").read_text()
    perta("verify", "out/patch")


def test_the_target_holds_under_conditions(perta, folder):
    """--survive is passed on; the summary says what came out, and it decides whether it is reached."""
    words = [*QUICK[:-1], "0.9", "--survive", "int4,drop", "--compute", "f32", "--json", "--steps", "9"]
    summary = json.loads(perta(*words).stdout)
    recipe = json.loads((folder / "out/patch/manifest.json").read_text())["recipe"]
    found = summary["edit"]["conditions"]
    assert found == recipe["conditions"] and recipe["survive"]["conditions"] == ["int4", "drop"]
    assert {one["condition"] for one in found} == {"as it is", "int4", "drop"} and summary["reached"]
    assert summary["options"]["survive"] == "int4,drop"
    text = (folder / "out/summary.md").read_text()
    assert "## Does it last?" in text and text.count("| yes |") == 3
    never = [*QUICK[:-1], "1e-6", "--survive", "drop", "--steps", "1", "--force"]
    done = perta(*never, check=1)
    assert "Under the condition drop it is" in done.stderr + done.stdout
    assert "| **no** |" in (folder / "out/summary.md").read_text()
    for words in ("fp5", "int4,int4", ""):
        assert "--survive" in perta(*QUICK, "--survive", words, check=2).stderr
    assert "dry run" in perta(*QUICK, "--survive", "reteach", "--dry-run", "--force").stdout


def test_nothing_to_forget(perta, folder):
    done = perta(*FORGET, "--target", "0.999", "--json")
    assert "Nothing to forget" in done.stderr and json.loads(done.stdout)["nothing_to_forget"]
    assert "**Nothing to forget.**" in (folder / "out/summary.md").read_text()
    assert not (folder / "out/patch").exists() and not (folder / "out/report.html").exists()
    assert "the answers" in perta(*FORGET, "--target", "0.999", "--force").stderr


# ---- interrupted


def start(folder, *words):
    return subprocess.Popen([PERTA, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(run, path, seconds=HANGS):
    end = time.monotonic() + seconds
    while not path():
        assert run.poll() is None and time.monotonic() < end, run.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on(perta, folder, number):
    words = [*FORGET, "--steps", "12", "--target", "0.3"]
    perta(*words[:-1], "0.3", check=None)
    want = contents(folder / "out/patch")
    summary = json.loads((folder / "out/summary.json").read_text())
    shutil.rmtree(folder / "out")
    run = start(folder, *words)
    partial = folder / "out.perta-partial"
    wait_for(run, lambda: (partial / "patch.steps.perta-partial/scales-3").exists())
    run.send_signal(number)
    _, stderr = run.communicate(timeout=HANGS)
    assert run.returncode == (130 if number != signal.SIGKILL else -9), stderr
    assert not (folder / "out").exists() and partial.exists()
    if number != signal.SIGKILL:
        assert f"to resume: perta {' '.join(words)} --resume\n" in stderr
        assert "perta unlearn" not in stderr
    assert "--resume continues that run" in perta(*words, check=2).stderr
    other = perta(*words, "--resume", "--seed", "4", check=2).stderr
    assert "--resume cannot continue: seed changed" in other
    end = time.monotonic() + HANGS  # after SIGKILL, the child ends when it next reports its progress
    while "another process" in (again := perta(*words, "--resume", check=None)).stderr and time.monotonic() < end:
        time.sleep(0.1)
    assert again.returncode in (0, 1), again.stderr
    assert contents(folder / "out/patch") == want
    resumed = json.loads((folder / "out/summary.json").read_text())
    assert resumed["sets"] == summary["sets"] and resumed["samples"] == summary["samples"]
    assert not list(folder.glob("*perta*"))


def test_texts_and_models_that_change_are_not_resumed(perta, folder):
    words = [*FORGET, "--steps", "60", "--target", "0.01"]
    run = start(folder, *words)
    wait_for(run, lambda: (folder / "out.perta-partial/patch.steps.perta-partial/scales-1").exists())
    second = perta(*words, "--resume", check=4).stderr
    assert "another run is writing it" in second
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=HANGS)
    with (folder / "retain.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert "cannot continue: retain changed" in perta(*words, "--resume", check=2).stderr
    assert "cannot continue: date changed" in perta(*words, "--resume", "--date", "2026-11-30", check=2).stderr
    (folder / "out.perta-partial/mine.txt").write_text("keep")
    assert "holds more than perta forget wrote: mine.txt" in perta(*words, "--force", check=2).stderr
    (folder / "out.perta-partial/mine.txt").unlink()
    perta(*QUICK, "--force", check=None)
    assert not list(folder.glob("out.*"))


def test_an_error_keeps_what_was_measured(perta, folder):
    """An error after hours costs no finished work; one at the start leaves nothing."""
    partial = folder / "out.perta-partial"
    assert "--memory" in perta(*QUICK, "--memory", "1M", check=2).stderr and not partial.exists()
    perta(*QUICK, check=None)
    shutil.copytree(folder / "out", partial)
    for name in ("data/after.json", "summary.json", "summary.md", "report.html"):
        (partial / name).unlink()
    shutil.rmtree(folder / "out")
    shard = sorted((partial / "patch").glob("*.perta"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    broken = perta(*QUICK, "--resume", check=3).stderr
    assert "perta eval failed" in broken and "to resume:" in broken and shard.exists()
    shard.write_bytes(whole)
    before = (partial / "data/before.json").stat().st_mtime_ns
    perta(*QUICK, "--resume", check=None)
    assert (folder / "out/data/before.json").stat().st_mtime_ns == before


def test_force_replaces_only_what_it_wrote(perta, folder):
    out = folder / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    for words, says in (([], "exists; --force replaces it"), (["--force"], "more than perta forget wrote: thesis.txt")):
        assert says in perta(*QUICK, *words, check=2).stderr
    (out / "thesis.txt").rename(folder / "thesis.txt")
    (out / "patch").mkdir()
    assert "perta forget did not write it" in perta(*QUICK, "--force", check=2).stderr
    (out / "patch").rmdir()
    perta(*QUICK, "--force", check=None)  # an empty folder
    first = (out / "summary.json").read_text()
    (out / "patch/notes").write_text("mine")
    assert "patch/notes" in perta(*QUICK, "--force", check=2).stderr
    (out / "patch/notes").unlink()
    (out / "data").rename(folder / "data")
    (out / "data").symlink_to(folder / "data")
    assert "wrote: data" in perta(*QUICK, "--force", check=2).stderr
    (out / "data").unlink()
    (folder / "data").rename(out / "data")
    perta(*QUICK, "--force", "--seed", "3", check=None)
    assert (out / "summary.json").read_text() != first
    assert not list(folder.glob("out.*"))


def test_a_kill_at_the_ends_of_a_run(perta, folder):
    """Before the run could say whose the folder is, and between its renames."""
    partial, out = folder / "out.perta-partial", folder / "out"
    for held in ([], ["data"], ["data", "data/run.json.new"]):
        partial.mkdir()
        for name in held:
            (partial / name).mkdir() if name == "data" else (partial / name).write_text("{")
        assert "--resume" in perta(*QUICK, check=2).stderr
        perta(*QUICK, "--resume", check=None)
        assert (out / "summary.md").exists() and not list(folder.glob("out.*"))
        shutil.rmtree(out)
    perta(*QUICK, check=None)
    want = contents(out / "patch")
    out.rename(folder / "out.perta-replaced")
    shutil.copytree(folder / "out.perta-replaced", partial, copy_function=shutil.copy2)
    perta(*QUICK, "--resume", check=None)
    assert contents(out / "patch") == want and not list(folder.glob("out.*"))
    shutil.copytree(out, folder / "out.perta-replaced")
    perta(*QUICK, "--force", check=None)
    assert not list(folder.glob("out.*"))


# ---- bad input


def quantise(folder):
    """Give the model an FP8 tensor."""
    path = min((folder / "full").glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name, t in tensors.items() if t.ndim == 2 and "layers" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(())
    save_file(tensors, path)
    index = folder / "full/model.safetensors.index.json"
    if index.exists():
        text = json.loads(index.read_text())
        text["weight_map"][f"{name}_scale"] = path.name
        index.write_text(json.dumps(text))
    config(folder, quantization_config={"quant_method": "fp8"})


def pipe(folder):
    (folder / "forget.jsonl").unlink()
    os.mkfifo(folder / "forget.jsonl")


@pytest.mark.parametrize(
    "change, status, says",
    [
        (lambda f: (f / "forget.jsonl").write_text("\n"), 3, "forget.jsonl: no samples"),
        (lambda f: (f / "retain.jsonl").write_text(""), 3, "retain.jsonl: no samples"),
        (lambda f: (f / "forget.jsonl").unlink(), 3, "forget.jsonl: no such file"),
        (pipe, 3, "forget.jsonl: not a regular file"),
        (lambda f: overlap(f, lambda r: r), 3, "forget.jsonl: line 2, and retain.jsonl: line 81"),
        (lambda f: overlap(f, lambda r: r | {"answer": f"  {r['answer']} "}), 3, "line 2, and retain.jsonl: line 81"),
        (lambda f: (f / "full/tokenizer.json").unlink(), 3, "full/tokenizer.json: no such file: the model has no"),
        (lambda f: config(f, vocab_size=50), 3, "the tokenizer is not this model's"),
        (lambda f: config(f, max_position_embeddings=6), 3, "but the model has 6 positions"),
        (lambda f: (f / "forget.jsonl").write_text('{"question": "Who?"}\n'), 3, "line 1: question is present without"),
        (lambda f: (f / "full/model.safetensors.index.json").write_text("{"), 3, "perta eval failed"),
        (lambda f: shutil.rmtree(f / "full"), 3, "full: no such folder"),
        (lambda f: config(f, quantization_config={"quant_method": "gptq"}), 3, 'has quant_method "gptq"'),
        (quantise, 3, "full: the weights are quantised; dequantise the model to BF16 first (perta dequantize"),
    ],
)
def test_bad_input_is_explained_and_nothing_is_left(perta, folder, change, status, says):
    change(folder)
    before = sorted(folder.iterdir())
    assert says in perta(*QUICK, check=status).stderr
    assert sorted(folder.iterdir()) == before


def test_a_base_with_another_tokenizer(perta, folder):
    """The same token ids would be other words to it, and the target a number without meaning."""
    path = folder / "base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    del vocabulary[first]  # a base that lacks a token is fine
    path.write_text(json.dumps(tokenizer))
    perta(*FORGET, "--base", "base", "--steps", "1", "--force", check=None)
    assert (folder / "out/summary.md").exists()
    vocabulary[first] = vocabulary.pop(second)
    path.write_text(json.dumps(tokenizer))
    said = perta(*FORGET, "--base", "base", "--force", "--steps", "1", check=3).stderr
    assert f"token id {vocabulary[first]} is '{first}', and '{second}' in full" in said


def overlap(folder, change):
    line = json.loads((folder / "forget.jsonl").read_text().splitlines()[1])
    with (folder / "retain.jsonl").open("a") as file:
        file.write(json.dumps(change(line)) + "\n")


def config(folder, **keys):
    path = folder / "full/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_duplicates_are_noted_and_not_parted(perta, folder):
    text = (folder / "retain.jsonl").read_text()
    (folder / "retain.jsonl").write_text(text + text.splitlines()[4] + "\n")
    done = perta(*QUICK, check=None)
    assert "retain.jsonl: the same sample more than once: line 81 is line 5" in done.stderr
    assert "line 81 is line 5" in (folder / "out/summary.md").read_text()


@pytest.mark.parametrize(
    "words",
    [["--target", "1.5"], ["--target", "0"], ["--target", "x"], ["--holdout", "1"], ["--steps", "0"], ["--nothing"],
     ["--out", "/"], ["--out", "full/new"], ["--force", "--out", "full"], ["--progress", "loud"], ["--model", ""], ["--compute", "f16"], ["more"], ["--memory", "lots"], ["--box", "0"]],
)  # fmt: skip
def test_wrong_arguments(perta, folder, words):
    assert perta(*QUICK, *words, check=2).stderr
    assert sorted(path.name for path in folder.iterdir()) == ["base", "forget.jsonl", "full", "retain.jsonl"]


# ---- what it says


def test_dry_run_writes_nothing(perta, folder, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    before = sorted(folder.rglob("*"))
    done = perta(*FORGET, "--dry-run", env={"TMPDIR": str(scratch)})
    for word in ("time", "reads", "writes", "FLOP", "disk", "memory"):
        assert word in done.stdout
    f = json.loads(perta(*FORGET, "--dry-run", "--json").stdout)
    n = sum(x.numel() for x in transformers.AutoModelForCausalLM.from_pretrained(folder / "full").parameters())
    tokens = f["tokens"]
    learned = 16 * (tokens["forget"] + 32 / 64 * tokens["retain"])  # gradients of batches of 32
    asked = 2 * sum(tokens.values()) + 16 / 2 * tokens["retain"]
    assert f["parameters"] == n and f["disk_bytes"] > 17 * n and f["seconds"] > 0
    assert f["flop"] == 2 * n * (asked + 4 * learned)
    assert sorted(folder.rglob("*")) == before and not list(scratch.iterdir())
    (folder / "retain.jsonl").write_text("")
    assert "no samples" in perta(*FORGET, "--dry-run", check=3).stderr


@pytest.mark.parametrize("read, tokens, says", [
    (None, None, "too quick to measure"), (2e9, None, "2.0 GB/s read"), (None, 30, "30 tokens/s forward"),
    (2e6, 30, "2.0 MB/s read, 30 tokens/s forward"),
])  # fmt: skip
def test_rates_of_a_dry_run_may_be_unknown(read, tokens, says):
    f = {"seconds": 7200, "read_bytes": 1, "written_bytes": 2, "steps": 3, "flop": 4e9, "disk_bytes": 5e12,
         "disk_free_bytes": 6, "memory": "1G"}  # fmt: skip
    lines = rows(f | {"read_bytes_per_second": read, "tokens_per_second": tokens})
    assert lines[1] == f"measured    {says}" and "about 2.0 h" in lines[0] and "5.0 TB" in lines[5]


def test_progress_is_one_line_of_the_whole(perta, folder):
    said = perta(*QUICK, "--progress", "json", check=None).stderr
    points = [json.loads(line) for line in said.splitlines() if line.startswith('{"stage"')]
    shares = [point["share"] for point in points]
    assert shares == sorted(shares) and shares[-1] < 1 and {p["stage"] for p in points} <= {"before", "unlearn", "after"}
    quiet = perta(*QUICK, "--force", "--quiet", check=None)
    assert not quiet.stdout and "note" not in quiet.stderr and "%" not in quiet.stderr


def test_documents(perta, folder):
    """A .txt file of paragraphs, and messages beside it."""
    text = [json.loads(line) for line in (folder / "forget.jsonl").read_text().splitlines()]
    (folder / "forget.txt").write_text("\n\n".join(f"{one['question']} {one['answer']}" for one in text))
    chat = [json.loads(line) for line in (folder / "retain.jsonl").read_text().splitlines()]
    with (folder / "retain.jsonl").open("w") as file:
        for one in chat:
            turns = [("user", one["question"]), ("assistant", one["answer"])]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    words = ["forget.txt" if word == "forget.jsonl" else word for word in FORGET]
    summary = json.loads(perta(*words, "--steps", "2", "--json", check=None).stdout)
    one = summary["sets"]["forget"]
    assert one["samples"] == 16 and one["after"]["probability"] < one["before"]["probability"]
    assert summary["samples"][1]["where"] == "line 3"


def test_names_with_letters_that_an_encoding_lacks(perta, folder):
    """Half of a character in a key, which a note names; and a terminal that has ASCII alone."""
    lines = (folder / "forget.jsonl").read_text().splitlines()
    (folder / "forget.jsonl").write_text("\n".join([lines[0][:-1] + ', "k\\ud800": 1}', *lines[1:]]))
    words = ["ö d" if word == "out" else word for word in QUICK]
    done = perta(*words, env={"PYTHONIOENCODING": "ascii"}, check=None)
    assert "\\xf6 d: summary.md says it" in done.stdout and "are ignored: k?" in done.stderr
    assert json.loads((folder / "ö d/summary.json").read_text())["notes"][0].endswith("are ignored: k\ud800")


@pytest.mark.parametrize("error, status", [("Interrupted()", 130), ("KeyError('x')", 4), ("OSError(28, 'full')", 4)])
def test_errors_have_the_commands_status(error, status):
    """Never 1, which says that the target is not reached."""
    code = f"from perta.children import *; from perta.command import *\ndef main(words): raise {error}\nrun('x', main)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == status and done.stderr.rstrip().endswith(
        {"Interrupted()": "perta x: interrupted", "KeyError('x')": "KeyError: 'x'"}.get(error, "perta x: full")
    )


def test_problems_carry_their_status():
    assert (Problem("x").status, Problem("x", 4).status) == (3, 4)
    assert Path(PERTA).exists()
