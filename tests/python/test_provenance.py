"""docs/provenance.md, command by command: signatures, keyed digests of data, statements."""

import hashlib
import hmac
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from llama import write_llama
from reference import write_folder
from safetensors import safe_open
from verbs import EAGER, FAULTY, run, started_long_ago

SIDES = ["model", "tuned", "base", "forget", "retain"]
MODEL_SIGNING = Path(sys.executable).parent / "model_signing"
DOCS = Path(__file__).parents[2] / "docs/provenance.md"


@pytest.fixture
def sides(tmp_path):
    rng = np.random.default_rng(11)
    for role in SIDES:
        write_folder(tmp_path / role, {f"t{i}": rng.normal(size=(9, i + 2)).astype("f4") for i in range(4)}, shards=2)
    return tmp_path


def unlearn(perta, *more, patch="forget.patch"):
    perta("unlearn", *(f"--{role}={role}" for role in SIDES), "--patch", patch, *more)


def shell(script, cwd, check=True):
    run = subprocess.run(["sh", "-euc", script], cwd=cwd, capture_output=True, text=True)
    assert not check or run.returncode == 0, run.stderr
    return run


@pytest.mark.skipif(not shutil.which("minisign"), reason="no minisign on this machine")
def test_minisign_signs_the_record(perta, sides):
    unlearn(perta)
    shell("minisign -G -W -p minisign.pub -s minisign.key", sides)
    shell("minisign -S -s minisign.key -m forget.patch/manifest.json -x forget.minisig", sides)
    check = "minisign -V -p minisign.pub -m forget.patch/manifest.json -x forget.minisig"
    shell(check, sides)
    perta("verify", "forget.patch")
    record = sides / "forget.patch/manifest.json"
    record.write_text(record.read_text().replace('"alpha": "1"', '"alpha": "2"'))
    assert shell(check, sides, check=False).returncode != 0


