"""What a new user meets: --help, man page and documents agree, and mistakes are explained."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import MODEL, PERTA, ROOT, is_sanitized
from llama import shapes_of
from reference import write_folder
from verbs import LLAMA

os.environ["PERTA_PYTHON"] = sys.executable
VERBS = (
    "inspect estimate eval tune accumulate unlearn diff apply revert compose dequantize manifest verify report demo"
).split()
PROGRAMS = ("ask", "forget", "tokenize")  # verbs in Python
MAN = (ROOT / "docs/perta.1").read_text().replace("\\-", "-").replace("\\e\n", "\\\n")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def helps():
    """The output of --help, by verb."""
    if not MODEL:
        pytest.skip("this build has not every verb")
    return {
        verb: subprocess.run(
            [PERTA, verb, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for verb in (*VERBS, *PROGRAMS)
    }


@pytest.mark.skipif(MODEL, reason="this build has matrix products")
def test_a_build_without_matrix_products_says_so():
    def run(*words):
        done = subprocess.run([PERTA, *words], capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        return done.stderr

    for verb in ("estimate", "eval", "tune", "demo"):
        for words in ([], ["--help"]):
            assert run(verb, *words) == f"perta {verb}: this build has no matrix products (oneDNN)\n"
    steps = "--model m --tuned t --base b --data-forget f --data-retain r --patch p --steps 2".split()
    assert "--steps: this build has no matrix products (oneDNN)\n" in run("unlearn", *steps)
    said = subprocess.run([PERTA, "--help"], capture_output=True, text=True, check=True).stdout
    assert said.count("(not in this build)") == 4 and "(this build: without --steps)" in said


def test_a_sanitized_build_is_known_in_any_folder(tmp_path):
    for name in ("build", "build-dev"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "perta").write_bytes(PERTA.read_bytes())
    (tmp_path / "mine").write_bytes(b"\x7fELF...\0__asan_init\0")
    assert is_sanitized(tmp_path / "build/perta") == is_sanitized(tmp_path / "build-dev/perta")
    assert is_sanitized(tmp_path / "mine")


def program(path, text='echo "$0|$PERTA|$*"; exit 5'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_unknown_verbs_are_programs_on_path(tmp_path):
    """Folders of PATH in their order; the arguments as they are; PERTA names this build."""
    first = program(tmp_path / "one/perta-new-verb2")
    program(tmp_path / "two/perta-new-verb2")
    program(tmp_path / "two/perta-diff", "echo never")

    def run(*words, path="one:two"):
        env = os.environ | {"PATH": f"nowhere::{path.replace('one', str(tmp_path / 'one'))}:{os.environ['PATH']}"}
        env["PATH"] = env["PATH"].replace(":two", f":{tmp_path / 'two'}")
        return subprocess.run([PERTA, *words], env=env, cwd=tmp_path, capture_output=True, text=True)

    done = run("new-verb2", "--json", "a b", "")
    assert (done.returncode, done.stdout) == (5, f"{first}|{PERTA}|--json a b \n")
    assert "two/perta-new-verb2" in run("new-verb2", path=":two").stdout
    assert "never" not in run("diff").stdout  # a verb of its own
    listed = run("help").stdout.split("programs of their own")[1].splitlines()[1].split()
    assert "new-verb2" in listed and "diff" not in listed and listed == sorted(set(listed))

    first.write_text("#!/nonexistent\n")
    assert "two/perta-new-verb2" in run("new-verb2").stdout
    (tmp_path / "two/perta-new-verb2").chmod(0o600)
    done = run("new-verb2", path=":two")
    assert done.returncode == 4 and "perta-new-verb2: Permission denied" in done.stderr
    if os.geteuid():
        (tmp_path / "two").chmod(0)  # whether it is there cannot be seen
        assert run("new-verb2", path=":two").returncode == 2
        (tmp_path / "two").chmod(0o700)


def test_programs_beside_the_command_and_installed_ones_are_found(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/perta").write_bytes(PERTA.read_bytes())
    (tmp_path / "bin/perta").chmod(0o755)
    beside, installed = tmp_path / "bin/perta-thing", program(tmp_path / "libexec/perta/perta-thing")
    env = os.environ | {"PATH": "/usr/bin:/bin"}
    command = [tmp_path / "bin/perta", "thing"]

    def run():
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.split("|")

    where = run()
    assert Path(where[0]).resolve() == installed and where[1] == str(tmp_path / "bin/perta")
    program(beside)
    assert run()[0] == str(beside)


@pytest.mark.parametrize("name", ["frobnicate", "../x", "-x", "a/b", "A", "", "x" * 65, "a b"])
def test_unknown_verbs(tmp_path, name):
    program(tmp_path / "x")
    env = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run([PERTA, name], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and "Usage: perta VERB" in done.stderr
    assert (f"perta: unknown verb {name}\n" in done.stderr) is bool(name)
    assert ("no program perta-frobnicate on PATH" in done.stderr) is (name == "frobnicate")


def options_of(text):
    return set(re.findall(r"^ {2,6}(?:-\w, +)?(--[a-z-]+)", text, re.MULTILINE)) - {
        "--help",
        "--usage",
    }


def commands_of(text):
    """Command lines in code blocks, with continued lines joined, split into words."""
    text = text.replace("\\\n", " ")
    for line in re.findall(r"^(?: *(?:\$ )?| +.*&& | {8})(perta [a-z].*)$", text, re.MULTILINE):
        words = shlex.split(line.replace("(`", "").replace("`", ""), comments=True)
        if words[1] in (*VERBS, *PROGRAMS):
            yield words


def test_the_man_page_has_every_option(helps):
    for verb, text in helps.items():
        lacking = {name for name in options_of(text) if not re.search(rf"{name}\b", MAN)}
        assert not lacking, verb


def test_every_option_stands_in_its_column(helps):
    """argp puts padding in the wrong place where its buffer is flushed."""
    for verb in VERBS:
        text = helps[verb]
        for line in text.split("\v")[0].splitlines():
            assert len(line) < 80 and len(re.match(" *", line)[0]) <= 29, (verb, line)
        assert options_of(text), verb


def test_every_command_in_the_documents_is_one(helps):
    texts = {str(page): page.read_text() for page in PAGES}
    texts |= helps | {"perta.1": MAN[MAN.index(".SH EXAMPLES") :]}
    n = 0
    for where, text in texts.items():
        for words in commands_of(text):
            there = options_of(helps[words[1]])
            asked = {word.split("=")[0] for word in words if word.startswith("--")}
            assert asked <= there, (where, words)
            n += 1
    assert n > 40


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(3)
    for name in "model", "tuned", "base", "imp/mean", "imp/meansq", "retain":
        tensors = {"w": rng.standard_normal((9, 9)).astype("f4")}
        metadata = {"perta.stat": name[4:]} if name.startswith("imp/") else None
        write_folder(tmp_path / name, tensors, metadata=metadata)
    write_folder(tmp_path / "models--a--b/snapshots/8a3f", tensors)
    (tmp_path / "models--a--b/blobs").mkdir()
    adapter = tmp_path / "adapters/one"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    weights = {"base_model.model.w.lora_A.weight": np.zeros((2, 9), "f4")}
    safetensors.numpy.save_file(weights, adapter / "adapter_model.safetensors")
    diff = [PERTA, "diff", "model", "tuned", "--patch", "patch"]
    subprocess.run(diff, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/manifest.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text('{"input_ids": [1, 2]}\n')
    llama = {name: np.zeros(shape, "f4") for name, shape in shapes_of(LLAMA).items()}
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, "f4")}
    nan = {"model.layers.1.mlp.up_proj.weight": np.full((64, 32), np.nan, "f4")}
    ones = {name: np.ones_like(tensor) for name, tensor in llama.items()}
    steep = ones | {"model.embed_tokens.weight": llama["model.embed_tokens.weight"]}
    steep["lm_head.weight"] = rng.standard_normal((200, 32)).astype("f4")
    for name, tensors in {
        "llama": llama, "stranger": llama | bias, "nan": ones | nan, "steep": steep
    }.items():
        write_folder(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | {"rms_norm_eps": 1e-38}))
    return tmp_path


EDIT = "unlearn --model model --tuned tuned --base base --forget imp/mean --retain retain --patch p"


@pytest.mark.parametrize(
    "words, status, says",
    [
        (EDIT.split() + ["--memory", "1 "], 2, "1  is not a size"),
        (EDIT.split() + ["--memory", "2 iB"], 2, "2 iB is not a size"),
        (EDIT.split() + ["--exclude", "*"], 2, "leave no tensor to edit"),
        (EDIT.replace("imp/mean", "imp").split(), 3, "--forget: imp: no .safetensors file in this "
         "folder; is imp/mean meant?"),
        (EDIT.replace("imp/mean", "old").split(), 3, "--forget: old: a patch, not a checkpoint"),
        ("unlearn --model model --tuned nothing --method tv --patch p".split(), 3,
         "--tuned: nothing: no such file"),
        ("unlearn --model model --tuned tuned --method tv --patch p".split(), 2,
         "--base is needed, unless"),
        ("estimate --model model --data data.jsonl --out p".split(), 3, "no config.json, which says what"),
        ("estimate --model llama --data nothing --out p".split(), 3, "nothing: no such file"),
        ("estimate --model nan --data data.jsonl --out p".split(), 3, "data.jsonl: line 1: the model"),
        ("estimate --model steep --data data.jsonl --out p --stat meansq".split(), 3,
         "the mean squared gradient over all samples is not a finite float32"),
        ("estimate --model llama --data model --out p".split(), 3, "model: a folder, where JSON"),
        ("estimate --model stranger --data data.jsonl --out p".split(), 3,
         "has tensor model.layers.0.self_attn.q_proj.bias, which its config.json does not"),
        (EDIT.split() + ["--method", "magic"], 2, "magic is not one of grad, fisher, power, tv, "),
        (EDIT.split() + ["--io", "fast"], 2, "--io: fast is not one of auto, direct, mmap, pread"),
        ("accumulate base --out a --stat max".split(), 2, "max is not one of mean, meansq"),
        ("manifest model --format md5".split(), 2, "md5 is not one of perta, xxhsum, sha256sum"),
        ("manifest model tuned".split(), 2, "Too many arguments"),
        ("report --html page".split(), 2, "PATCH is missing: which patch?"),
        ("verify nothing".split(), 3, "nothing: no such file or folder"),
        *[
            (["unlearn", *words.split()], 3, says)
            for words, says in [
                ("--model imp/mean --tuned tuned --base base --method tv --patch p",
                 "--model: imp/mean: an importance (its metadata say perta.stat mean), where a model"),
                ("--model model --tuned imp/meansq --base base --method tv --patch p",
                 "--tuned: imp/meansq: an importance (its metadata say perta.stat meansq)"),
                ("--model model --tuned tuned --base imp/mean --method tv --patch p",
                 "--base: imp/mean: an importance"),
                ("--model llama --tuned llama --base llama --forget llama --retain retain --patch p",
                 "--forget: llama: this is a model (it has a config.json"),
                ("--model model --tuned tuned --base base --forget tuned/model.safetensors --retain "
                 "retain --patch p", "--forget: tuned/model.safetensors: this file is also part of --tuned"),
                ("--model patch --tuned tuned --base base --method tv --patch p",
                 "--model: patch: a patch, not a checkpoint"),
                ("--model model --tuned patch --method tv --patch p",
                 "--tuned: patch: a patch, not a checkpoint"),
                ("--model model --tuned adapters/one/adapter_model.safetensors --method tv --patch p",
                 "--tuned: adapters/one/adapter_model.safetensors: the weights of a PEFT adapter, "
                 "where a model is wanted; as --tuned, give the folder that holds them and "
                 "adapter_config.json: adapters/one"),
                ("--model model --tuned adapters --method tv --patch p",
                 "--tuned: adapters: no .safetensors file in this folder; is adapters/one meant? It "
                 "is a PEFT adapter"),
                ("--model adapters/one --tuned tuned --base base --method tv --patch p",
                 "--model: adapters/one: a PEFT adapter, not a checkpoint"),
                ("--model models--a--b --tuned tuned --base base --method tv --patch p",
                 "below snapshots/: models--a--b/snapshots/8a3f"),
            ]
        ],
        ("eval --model imp/mean --data data.jsonl".split(), 3, "imp/mean: an importance"),
        ("estimate --model imp/mean --data data.jsonl --out p".split(), 3, "imp/mean: an importance"),
        ("apply patch model --out p".split(), 3, "patch folder? It looks like a checkpoint"),
        ("apply model imp/mean --out p".split(), 3, "patch folder? It looks like an importance"),
        ("apply model models--a--b --out p".split(), 3, "It looks like a folder of the Hugging Face"),
        ("report adapters/one --html p".split(), 3, "patch folder? It looks like a PEFT adapter"),
        (EDIT.split()[:-1] + [""], 2, "perta unlearn: --patch: empty, but a name"),
        (EDIT.split()[:-2] + ["--patch="], 2, "perta unlearn: --patch: empty, but a name"),
        (["manifest", ""], 2, "perta manifest: an argument: empty, but a name"),
        ("verify model".split(), 2, "not a patch; to check another folder give --manifest"),
    ],
)
def test_a_mistake_is_explained(perta, folders, words, status, says):
    assert says in perta(*words, check=status).stderr
    assert not list((folders / "p").glob("*"))


@pytest.mark.parametrize(
    "same, says",
    [
        ("--tuned model --base model --method tv", "--tuned and --base are byte-identical: the task"),
        ("--tuned tuned --base base --forget retain --retain retain", "--forget and --retain are byte-identical"),
        ("--tuned tuned --base base --method tv", ""),
    ],
)
def test_inputs_that_are_to_differ_and_do_not_are_noted(perta, folders, same, says):
    said = perta("unlearn", "--model", "model", *same.split(), "--patch", "p").stdout
    assert f"note: {says}" in said if says else " byte-identical" not in said


def test_what_was_found_stands_before_what_it_comes_to(folders, perta):
    perta("diff", "model", "tuned", "--patch", "p")
    result = subprocess.run(
        [PERTA, "verify", "base", "--patch", "p", "--applied"],
        cwd=folders,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "perta verify: base: 1 differences from the patch p"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "inspect --help", "unlearn --usage", "inspect model", "manifest model",
     "inspect model --json --tensors", "manifest model --format sha256sum", "verify patch",
     "verify patch --json", "verify model --patch patch --original --json",
     "diff model tuned --patch new", "report patch --html new",
     "eval --model steep --data data.jsonl --json"],
)
def test_what_cannot_be_printed_is_an_error(folders, words, closed):
    if not MODEL and "eval" in words:
        pytest.skip("this build has no matrix products")
    into = ">&-" if closed else ">/dev/full"
    command = f'exec "{PERTA}" {words} {into}'
    done = subprocess.run(["sh", "-c", command], cwd=folders, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("standard output: ") == 1


def test_what_differs_is_said_even_if_it_cannot_be_printed(folders):
    command = f'"{PERTA}" verify base --patch patch --applied >/dev/full'
    done = subprocess.run(["sh", "-c", command], cwd=folders, capture_output=True, text=True)
    assert done.returncode == 1
    assert "standard output: " in done.stderr and "differences from the patch" in done.stderr


def test_a_closed_stream_is_no_output_file(folders):
    """Otherwise the first file that is opened would get its number."""
    command = f'"{PERTA}" diff model tuned --patch new <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], cwd=folders).returncode == 4
    one, other = (json.loads((folders / p / "manifest.json").read_text()) for p in ("new", "patch"))
    assert one == other


def test_inspect_clips_what_others_wrote(perta, folders):
    metadata = {"workflow": "y" * 100000, "k" * 5000: "v", "seq": "\x1b[2J\x9b", "long": "x" + "é" * 90}
    safetensors.numpy.save_file({"x": np.zeros(2, "f4")}, folders / "meta.safetensors", metadata)
    said = perta("inspect", "meta.safetensors").stdout
    assert len(said) < 1000 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
    assert f"workflow={'y' * 80}... (100000 bytes)" in said and "long=x" in said
    whole = json.loads(perta("inspect", "meta.safetensors", "--json").stdout)
    assert whole["shards"][0]["metadata"] == metadata
    (folders / "adapters/one/adapter_config.json").write_text(json.dumps({"note": "z" * 100000}))
    assert len(perta("inspect", "adapters/one").stdout) < 1000


def test_json_on_a_terminal_is_ascii(folders):
    safetensors.numpy.save_file({"x\x9b\x7f": np.zeros(2, "f4")}, folders / "odd.safetensors")
    main, side = pty.openpty()
    subprocess.run([PERTA, "inspect", "--json", "odd.safetensors"], cwd=folders, stdout=side, check=True)
    said = os.read(main, 1 << 16).decode()
    os.close(main)
    os.close(side)
    assert json.loads(said)["tensors"][0]["name"] == "x\x9b\x7f"
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", said)
