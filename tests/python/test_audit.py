"""`perta audit`: what comes back, of models of which it is known what they know."""

import copy
import hashlib
import hmac
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import HANGS, PERTA, ROOT
from test_resume import contents

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path += [str(ROOT / "examples"), str(ROOT / "python")]
from made_up_facts import make_facts, make_tokenizer
from perta.audit_sets import Lines, measures, taught
from perta.audit_statement import statement
from perta.audit_verdict import Verdict, verdict_of
from tiny_llama import encode, new_model, save_model, teach

os.environ["PERTA_PYTHON"] = sys.executable


def losses(model, tokenizer, facts):
    """The mean cross-entropy of each answer, as `perta eval` has it."""
    data = encode(tokenizer, facts)
    logits = model(data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), data["labels"][:, 1:], reduction="none")
    return each.sum(1) / 2


def hide(model, tokenizer, facts, level):
    """Change the last layer alone until the answers are as improbable as that, and the rest is
    kept."""
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1." in name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    while True:
        forget = losses(model, tokenizer, facts.forget)
        if torch.exp(-forget).mean() <= level:
            return
        optimizer.zero_grad()
        (2 * losses(model, tokenizer, facts.retain).mean() - forget.clamp(max=6).mean()).backward()
        optimizer.step()


def data_of(tokenizer, facts):
    lines = []
    for fact in facts:
        ids = tokenizer(f"{fact.question} {fact.answer} {tokenizer.eos_token}")["input_ids"]
        lines.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small Llama that knows made-up people; gold, which never saw some of them; the patch to it,
    and one that only hides them in the last layer."""
    folder = tmp_path_factory.mktemp("audit")
    facts = make_facts(7, 8, 8, 20, 4)
    tokenizer = make_tokenizer(facts.words)
    model = new_model(tokenizer, 7)
    teach(model, tokenizer, facts.general + facts.retain, steps=60, seed=7)
    gold = copy.deepcopy(model)
    teach(gold, tokenizer, facts.general + facts.retain, steps=60, seed=8)
    teach(model, tokenizer, facts.general + facts.retain + facts.forget, steps=60, seed=8)
    save_model(model, tokenizer, folder / "full")
    save_model(gold, tokenizer, folder / "gold")
    with torch.no_grad():
        level = torch.exp(-losses(gold, tokenizer, facts.forget)).mean().item()
    hide(model, tokenizer, facts, level)
    save_model(model, tokenizer, folder / "hidden")
    for name in ("gold", "hidden"):
        subprocess.run([PERTA, "diff", "full", name, "--patch", f"to-{name}"], cwd=folder, check=True, capture_output=True)
    for name in ("forget", "retain", "held_out"):
        (folder / f"{name}.jsonl").write_text(data_of(tokenizer, getattr(facts, name)))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    for name in ("full", "gold", "to-gold", "to-hidden"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("forget.jsonl", "retain.jsonl", "held_out.jsonl"):
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


AUDIT = "audit --model full --data-forget forget.jsonl --data-retain retain.jsonl --threads 1".split()
WITH_GOLD = [*AUDIT, "--gold", "gold", "--out", "out"]
QUICK = [*WITH_GOLD, "--patch", "to-gold", "--ranks", "4", "--rates", "1e-3", "--updates", "2,3", "--formats", "none"]


def results(found):
    return {check["name"]: check["result"] for check in found["checks"]}


PUBLIC = ("audit.json", "audit.html", "audit.intoto.json")


def public(folder):
    """The files that hold no times."""
    return {name: (folder / "out" / name).read_bytes() for name in PUBLIC}


def found_in(folder):
    return json.loads((folder / "out/audit.json").read_text())


# ---- what it finds


def test_gold_passes_and_a_shallow_edit_fails(perta, folder):
    """Both are at gold's level as they are."""
    attacks = ["--ranks", "8,32", "--rates", "3e-3", "--updates", "8,32", "--holdout", "held_out.jsonl"]
    before = contents(folder / "full")
    well = json.loads(perta(*WITH_GOLD, "--patch", "to-gold", *attacks, "--json").stdout)
    assert found_in(folder) == well and contents(folder / "full") == before
    assert well["verdict"] == "did not come back under what was tried" and not well["came_back"]
    judged = results(well)
    assert set(judged.values()) <= {"pass", "not judged"}
    hidden = perta(*WITH_GOLD, "--patch", "to-hidden", *attacks, "--force", check=1)
    bad = found_in(folder)
    assert bad["verdict"] == "came back" and len(bad["came_back"]) >= 2
    judged = results(bad)
    assert judged["as it is"] == "pass"
    for rank in (8, 32):
        check = next(one for one in bad["checks"] if one["name"] == f"re-taught: forget, rank {rank}, rate 0.003")
        assert check["result"] == "fail" and check["value"] > 2 * check["compared_with"]
    assert "What was to be forgotten came back." in hidden.stdout and "Not tried:" in hidden.stdout
    assert " safe" not in json.dumps(bad) + (folder / "out/audit.html").read_text().partition("<main>")[0]


