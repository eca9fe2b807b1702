"""`perta eval --generate`: what transformers' generate() says greedily, token by token."""

import json
import re
import signal
import subprocess

import pytest
from conftest import PERTA, SANITIZED, needed
from test_estimate import MODELS, VOCABULARY, make_model
from test_eval import changed_copy, evaluate, write_lines
from test_limits import peak_mib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

F32 = ("--compute", "f32")
LENGTHS = (1, 2, 5, 13, 40, 66, 3, 90)


def prompts(lengths=LENGTHS):
    """Lines with a prompt of each length, and an answer of some tokens."""
    generator = torch.Generator().manual_seed(11)
    for i, n in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (n + 1 + i % 4,), generator=generator).tolist()
        yield {"input_ids": ids, "labels": [-100] * n + ids[n:]}


def prompt_of(line):
    return line["input_ids"][: line["labels"].count(-100) or 1]


@torch.no_grad()
def continued(model, line, n):
    """What transformers says, without the end token; and whether that came."""
    prompt = torch.tensor([prompt_of(line)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                         max_new_tokens=n, pad_token_id=0)[0, prompt.shape[1]:].tolist()  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return (out[:-1], True) if out[-1] in ends else (out, False)


def generated(summary):
    return [(item["generated_ids"], item["generated_end"]) for item in summary["per_sample"]]


def set_ends(model, folder, ends):
    model.generation_config.eos_token_id = ends
    model.generation_config.save_pretrained(folder)


@pytest.mark.parametrize("name", list(MODELS))
def test_tokens_are_transformers(perta, tmp_path, name):
    """Prompts of different lengths, windows shorter than prompt and answer, and end tokens that come
    in the middle of some answers."""
    family, changes = MODELS[name]
    model = make_model(tmp_path / "model", family, changes)
    lines = list(prompts())
    write_lines(tmp_path / "data.jsonl", lines)
    set_ends(model, tmp_path / "model", None)
    free = [continued(model, line, 20)[0] for line in lines]
    assert all(len(ids) == 20 for ids in free)
    have = evaluate(perta, "model", "--generate", 20, *F32)
    assert generated(have) == [(ids, False) for ids in free]
    assert "no \"eos_token_id\"" in have["notes"][0]
    ends = [free[0][0], free[3][7], free[5][-1]]
    set_ends(model, tmp_path / "model", ends)
    want = [continued(model, line, 20) for line in lines]
    assert {end for _, end in want} == {True, False} or all(end for _, end in want)
    have = evaluate(perta, "model", "--generate", 20, *F32)
    assert generated(have) == want
    assert have["end_ids"] == ends and have["notes"] == []


# ---- every run says the same


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A model whose keys and values are larger than its layers, and many prompts."""
    folder = tmp_path_factory.mktemp("many")
    changes = {"num_key_value_heads": 8, "sliding_window": 40, "max_position_embeddings": 512}
    make_model(folder / "model", "Mistral", changes)
    lines = list(prompts(LENGTHS * 4 + (300,) * 60))
    write_lines(folder / "data.jsonl", lines)
    return folder


def in_folder(folder, *flags, check=0, **kw):
    words = [PERTA, "eval", "--model", "model", "--data", "data.jsonl", "--json", *flags]
    result = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, **kw)
    assert result.returncode == check, result.stderr
    return json.loads(result.stdout) if not check else result.stderr


def least_of(folder):
    """The smallest budget: what the refusal of a too small one names."""
    return re.search(r"needs (\d+M)", in_folder(folder, "--generate", 6, "--memory", "1M", check=2))[1]


def without_counts(summary):
    own = ("batches", "read_bytes", "scratch_bytes", "seconds")
    return {key: value for key, value in summary.items() if key not in own}


def test_neither_threads_nor_memory_nor_io_change_a_token(many):
    want = in_folder(many, "--generate", 6)
    assert want["scratch_bytes"] == 0 and len(want["per_sample"]) == 92
    assert want["generating_passes"] == 6 and want["generated_tokens"] == 6 * 92
    least = least_of(many)
    for flags in (("--threads", 1), ("--threads", 3), ("--memory", least), ("--io", "pread"),
                  ("--io", "mmap"), ("--io", "direct"), ("--memory", least, "--threads", 2)):  # fmt: skip
        have = in_folder(many, "--generate", 6, *flags)
        assert without_counts(have) == without_counts(want), flags
        assert (have["scratch_bytes"] > 0) == ("--memory" in flags)


@pytest.mark.skipif(SANITIZED, reason="sanitizers take memory of their own")
def test_the_budget_holds_with_keys_and_values_in_a_file(many):
    least = least_of(many)
    words = ["eval", "--model", "model", "--data", "data.jsonl", "--generate", "6",
             "--memory", least]  # fmt: skip
    peak = peak_mib(words, many)
    assert peak <= int(least.removesuffix("M")), (peak, least)


def test_more_answers_than_a_group_has_rows(perta, tmp_path):
    """Nor than a group of the head has; all of short prompts, so that batches are small."""
    model = make_model(tmp_path / "model", "Qwen2", {"num_hidden_layers": 1})
    lines = list(prompts((2, 3, 1, 4, 2, 3, 1)))
    ends = [continued(model, line, 4)[0][1] for line in lines[:3]]
    set_ends(model, tmp_path / "model", ends)
    write_lines(tmp_path / "data.jsonl", lines * 160)
    want = [continued(model, line, 4) for line in lines]
    least = needed(perta, ["eval", "--model", "model", "--data", "data.jsonl", "--generate", 4])
    for flags in ((), ("--memory", least)):
        have = evaluate(perta, "model", "--generate", 4, *F32, *flags)
        assert generated(have) == want * 160
        assert have["generated_tokens"] == 160 * sum(len(ids) for ids, _ in want)


def test_a_token_is_what_a_whole_pass_gives(perta, tmp_path, many):
    """Each token again, as the first after a longer prompt."""
    lines = list(prompts((7, 30)))
    write_lines(tmp_path / "data.jsonl", lines)
    found = evaluate(perta, many / "model", "--generate", 5, *F32)["per_sample"]
    for k in range(5):
        longer = [prompt_of(line) + item["generated_ids"][:k] for line, item in zip(lines, found, strict=True)]
        write_lines(tmp_path / "data.jsonl", [{"input_ids": [*ids, 5], "labels": [-100] * len(ids) + [5]} for ids in longer])
        one = evaluate(perta, many / "model", "--generate", 1, *F32)["per_sample"]
        assert [item["generated_ids"] for item in one] == [item["generated_ids"][k : k + 1] for item in found]


def test_a_patched_model_says_what_the_model_it_leads_to_says(perta, tmp_path):
    model = make_model(tmp_path / "full", "Qwen3", {"head_dim": 16})
    changed_copy(tmp_path, lambda name, x: x + 0.1 * torch.randn(x.shape))
    model = type(model).from_pretrained(tmp_path / "tuned")
    lines = list(prompts())
    write_lines(tmp_path / "data.jsonl", lines)
    perta("diff", "full", "tuned", "--patch", "patch")
    flags = ("--generate", 9, *F32)
    have = evaluate(perta, "full", "--patch", "patch", *flags)
    assert have["per_sample"] == evaluate(perta, "tuned", *flags)["per_sample"]
    assert have["per_sample"] != evaluate(perta, "full", *flags)["per_sample"]
    assert generated(have) == [continued(model, line, 9) for line in lines]
    rounded = [evaluate(perta, *at, "--quantize", "int4", *flags)["per_sample"] for at in (("full", "--patch", "patch"), ("tuned",))]
    assert rounded[0] == rounded[1] != have["per_sample"]


def test_an_adapter_counts(perta, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(tmp_path / "model", "Llama", {})
    with_lora = peft.get_peft_model(model, peft.LoraConfig(r=3, init_lora_weights=False, target_modules="all-linear"))
    with_lora.save_pretrained(tmp_path / "lora")
    lines = list(prompts((4, 21)))
    write_lines(tmp_path / "data.jsonl", lines)
    have = evaluate(perta, "model", "--adapter", "lora", "--generate", 9, *F32)
    assert generated(have) == [continued(with_lora, line, 9) for line in lines]


# ---- lines, end tokens


def test_numbers_stay_and_other_answers_are_not_continued(perta, tmp_path):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    lines = list(prompts((5, 9)))
    lines[0] |= {"paraphrased": lines[1], "perturbed": [lines[1], next(prompts((3,)))]}
    write_lines(tmp_path / "data.jsonl", lines)
    plain = evaluate(perta, "model")
    have = evaluate(perta, "model", "--generate", 3)
    for key in ("end_ids", "generated_tokens", "generating_passes"):
        have.pop(key)
    for item in have["per_sample"]:
        assert len(item.pop("generated_ids")) <= 3 and item.pop("generated_end") in (True, False)
    have["read_bytes"] = plain["read_bytes"]
    assert have == plain
    text = perta("eval", "--model", "model", "--data", "data.jsonl", "--generate", 3).stdout
    assert "line 2 generates: " in text


def test_what_is_padded_is_one_sequence_and_what_is_packed_is_not(perta, tmp_path):
    model = make_model(tmp_path / "model", "Llama", {})
    line = next(prompts((6,)))
    n = len(line["input_ids"])
    padded = {"input_ids": [0] * 5 + line["input_ids"] + [0] * 2, "labels": [-100] * 5 + line["labels"] + [-100] * 2,
              "attention_mask": [0] * 5 + [1] * n + [0] * 2}  # fmt: skip
    write_lines(tmp_path / "data.jsonl", [line, padded])
    have = generated(evaluate(perta, "model", "--generate", 8, *F32))
    assert have[0] == have[1] == continued(model, line, 8)
    for wrong in ({"position_ids": [0, 1, 2, 0, 1, 2, 3][:n]}, {"attention_mask": [1, 1, 0, 1, 1, 1, 1][:n]}):
        write_lines(tmp_path / "data.jsonl", [line, line | wrong])
        words = ["eval", "--model", "model", "--data", "data.jsonl", "--generate", 8]
        assert "data.jsonl: line 2: an answer is generated only to a line that is one sequence" in perta(*words, check=3).stderr
        perta(*words[:-2])


def test_end_tokens_are_found_as_transformers_finds_them(perta, tmp_path):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1, "eos_token_id": 7})
    write_lines(tmp_path / "data.jsonl", prompts((5,)))
    own = tmp_path / "model/generation_config.json"
    config = tmp_path / "model/config.json"

    def ends():
        want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id
        want = [] if want is None else want if isinstance(want, list) else [want]
        have = evaluate(perta, "model", "--generate", 1)
        assert have["end_ids"] == want
        return have["end_ids"], [note.partition(": ")[2] for note in have["notes"]]

    assert ends() == ([7], [])
    own.write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert ends() == ([9, 8], [])
    own.write_text(json.dumps({"repetition_penalty": 1.1, "eos_token_id": 3, "temperature": 0.6, "num_beams": 1}))
    assert ends() == ([3], ['"repetition_penalty" is not applied: every token that is generated is the most probable one'])
    own.write_text(json.dumps({"eos_token_id": [VOCABULARY - 1, VOCABULARY, -1]}))
    assert ends()[1] == [f'"eos_token_id": the vocabulary of {VOCABULARY} tokens has no {i}, so it ends no answer' for i in (VOCABULARY, -1)]
    own.write_text(json.dumps({"temperature": 0.6}))
    assert ends() == ([], ['no "eos_token_id", so answers have no end'])
    own.unlink()
    assert ends() == ([7], [])
    without = {key: value for key, value in json.loads(config.read_text()).items() if key != "eos_token_id"}
    config.write_text(json.dumps(without))
    assert ends() == ([], ['no "eos_token_id", so answers have no end'])
    config.write_text(json.dumps(without | {"eos_token_id": None}))
    assert ends()[0] == []
    own.write_text(json.dumps({"eos_token_id": ["2"]}))
    words = ["eval", "--model", "model", "--data", "data.jsonl", "--generate", 1]
    assert 'model/generation_config.json: "eos_token_id" is neither a token id nor' in perta(*words, check=3).stderr
    own.write_text("[]")
    assert "model/generation_config.json: not an object" in perta(*words, check=3).stderr
    own.unlink()
    own.symlink_to("/etc/hostname")
    assert "generation_config.json" in perta(*words, check=3).stderr


def test_wrong_arguments(perta, tmp_path):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    write_lines(tmp_path / "data.jsonl", prompts((5,)))
    words = ["eval", "--model", "model", "--data", "data.jsonl", "--generate"]
    assert "at least 1" in perta(*words, 0, check=2).stderr
    assert "--generate: at most 1048576" in perta(*words, 1048577, check=2).stderr
    assert "not a whole number" in perta(*words, "x", check=2).stderr
    assert "needs" in perta(*words, 1048576, "--memory", "60M", check=2).stderr


def test_numbers_that_are_not_finite_are_an_error(perta, tmp_path):
    """Here only in a pass that adds a token: the embedding of what is said first is NaN."""
    model = make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    line = next(prompts((5,)))
    write_lines(tmp_path / "data.jsonl", [line])
    first = continued(model, line, 1)[0][0]
    assert first not in line["input_ids"]
    model.model.embed_tokens.weight.data[first] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    words = ["eval", "--model", "bad", "--data", "data.jsonl", "--generate"]
    perta(*words, 1)
    assert "data.jsonl: line 1: the model gives a loss that is not a finite number" in perta(*words, 2, check=3).stderr


def test_ctrl_c(many):
    words = [str(PERTA), "eval", "--model", "model", "--data", "data.jsonl", "--generate", "200", "--progress", "json"]
    child = subprocess.Popen(words, cwd=many, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stderr.readline()  # it is at work
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=100)
    assert (child.returncode, out) == (130, "") and "interrupted" in err