@pytest.mark.skipif(not shutil.which("jq"), reason="no jq on this machine")
def test_the_record_has_the_sums_of_the_model_after(perta, sides):
    unlearn(perta, "--out", "forgotten")
    commands = [line for line in DOCS.read_text().splitlines() if "forgotten.sums" in line]
    assert len(commands) == 2
    shell("\n".join(commands), sides)
    path = max((sides / "forgotten").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert path.name in shell("\n".join(commands), sides, check=False).stdout


@pytest.mark.skipif(not MODEL_SIGNING.exists(), reason="no model-signing in this Python environment")
def test_model_signing_signs_the_folder(perta, sides):
    unlearn(perta)
    shell("openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out key.pub", sides)
    shell(f"{MODEL_SIGNING} sign key forget.patch --private_key key.pem --signature forget.sig", sides)
    check = f"{MODEL_SIGNING} verify key forget.patch --public_key key.pub --signature forget.sig"
    shell(check, sides)
    path = next((sides / "forget.patch").glob("*.perta"))
    path.write_bytes(path.read_bytes() + b"\0")
    assert shell(check, sides, check=False).returncode != 0


# --- data


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    write_llama(tmp_path / "base", CONFIG)
    for name, ids in (("forget", [3, 1, 4, 1, 5]), ("retain", [2, 7, 1, 8])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    (tmp_path / "data.key").write_bytes(bytes(range(200, 232)))
    return tmp_path


def test_a_record_says_which_data_to_who_has_the_key_and_to_nobody_else(perta, texts):
    for name in ("forget", "retain"):
        perta("estimate", "--model", "base", "--data", f"{name}.jsonl", "--data-key", "data.key", "--out", f"imp/{name}")
    shutil.copytree(texts / "base", texts / "tuned")
    model = ["--model", "base", "--base", "base", "--tuned", "tuned"]
    perta("unlearn", *model, "--forget", "imp/forget/mean", "--retain", "imp/retain/mean", "--patch", "forget.patch")
    recipe = json.loads((texts / "forget.patch/manifest.json").read_text())["recipe"]
    for name, tokens in (("forget", 5), ("retain", 4)):
        data = (texts / f"{name}.jsonl").read_bytes()
        want = hmac.new(bytes(range(200, 232)), data, "sha256").hexdigest()
        command = "openssl dgst -sha256 -mac HMAC -macopt hexkey:$(od -An -v -tx1 data.key | tr -d ' \\n') "
        assert shell(command + f"{name}.jsonl", texts).stdout.split()[-1] == want
        with safe_open(texts / f"imp/{name}/mean/model.safetensors", "np") as file:
            assert file.metadata()["perta.data_hmac_sha256"] == want
        assert recipe[f"{name}_data_hmac_sha256"] == want
        assert recipe[f"{name}_samples"] == "1" and recipe[f"{name}_tokens"] == f"{tokens}"
    plain = {digest(data).hexdigest() for digest in (hashlib.sha256, hashlib.md5) for data in [
        (texts / "forget.jsonl").read_bytes(), b"[3, 1, 4, 1, 5]"]}  # fmt: skip
    for path in [*(texts / "forget.patch").rglob("*"), *(texts / "imp").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert bytes(range(200, 232)) not in content and not any(p.encode() in content for p in plain)


def test_without_a_key_there_are_counts_alone(perta, texts):
    perta("estimate", "--model", "base", "--data", "forget.jsonl", "--out", "imp")
    with safe_open(texts / "imp/mean/model.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "perta.stat": "mean", "perta.samples": "1", "perta.tokens": "5"}


def test_a_key_that_is_none_is_refused(perta, texts):
    command = ["estimate", "--model", "base", "--data", "forget.jsonl", "--out", "imp", "--data-key"]
    (texts / "short").write_text("secret\n")
    assert "short: a key has 16 to 4096 bytes" in perta(*command, "short", check=3).stderr
    (texts / "long").write_bytes(os.urandom(4097))
    assert "a key has 16 to 4096 bytes" in perta(*command, "long", check=3).stderr
    assert "nowhere: No such file" in perta(*command, "nowhere", check=4).stderr
    assert not (texts / "imp").exists()


# --- statements


def test_a_statement_is_in_toto_with_slsa_provenance(perta, sides):
    start = datetime.now(timezone.utc).replace(microsecond=0)
    unlearn(perta, "--statement", "--out", "forgotten")
    manifest = json.loads((sides / "forget.patch/manifest.json").read_text())
    text = (sides / "forget.patch.intoto.json").read_text()
    statement = json.loads(text)
    assert text == json.dumps(statement, sort_keys=True, indent=1, separators=(",", ": "), ensure_ascii=False)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement.keys() == {"_type", "subject", "predicateType", "predicate"}
    subjects = {s["name"]: s["digest"]["sha256"] for s in statement["subject"]}
    files = {f"forget.patch/{p.name}": p for p in (sides / "forget.patch").iterdir()}
    files |= {f"model/{p.name}": p for p in (sides / "forgotten").glob("*.safetensors")}
    assert subjects == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    definition = statement["predicate"]["buildDefinition"]
    assert definition["buildType"] == "https://perta.invalid/provenance/v1"
    assert definition["externalParameters"] == manifest["recipe"]
    inputs = {f"{role}/{s['name']}": s["xxh3_128"] for role in SIDES for s in manifest["inputs"][role]["shards"]}
    assert {d["name"]: d["digest"]["xxh3_128"] for d in definition["resolvedDependencies"]} == inputs
    details = statement["predicate"]["runDetails"]
    assert details["builder"]["id"].startswith("https://")
    assert {"perta", "compiler", "cpu", "instruction_set", "io"} == details["builder"]["version"].keys()
    started, finished = (datetime.fromisoformat(details["metadata"][key]) for key in ("startedOn", "finishedOn"))
    assert start <= finished <= datetime.now(timezone.utc) and started <= finished


@pytest.mark.parametrize("fault", ["fail=sync:12:5", "fail=rename:1:5"])  # midway; at the rename
def test_a_run_that_goes_on_started_when_it_first_did(sides, fault):
    command = [f"--{role}={role}" for role in SIDES] + ["--patch", "p", "--statement"]
    env = EAGER | {"PERTA_FAULTS": fault}
    run(sides, "unlearn", *command, env=env, perta=FAULTY, status=4)
    started_long_ago(sides / "p.perta-journal")
    start = datetime.now(timezone.utc).replace(microsecond=0)
    run(sides, "unlearn", *command, "--resume")
    statement = json.loads((sides / "p.intoto.json").read_text())
    times = statement["predicate"]["runDetails"]["metadata"]
    assert datetime.fromisoformat(times["startedOn"]).timestamp() == 1000
    assert datetime.fromisoformat(times["finishedOn"]) >= start


def test_a_statement_for_every_alpha_and_verb(perta, sides):
    unlearn(perta, "--statement", "--alpha", "1,2", patch="p")
    names = [json.loads(path.read_text())["subject"][0]["name"] for path in sorted(sides.glob("p/*.intoto.json"))]
    assert names == ["alpha-1/manifest.json", "alpha-2/manifest.json"]
    perta("diff", "model", "tuned", "--patch", "d1", "--statement")
    perta("diff", "tuned", "base", "--patch", "d2")
    perta("compose", "d1", "d2", "--model", "model", "--patch", "d", "--statement")
    assert (sides / "d1.intoto.json").exists() and (sides / "d.intoto.json").exists()
    assert not (sides / "d2.intoto.json").exists()
    perta("unlearn", *(f"--{role}={role}" for role in SIDES), "--patch", "dry", "--statement", "--dry-run")
    assert not list(sides.glob("dry*"))