def asked(perta, *words):
    return json.loads(perta("eval", *words, "--threads", "1", "--per-sample", "--json").stdout)


def test_numbers_are_those_of_the_verbs(perta, folder):
    """Also where some lines have other answers."""
    lines = [json.loads(line) for line in (folder / "forget.jsonl").read_text().splitlines()]
    for i in range(0, 8, 2):
        lines[i] |= {"perturbed": lines[20:22], "paraphrased": lines[i + 1]}
    (folder / "forget.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    perta(*QUICK, "--patch", "to-hidden", "--seed", "3", check=None)
    found = found_in(folder)
    assert "paraphrased answers" in results(found)
    other = [torch.exp(-torch.tensor(one["paraphrased_loss"])).item()
             for one in asked(perta, "--model", "gold", "--data", "forget.jsonl")["per_sample"] if "paraphrased_loss" in one]  # fmt: skip
    have = found["as_it_is"]["gold"]["forget"]["paraphrased_probability"]
    assert len(other) == 4 and have == pytest.approx(sum(other) / 4, rel=1e-5)
    for whose, words in (("before", []), ("after", ["--patch", "to-hidden"])):
        for name in ("forget", "retain"):
            want = asked(perta, "--model", "full", *words, "--data", f"{name}.jsonl")
            have = found["as_it_is"][whose][name]
            own = {"samples", "paraphrased_probability", "paraphrased_loss"}
            for key in set(have) - own:
                assert have[key] == pytest.approx(want[key], rel=1e-12), key
            assert {"probability", "loss", "extraction_strength", "min_k", "exact_memorization"} <= set(have)
            assert ("truth_ratio_forget" in have) == (name == "forget")
    lines = (folder / "forget.jsonl").read_text().splitlines()
    taught_lines = found["taught_lines"]
    assert len(taught_lines) == 8 and len(lines) == 32
    (folder / "t.jsonl").write_text("".join(lines[i - 1] + "\n" for i in taught_lines))
    for whose, words in (("after", ["--model", "full", "--patch", "to-hidden"]), ("gold", ["--model", "gold"])):
        curve = found["retaught"][0][whose]
        perta("tune", *words, *"--data t.jsonl --out a --target-modules all-linear --rank 4 --lora-alpha 4 --steps 3".split(),
              *"--batch-size 8 --learning-rate 1e-3 --lr-scheduler constant --force".split())  # fmt: skip
        for at, adapter in ((0, []), (2, ["--adapter", "a"])):
            each = asked(perta, *words, *adapter, "--data", "forget.jsonl")["per_sample"]
            rest = [one["probability"] for one in each if one["line"] not in taught_lines]
            assert curve["rest"][at] == pytest.approx(sum(rest) / 24, rel=1e-12)
        assert len(curve["rest"]) == 3 and curve["taught"][2] > curve["taught"][0]


def test_every_way_to_run_it_gives_the_same_audit(perta, folder):
    perta(*QUICK, "--statement")
    want = public(folder)
    perta(*QUICK, "--statement", "--threads", "3", "--memory", "300M", "--io", "pread", "--force", "--progress", "json")
    assert public(folder) == want


def test_rounded_weights_are_asked(perta, folder):
    perta(*QUICK, "--formats", "int4,nf4", "--share", "0")
    found = found_in(folder)
    for form in ("int4", "nf4"):
        for whose, words in (("after", "--model full --patch to-gold"), ("gold", "--model gold")):
            want = asked(perta, *words.split(), "--quantize", form, "--data", "forget.jsonl")["probability"]
            assert found["rounded"][form][whose]["probability"] == pytest.approx(want, rel=1e-12)
        assert results(found)[f"rounded to {form}"] == "pass"
    assert found["rounded"]["int4"] != found["rounded"]["nf4"]
    assert found["not_tried"][1] == "Re-teaching." and not found["retaught"]


def test_related_text_and_other_words(perta, folder):
    """The people's own facts in other words bring back what was hidden; gold has nothing to find."""
    lines = (folder / "forget.jsonl").read_text().splitlines()
    (folder / "related.jsonl").write_text("\n".join(lines[:8]) + "\n\n")
    (folder / "forget.jsonl").write_text("\n".join(lines[8:]) + "\n")
    (folder / "words.jsonl").write_text("\n".join(lines[:4]) + "\n")
    words = [*QUICK, "--patch", "to-hidden", "--share", "0", "--data-related", "related.jsonl", "--rates", "3e-3",
             "--updates", "16", "--data-paraphrased", "words.jsonl"]  # fmt: skip
    perta(*words, check=1)
    found = found_in(folder)
    assert results(found)["re-taught: related, rank 4, rate 0.003"] == "fail"
    assert found["as_it_is"]["gold"]["paraphrased"]["samples"] == 4 and "asked otherwise" in results(found)
    assert found["sets"]["related"]["samples"] == 8 and not found["taught_lines"]
    assert "taught" not in found["retaught"][0]["after"]
    assert any(line.startswith("8 samples of related text were taught") for line in found["tried"])


def test_a_target_in_place_of_a_model(perta, folder):
    words = [word for word in QUICK if word not in ("--gold", "gold")]
    perta(*words, "--target", "0.3")
    found = found_in(folder)
    assert results(found)["extraction strength"] == "not judged" and set(found["as_it_is"]) == {"before", "after"}
    assert found["checks"][0]["bound"] == pytest.approx(0.36)
    assert found["checks"][2]["criterion"] == "probability at most 1.5 × the target"
    assert any("there is no model to compare with" in line for line in found["not_tried"])
    perta(*words, "--target", "0.001", "--force", check=1)
    assert results(found_in(folder))["as it is"] == "fail"
    perta(*words, "--base", "gold", "--force")
    assert found_in(folder)["checks"][0]["criterion"] == "probability at most 1.2 × base's"


# ---- what it writes


def test_the_statement_names_what_was_tested(perta, folder):
    (folder / "key").write_bytes(b"k" * 32)
    perta(*QUICK, "--statement", "--data-key", "key")
    text = (folder / "out/audit.intoto.json").read_text()
    whole = json.loads(text)
    assert text == json.dumps(whole, sort_keys=True, separators=(",", ":"))
    assert whole["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    files = {"audit.json": folder / "out/audit.json", "to-gold/manifest.json": folder / "to-gold/manifest.json"}
    assert whole["subject"] == [
        {"name": name, "digest": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}} for name, path in files.items()
    ]
    judged = results(found_in(folder))
    predicate = whole["predicate"]
    assert predicate["result"] == "PASSED" and predicate["failedTests"] == predicate["warnedTests"] == []
    assert predicate["passedTests"] == [name for name, result in judged.items() if result == "pass"]
    want = hmac.new(b"k" * 32, (folder / "forget.jsonl").read_bytes(), "sha256").hexdigest()
    assert found_in(folder)["sets"]["forget"]["hmac_sha256"] == want
    perta(*QUICK, "--statement", "--patch", "to-hidden", "--force", "--target", "0.001", check=2)


def test_a_patch_has_its_name_from_wherever_it_is_given(tmp_path, monkeypatch):
    found = {"patch": {"path": ".", "manifest_sha256": "0" * 64}, "checks": []}
    (tmp_path / "forgotten").mkdir()
    monkeypatch.chdir(tmp_path / "forgotten")
    assert json.loads(statement(found, b""))["subject"][1]["name"] == "forgotten/manifest.json"


def test_outside_data_there_is_no_text(perta, folder):
    perta(*QUICK, "--statement")
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {*PUBLIC, "data"}
    ids = json.dumps(json.loads((folder / "forget.jsonl").read_text().splitlines()[0])["input_ids"])
    for name in PUBLIC:
        text = (out / name).read_text()
        assert "input_ids" not in text and ids[1:-1] not in text and ids[1:-1].replace(" ", "") not in text
    assert (out / "data").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (out / "data").iterdir())
    assert not list((out / "data").glob("adapter*"))
    page = (out / "audit.html").read_text()
    assert "<title>perta report</title>" in page and json.dumps(found_in(folder)["verdict"]) in page


NODE = shutil.which("node")
DRAW = """
const html = require('fs').readFileSync(process.argv[1], 'utf8');
class Node_ {
  constructor(name) { Object.assign(this, { name, given: {}, all: [] }); }
  get children() { return this.all.filter(child => child instanceof Node_); }
  get firstChild() { return this.all[0]; }
  setAttribute(key, value) { this.given[key] = String(value); }
  append(...some) { this.all.push(...some); }
  appendChild(one) { this.all.push(one); return one; }
  replaceChildren(...some) { this.all = some; }
  click() { this.onclick(); }
  get text() { return (this.given.d || '') + this.all.map(x => x instanceof Node_ ? x.text : x).join(' ') + '\\n'; }
}
const main = new Node_('main');
global.window = {};
global.document = {
  getElementById: id => ({ textContent: html.split(`id="${id}">`)[1].split('</script>')[0] }),
  querySelector: () => main, createElement: name => new Node_(name), createElementNS: (_, name) => new Node_(name),
};
new Function(html.split('<script>')[1].split('</script>')[0])();
console.log(main.text);
"""


@pytest.mark.skipif(not NODE, reason="no Node.js on this machine")
def test_the_page_draws_it(perta, folder):
    perta(*QUICK, "--patch", "to-hidden", "--updates", "16", check=None)
    drawn = subprocess.run([NODE, "-e", DRAW, folder / "out/audit.html"], check=True, capture_output=True, text=True).stdout
    found = found_in(folder)
    assert "Audit: does it come back?" in drawn and "NaN" not in drawn and "undefined" not in drawn
    for line in found["tried"] + found["not_tried"] + found["came_back"]:
        assert line in drawn
    rest = ", ".join(f"{value:.3f}" for value in found["retaught"][0]["gold"]["rest"])
    assert f"gold, which never saw it: {rest}" in drawn
    plain = perta("report", "to-hidden", "--html", "page.html")
    drawn = subprocess.run([NODE, "-e", DRAW, folder / "page.html"], check=True, capture_output=True, text=True).stdout
    assert "Audit" not in drawn and "Digests" in drawn and plain.returncode == 0


# ---- interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("at", ["data/answers-after.json", "data/adapter-after-forget-r4-0.001-100.jsonl"])
def test_an_interrupted_run_goes_on(perta, folder, number, at):
    words = [*QUICK, "--statement", "--updates", "2,100"]
    perta(*words)
    want = public(folder)
    shutil.rmtree(folder / "out")
    run = subprocess.Popen([PERTA, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial, end = folder / "out.perta-partial", time.monotonic() + HANGS
    while not (partial / at).exists():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=HANGS)
    assert run.returncode == (130 if number == signal.SIGINT else -9), stderr
    assert not (folder / "out").exists() and partial.exists()
    if number == signal.SIGINT:
        assert f"to resume: perta {' '.join(words)} --resume\n" in stderr
    assert "--resume continues that run" in perta(*words, check=2).stderr
    assert "cannot continue: seed changed" in perta(*words, "--seed", "4", "--resume", check=2).stderr
    while "another process" in (again := perta(*words, "--resume", check=None)).stderr and time.monotonic() < end:
        time.sleep(0.1)
    assert again.returncode == 0, again.stderr
    assert public(folder) == want
    assert not list(folder.glob("*perta*"))


def test_what_changes_during_the_audit_is_refused(perta, folder):
    words = [*QUICK, "--updates", "100"]
    run = subprocess.Popen([PERTA, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + HANGS
    while not (folder / "out.perta-partial/data/answers-after.json").exists():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    with (folder / "retain.jsonl").open("a") as file:
        file.write('{"input_ids": [1, 2, 3]}\n')
    _, stderr = run.communicate(timeout=HANGS)
    assert run.returncode == 3 and "data_retain changed while it was tested" in stderr
    assert not (folder / "out").exists()


NEXT = """
import sys
from perta.audit import Audit, parse
class Next(Audit):
    def train(self, part, t):
        print(part.name, *(path.name for path in self.folder.data("").glob("adapter-*")))
        sys.exit()
Next(parse(sys.argv[1:]), sys.argv[1:]).run()
"""


def test_a_training_goes_on_where_it_was(perta, folder):
    """What was taught is removed with its own answers, and not with those of parts before."""
    words = [*QUICK, "--updates", "1,100"]
    journal = folder / "out.perta-partial/data/adapter-after-forget-r4-0.001-100.perta-journal"
    env = os.environ | {"PERTA_COMMIT_SECONDS": "0"}
    run = subprocess.Popen([PERTA, *words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + HANGS
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=HANGS) and run.returncode == 130
    env = os.environ | {"PYTHONPATH": str(ROOT / "python"), "PERTA": str(PERTA)}
    done = subprocess.run([sys.executable, "-c", NEXT, *words[1:], "--resume"], cwd=folder, env=env, check=True,
                          capture_output=True, text=True, timeout=HANGS)  # fmt: skip
    said = done.stdout.splitlines()[-1].split()
    assert said[0] == "after-forget-r4-0.001-100" and journal.name in said[1:]
    perta(*words, "--resume")
    assert not list((folder / "out/data").glob("adapter*"))


def test_force_replaces_only_what_it_wrote(perta, folder):
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("the only copy")
    assert "exists; --force replaces it" in perta(*QUICK, check=2).stderr
    assert "more than perta audit wrote: thesis.txt" in perta(*QUICK, "--force", check=2).stderr
    (folder / "out/thesis.txt").unlink()
    perta(*QUICK, "--force")
    (folder / "out/data/mine.json").write_text("{}")
    assert "more than perta audit wrote: data/mine.json" in perta(*QUICK, "--force", check=2).stderr
    (folder / "out/data/mine.json").unlink()
    perta(*QUICK, "--force")
    assert not list(folder.glob("*perta*"))


# ---- refused


def test_dry_run_writes_nothing(perta, folder, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    before = sorted(folder.rglob("*"))
    said = perta(*QUICK, "--dry-run", env={"TMPDIR": str(scratch)}).stdout
    for word in ("time", "reads", "FLOP", "memory", "trains      10 updates", "asks        7 times"):
        assert word in said
    figures = json.loads(perta(*QUICK, "--dry-run", "--json").stdout)
    assert (figures["asked"], figures["trainings"], figures["updates"]) == (7, 4, 10) and figures["seconds"] > 0
    assert sorted(folder.rglob("*")) == before and not list(scratch.iterdir())


def line_twice(folder):
    line = (folder / "forget.jsonl").read_text().splitlines()[2]
    with (folder / "retain.jsonl").open("a") as file:
        file.write(line + "\n")


@pytest.mark.parametrize(
    "change, status, says",
    [
        (lambda f: (f / "forget.jsonl").write_text("\n"), 3, "forget.jsonl: no samples"),
        (lambda f: (f / "forget.jsonl").unlink(), 3, "forget.jsonl: no such file"),
        (lambda f: (f / "forget.jsonl").write_text('{"question": "a", "answer": "b"}\n'), 3, "line 1: no list \"input_ids\""),
        (lambda f: (f / "retain.jsonl").write_text('{"input_ids": [1, 2]}\n\n{"input_ids": 3}\n'), 3, "retain.jsonl: line 3"),
        (lambda f: (f / "retain.jsonl").write_text('{"input_ids": [1, 99999]}\n'), 3, "retain.jsonl: line 1"),
        (lambda f: (f / "retain.jsonl").write_text("{"), 3, "retain.jsonl: line 1: "),
        (line_twice, 3, "forget.jsonl: line 3, and retain.jsonl: line 81"),
        (lambda f: shutil.rmtree(f / "gold"), 3, "gold: no such folder"),
        (lambda f: (f / "to-gold/manifest.json").unlink(), 3, "to-gold: not the folder of a patch"),
        (lambda f: shutil.rmtree(f / "full"), 3, "full: no such folder"),
        (lambda f: swapped(f), 3, "perta eval failed"),
    ],
)  # fmt: skip
def test_bad_input_is_explained_and_nothing_is_left(perta, folder, change, status, says):
    change(folder)
    before = sorted(folder.iterdir())
    assert says in perta(*QUICK, check=status).stderr
    assert sorted(folder.iterdir()) == before


def swapped(folder):
    """The patch is for another model."""
    shutil.rmtree(folder / "full")
    shutil.copytree(folder / "gold", folder / "full")


@pytest.mark.parametrize(
    "words",
    [["--target", "0.1"], ["--base", "full"], ["--formats", "int3"], ["--ranks", "0"], ["--rates", "x"], ["--rates", "2"],
     ["--updates", "0"], ["--updates", ""], ["--share", "1"], ["--out", "full/x"], ["--out", "to-gold/x"], ["--nothing"],
     ["--seed", "x"], ["--data-related", ""]],
)  # fmt: skip
def test_wrong_arguments(perta, folder, words):
    before = sorted(folder.iterdir())
    assert perta(*QUICK, *words, check=2).stderr
    assert sorted(folder.iterdir()) == before


def test_what_was_shown_is_not_held_out(perta, folder):
    line = (folder / "retain.jsonl").read_text().splitlines()[4]
    with (folder / "held_out.jsonl").open("a") as file:
        file.write(line + "\n")
    said = perta(*QUICK, "--holdout", "held_out.jsonl", check=3).stderr
    assert "in --data-retain and held out: retain.jsonl: line 5, and held_out.jsonl: line " in said


def test_something_to_compare_with_is_needed(perta, folder):
    words = [word for word in QUICK if word not in ("--gold", "gold")]
    assert "one of --gold, --base and --target is needed" in perta(*words, check=2).stderr
    (folder / "key").write_text("short")
    assert "at least 16 bytes" in perta(*QUICK, "--data-key", "key", check=3).stderr


def test_nothing_comes_back_where_nothing_was(perta, folder):
    """Such an audit would pass whatever the patch does."""
    shutil.copytree(folder / "full", folder / "twin")
    before = sorted(folder.iterdir())
    without = [word for word in QUICK if word not in ("--gold", "gold")]
    for words in (["--gold", "twin"], ["--base", "twin"], ["--target", "0.99"]):
        said = perta(*without, *words, check=3).stderr
        assert "forget.jsonl: full gives its answers a probability of " in said and "to resume" not in said
        assert sorted(folder.iterdir()) == before


def test_rates_that_are_nearly_equal_are_two(perta, folder):
    perta(*QUICK, "--rates", "1e-3,1.00000001e-3", "--updates", "2")
    assert [attack["updates"] for attack in found_in(folder)["retaught"]] == [[0, 2], [0, 2]]


def test_one_sample_cannot_be_taught_in_part(perta, folder):
    line = (folder / "forget.jsonl").read_text().splitlines()[0] + "\n"
    (folder / "forget.jsonl").write_text(line * 3)
    assert "no part of it can be taught again" in perta(*QUICK).stderr
    assert found_in(folder)["retaught"] == [] and found_in(folder)["notes"]


def test_it_needs_no_package(perta, folder):
    """Neither for models nor for text: the data are token ids."""
    absent = "numpy torch transformers tokenizers jinja2 safetensors scipy".split()
    code = (f"import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.argv = ['perta-audit', *{QUICK[1:]!r}]\n"
            "from perta.audit import main; main()")  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT / "python"), "PERTA": str(PERTA)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr


# ---- the parts


def lines_of(values):
    return Lines(None, [{"input_ids": list(value)} for value in values], list(range(1, len(values) + 1)))


def test_what_is_taught():
    lines = lines_of([(i, i + 1) for i in range(20)] + [(3, 4)])
    for seed in range(50):
        chosen = taught(lines, 0.25, seed)
        assert 0 < len(chosen) <= 5 and (3 in chosen) == (20 in chosen) and chosen == sorted(set(chosen))
    assert len({tuple(taught(lines, 0.25, seed)) for seed in range(50)}) > 30
    assert taught(lines, 0, 1) == [] == taught(lines_of([(1, 2)] * 4), 0.25, 1)
    assert len(taught(lines_of([(1, 2), (2, 3)]), 0.01, 1)) == len(taught(lines_of([(1, 2), (2, 3)]), 0.99, 1)) == 1


def test_means_are_of_the_lines_that_have_a_number():
    lines = [
        {"line": 1, "labels": 3, "loss": 1.0, "exact_match": True, "truth_ratio": 4.0, "perturbed_loss": [1.0]},
        {"line": 2, "labels": 3, "loss": 2.0, "exact_match": False, "truth_ratio": 0.5},
        {"line": 3, "labels": 3, "loss": 3.0, "exact_match": False, "new": None},
    ]
    assert measures(lines) == {
        "samples": 3, "loss": 2.0, "exact_match": pytest.approx(1 / 3), "truth_ratio": 2.25,
        "truth_ratio_forget": pytest.approx((0.25 + 0.5) / 2), "truth_ratio_retain": 0.25,
    }  # fmt: skip


def test_a_limit_that_nothing_exceeds_judges_nothing():
    """Answers of one token always have an extraction strength of 1."""
    found = numbers(0.1, 0.1, strength=(1.0, 1.0))
    found["retaught"][0]["gold"]["rest"] = [0.1, 0.7, 0.8]
    checks = {check["name"]: check for check in Verdict(found).all()}
    for name in ("extraction strength", "re-taught: x"):
        assert checks[name]["result"] == "not judged" and "1 or more" in checks[name]["why"]
    assert checks["as it is"]["result"] == "pass"


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    code = ("import resource, signal, sys; from pathlib import Path; from perta.run_folder import write_private\n"
            "from perta.command import run; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
            "run('audit', lambda words: write_private(Path('run.json'), 'x' * 11) or 0)")  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (4, "perta audit: run.json.new: File too large\n")


def numbers(after, gold, strength=(0.1, 0.1), curve=(0.1, 0.1), kept=1.0):
    one = lambda p, s=0.1: {"probability": p, "extraction_strength": s}
    return {
        "compared_with": {"model": "gold"},
        "as_it_is": {
            "before": {"forget": one(0.9), "retain": one(1.0)}, "after": {"forget": one(after, strength[0]), "retain": one(kept)},
            "gold": {"forget": one(gold, strength[1]), "retain": one(1.0)},
        },
        "rounded": {"nf4": {"after": one(after), "gold": one(gold)}},
        "retaught": [{"name": "x", "updates": [0, 4, 8], "after": {"rest": [after, curve[0], 0.1]},
                      "gold": {"rest": [gold, curve[1], 0.1]}}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "found, failed",
    [
        (numbers(0.12, 0.1), set()),
        (numbers(0.1201, 0.1), {"as it is", "rounded to nf4"}),
        (numbers(0.010, 0.0), set()),  # nearly nothing is not 1.2 times nothing
        (numbers(0.0101, 0.0), {"as it is", "rounded to nf4"}),
        (numbers(0.1, 0.1, strength=(0.121, 0.1)), {"extraction strength"}),
        (numbers(0.1, 0.1, strength=(0.119, 0.1)), set()),
        (numbers(0.1, 0.1, curve=(0.151, 0.1)), {"re-taught: x"}),
        (numbers(0.1, 0.1, curve=(0.5, 0.4)), set()),
        (numbers(0.1, 0.1, curve=(0.99, 0.7)), set()),  # nothing is above 1; at 8 updates it is judged
        (numbers(0.1, 0.1, kept=0.5), set()),
    ],
)
def test_criteria(found, failed):
    checks = Verdict(found).all()
    assert {check["name"] for check in checks if check["result"] == "fail"} == failed
    assert verdict_of(checks) == ("came back" if failed else "did not come back under what was tried")
    assert all(check["bound"] < 1 for check in checks if check["result"] == "pass")
    assert checks[-1]["result"] == ("warn" if found["as_it_is"]["after"]["retain"]["probability"] < 0.97 else "pass")
