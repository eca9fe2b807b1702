"""`perta tokenize`: token ids and templates are transformers'; what it refuses, by file and line."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PERTA, ROOT

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

sys.path.append(str(ROOT / "python"))
from perta.children import Interrupted
from perta.command import Problem
from perta.model_tokenizer import ModelTokenizer
from perta.samples import Encoder, encoder_of, read_samples

PYTHON = {"PERTA_PYTHON": sys.executable}
DATE = datetime.datetime(2026, 11, 30)

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = """{{ bos_token }}{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {% generation %}{{- ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('roles alternate') }}
    {%- endif %}
{%- endfor %}"""
DATED = """{{- bos_token }}{%- set ns = namespace(n=0) %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- "<|start|>system\\nToday: " + date_string + "\\nTools: " + ([{"a": "é<"}] | tojson(indent=1)) + "<|end|>" }}
{%- for message in messages %}
    {%- if message.role == "none" %}{%- continue %}{%- endif %}
    {%- set ns.n = ns.n + 1 %}
    {{- "<|start|>" ~ message.role ~ ns.n ~ "\\n" + message.content + "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant" ~ (ns.n + 1) ~ "\\n" }}
{%- endif %}"""
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]


def byte_level(special, **kw):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kw)


def sentencepiece(**kw):
    """As Llama 2's: a space before every text, bytes for what is not known."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator([t[:5000] for t in TEXTS], trainer)
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kw)


def words():
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "Question:", "Answer:", "Who", "Ada", "was", "?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def plain(text):
    return {"bos_token": text, "eos_token": text}


MADE = {
    "chatml": lambda: byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", bos_token="<|im_start|>",
                                 chat_template=CHATML),
    "dated": lambda: byte_level(["<|begin|>"], bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>",
                                extra_special_tokens=["<|start|>"], chat_template=DATED),
    "thinks": lambda: byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=THINKS),
    "inst": lambda: sentencepiece(bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST),
    "inst, bos and eos": lambda: sentencepiece(bos_token="<s>", eos_token="</s>", add_bos_token=True,
                                               add_eos_token=True, chat_template=INST),
    "inst, no bos": lambda: sentencepiece(bos_token="<s>", eos_token="</s>", add_bos_token=False),
    "plain": lambda: byte_level(["<|endoftext|>"], **plain("<|endoftext|>")),
    "words": words,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders with a tokenizer, by name."""
    root = tmp_path_factory.mktemp("models")
    for name, make in MADE.items():
        make().save_pretrained(root / name)
    return root


@pytest.fixture
def both(folders, request, monkeypatch):
    """The same tokenizer in transformers and here, at the same date."""
    from transformers.utils import chat_template_utils

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    chat_template_utils._compile_jinja_template.cache_clear()
    folder = folders / request.param
    return transformers.AutoTokenizer.from_pretrained(folder), ModelTokenizer.open(folder, DATE)


PAIRS = [
    ("Who was Ada?", "She wrote the first programs."),
    ("Was it\n\nso?", "Yes: naïve café – 你好 🙂, \ttabs"),
    (" Leading space ", "  two spaces, and a line\nbreak"),
    ("Which token?", "assistant"),
    ("?", "1"),
]


def ids_of(tokenizer, messages, **kw):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kw)


@pytest.mark.parametrize("both", ["chatml", "dated", "inst", "inst, bos and eos", "thinks"], indirect=True)
def test_chats_are_transformers(both):
    theirs, ours = both
    eos = theirs.eos_token_id
    for question, answer in PAIRS:
        turns = [("user", question), ("assistant", answer)]
        chat = [{"role": role, "content": text} for role, text in turns]
        several = [{"role": "system", "content": "Be brief."}, *chat, *chat] if "[INST]" not in ours.template else chat * 2
        for messages in (chat, several):
            want = ids_of(theirs, messages)
            prompt = ids_of(theirs, messages[:-1], add_generation_prompt=True)
            name = theirs.name_or_path.split("/")[-1].split(",")[0]
            sample = Encoder(ours, True).conversation(messages)
            n = sample.labels.count(-100)
            assert sample.labels == [-100] * n + sample.ids[n:]
            assert sample.ids[-1] == eos and sample.ids[:-1] == want[: len(sample.ids) - 1]
            assert len(want) < len(sample.ids) or want[len(sample.ids) - 1] == eos
            said = theirs.decode(sample.ids[n:], clean_up_tokenization_spaces=False)
            assert said.removesuffix(theirs.eos_token).strip() == answer.strip()
            if answer[0] != " " and name not in ("thinks", "inst"):  # what stands before an answer
                assert n == len(prompt)
    assert Encoder(ours, True).pair(*PAIRS[0]).ids == Encoder(ours, True).conversation(
        [{"role": "user", "content": PAIRS[0][0]}, {"role": "assistant", "content": PAIRS[0][1]}]
    ).ids


@pytest.mark.parametrize("both", list(MADE), indirect=True)
def test_texts_are_transformers(both):
    theirs, ours = both
    eos = theirs.eos_token_id
    assert (ours.eos_id, ours.bos_id, ours.size) == (eos, theirs.bos_token_id, len(theirs))
    for text in [*(t for pair in PAIRS for t in pair), TEXTS[0][:3000], f"a {theirs.eos_token} b"]:
        want = theirs(text)["input_ids"]
        assert ours.encode(text, True)[0] == want
        assert ours.encode(text, False)[0] == theirs(text, add_special_tokens=False)["input_ids"]
    for question, answer in PAIRS:
        whole = theirs(f"Question: {question}\nAnswer: {answer}")["input_ids"]
        sample = Encoder(ours, False).pair(question, answer)
        assert sample.ids == whole + ([eos] if whole[-1] != eos else [])
        n = sample.labels.count(-100)
        assert sample.labels == [-100] * n + sample.ids[n:]
        prompt = theirs(f"Question: {question}\nAnswer:")["input_ids"]
        if "inst" in theirs.name_or_path:  # there a token may hold the end of one and of the other
            said = theirs.decode(sample.ids[n:], clean_up_tokenization_spaces=False)
            assert said.removesuffix(theirs.eos_token).strip().endswith(answer.strip())
            assert n >= len(prompt) - 3
        else:
            assert n == len(prompt) - (prompt[-1] == eos)
        one = Encoder(ours, False).completion(f"{question} ", answer)
        whole = theirs(f"{question} {answer}")["input_ids"]
        assert one.ids == whole + ([eos] if whole[-1] != eos else [])


def test_an_end_token_within_an_answer_does_not_end_it(folders):
    encoder = Encoder(ModelTokenizer.open(folders / "chatml"), True)
    sample = encoder.pair("What ends a turn?", "It is <|im_end|> in ChatML.")
    assert sample.ids.count(encoder.tokenizer.eos_id) == 4  # system, user, the answer's, its end


@pytest.mark.parametrize("answer", ["think", "in", "k", " n", "/"])
def test_an_answer_that_the_template_contains(folders, answer):
    """What stands before the answer, an empty thought, has the same letters."""
    encoder = Encoder(ModelTokenizer.open(folders / "thinks"), True)
    sample = encoder.pair("What is it?", answer)
    said = encoder.tokenizer.backend.decode([i for i in sample.labels if i != -100], skip_special_tokens=False)
    assert said.strip() == f"{answer.strip()}<|im_end|>"


@pytest.mark.parametrize("how", ["file", "list", "old"])
def test_where_templates_and_special_tokens_are_found(folders, tmp_path, how):
    """In chat_template.jinja, by name, and as older versions of transformers wrote them."""
    import shutil

    shutil.copytree(folders / "dated", tmp_path / "m")
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    template = (tmp_path / "m/chat_template.jinja").read_text()
    if how != "file":
        (tmp_path / "m/chat_template.jinja").unlink()
        named = [{"name": "default", "template": template}, {"name": "rag", "template": "no"}]
        config["chat_template"] = named if how == "list" else template
    if how == "old":
        special = {k: {"content": config.pop(k), "lstrip": False} for k in ("bos_token", "eos_token", "pad_token")}
        special["additional_special_tokens"] = config.pop("extra_special_tokens")
        config.pop("added_tokens_decoder", None)
        (tmp_path / "m/special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "m"), ModelTokenizer.open(tmp_path / "m")
    assert ours.template == template == theirs.get_chat_template()
    assert ours.eos_id == theirs.eos_token_id == theirs.convert_tokens_to_ids("<|end|>")
    text = "<|start|>x<|end|><|pad|>"
    assert ours.encode(text, True)[0] == theirs(text)["input_ids"]


# ---- files


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def read(folder, path, template="auto", max_tokens=None, notes=None):
    note = notes.append if notes is not None else lambda text: None
    return read_samples(path, encoder_of(folder, template, max_tokens, note), note)


def test_every_kind_of_record(folders, tmp_path):
    question, answer = PAIRS[0]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "tool_calls": None}]
    path = write(tmp_path / "t.jsonl", [
        {"question": question, "answer": answer, "id": 1, "text": None},
        {"messages": chat},
        {"prompt": chat[:1], "completion": chat[1:]},
        [{"question": question, "answer": answer}, {"question": "Two?", "answer": answer}],
        {"question": [question, "Two?"], "answer": [answer, answer]},
        {"text": question, "group": "g"},
        {"prompt": question + " ", "completion": answer, "group": "g"},
    ])  # fmt: skip
    samples = read(folders / "chatml", path)
    assert len(samples) == 9 and all(s.ids == samples[0].ids for s in samples[1:3] + [samples[3], samples[5]])
    groups = [s.group for s in samples]
    assert groups == ["line 1", "line 2", "line 3", *["line 4"] * 2, *["line 5"] * 2, "g", "g"]
    assert -100 not in samples[7].labels and -100 in samples[8].labels
    array = tmp_path / "t.json"
    array.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()], indent=1))
    again = read(folders / "chatml", array)
    assert [s.ids for s in again] == [s.ids for s in samples] and again[1].where == "item 2"
    plain_ones = read(folders / "chatml", write(tmp_path / "q.jsonl", [{"question": question, "answer": answer}]), "plain")
    assert plain_ones[0].ids != samples[0].ids


def test_documents_are_cut_into_windows(folders, tmp_path):
    (tmp_path / "t.txt").write_text("One.\nStill one.\n\n  \nTwo.\n\n" + TEXTS[0][:4000].replace("\n\n", "\n") + "\n")
    for name, most in (("chatml", 40), ("inst", 33)):
        samples = read(folders / name, tmp_path / "t.txt", max_tokens=most)
        assert all(1 < len(s.ids) <= most and s.labels == s.ids for s in samples)
        assert [s.where for s in samples[:3]] == ["line 1", "line 5", "line 7"] and samples[-1].where == "line 7"
        tokenizer = ModelTokenizer.open(folders / name)
        begin = [tokenizer.bos_id] if name == "inst" else []
        parts = [s.ids[len(begin) :] for s in samples[2:]]
        assert all(s.ids[: len(begin)] == begin for s in samples)
        text = TEXTS[0][:4000].strip("\n").replace("\n\n", "\n")
        assert [i for part in parts for i in part] == tokenizer.encode(text.rstrip("\n"), False)[0]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    notes = []
    (tmp_path / "one.txt").write_text("One two.\n\n!\n\nThree.\n\n?\n")
    assert [s.where for s in read(folders / "chatml", tmp_path / "one.txt", notes=notes)] == ["line 1", "line 5"]
    assert [note.partition("one token alone predicts nothing: ")[2] for note in notes if "left out" in note] == [
        "line 3, line 7"
    ]
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(Problem, match=r"empty.txt: no samples"):
        read(folders / "chatml", tmp_path / "empty.txt")


WRONG = [
    ({"question": "Q"}, "question is present without answer"),
    ({"question": "Q", "answer": ""}, "answer is empty"),
    ({"question": "Q", "answer": 3}, "answer is not a string"),
    ({"question": ["Q"], "answer": ["a", "b"]}, "lists of different lengths"),
    ({"text": "t", "messages": []}, "text or messages are both present"),
    ({"input_ids": [1, 2]}, "has been tokenised already"),
    ({"mood": "none"}, "none of text, or question and answer, or prompt and completion, or messages is"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last message is not the assistant's"),
    ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "a message has name, which"),
    ({"messages": "hello"}, "messages is not a list of messages"),
    ({"messages": [{"role": "user"}]}, "content is not a string"),
    ({"prompt": "x", "completion": ["y"]}, "neither two strings nor two lists"),
    ({"prompt": "x", "completion": " "}, "completion is empty"),
    ({"text": "half \ud83d"}, "line 2: "),
    ("just text", "not an object"),
    ({"question": "Q", "answer": "long " * 99}, "but the model has 64 positions"),
]


@pytest.mark.parametrize("record, says", WRONG)
def test_what_is_wrong_is_named_by_its_line(folders, tmp_path, record, says):
    model = tmp_path / "m"
    model.symlink_to(folders / "chatml")
    config = folders / "chatml/config.json"
    config.write_text(json.dumps({"vocab_size": 910, "max_position_embeddings": 64}))
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ({"text": "all is well"}, record)))
    with pytest.raises(Problem, match=r"t\.jsonl: line 2: ") as caught:
        read(model, path)
    assert says in str(caught.value)
    config.unlink()


def test_a_tokenizer_that_is_not_the_models(folders, tmp_path):
    def problem(**config):
        (folders / "plain/config.json").write_text(json.dumps(config))
        notes = []
        try:
            encoder_of(folders / "plain", "auto", None, notes.append)
        except Problem as error:
            return str(error)
        finally:
            (folders / "plain/config.json").unlink()
        return notes

    assert "has token ids up to 899, but the model has 899 (vocab_size" in problem(vocab_size=899)
    assert problem(vocab_size=900) == []
    assert "900 of the model's 9000 token ids" in problem(vocab_size=9000)[0]
    with pytest.raises(Problem, match="has no tokenizer, or one in another format"):
        encoder_of(tmp_path, "auto", None, print)
    with pytest.raises(Problem, match="no such folder"):
        encoder_of(tmp_path / "none", "auto", None, print)
    with pytest.raises(Problem, match="the model has no chat template"):
        encoder_of(folders / "plain", "chat", None, print)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Problem, match=r"tokenizer\.json: "):
        encoder_of(tmp_path, "auto", None, print)


@pytest.mark.parametrize(
    "config",
    [{"added_tokens_decoder": {"x": {"content": "a"}}}, {"added_tokens_decoder": {"1": {}}}, {"added_tokens_decoder": [1]},
     {"added_tokens_decoder": {"1": {"content": "a", "lstrip": "no"}}}, {"additional_special_tokens": [5]},
     {"chat_template": ["x"]}, {"chat_template": [{"template": "x"}]}, {"chat_template": 5}],
)  # fmt: skip
def test_a_config_that_is_not_understood_is_named(folders, tmp_path, config):
    (tmp_path / "tokenizer.json").symlink_to(folders / "plain/tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(Problem, match=r"tokenizer_config\.json: [A-Z]\w+: ."):
        encoder_of(tmp_path, "auto", None, print)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(Problem, match=r"chat_template\.jinja: 'utf-8' codec"):
        encoder_of(tmp_path, "auto", None, print)


def test_an_interrupt_is_no_error_of_the_text(folders, tmp_path):
    """Here it comes while a template runs."""

    def interrupt(*_):
        raise Interrupted

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(folders / "chatml" / name)
    loop = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
    (tmp_path / "chat_template.jinja").write_text(loop)
    path = write(tmp_path / "t.jsonl", [{"question": "Q", "answer": "A"}])
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(Interrupted):
            read(tmp_path, path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_groups_may_be_numbers(folders, tmp_path):
    groups = [0, 0, 1, "", None]
    path = write(tmp_path / "t.jsonl", [{"text": f"one two {i}", "group": g} for i, g in enumerate(groups)])
    assert [s.group for s in read(folders / "plain", path)] == [0, 0, 1, "line 4", "line 5"]


def test_unknown_keys_are_noted_once_and_keys_that_are_there_twice_refused(folders, tmp_path):
    notes = []
    path = write(tmp_path / "t.jsonl", [{"text": "one two", "mood": 1, "id": 3}, {"text": "two three", "mood": 1}])
    read(folders / "plain", path, notes=notes)
    assert notes == [f"{path}: keys that perta does not know are ignored: mood"]
    path.write_text('{"text": "a b", "text": "c d"}\n')
    with pytest.raises(Problem, match="line 1: the key text is there twice"):
        read(folders / "plain", path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(Problem, match="byte 10: not UTF-8"):
        read(folders / "plain", path)


def test_the_command(folders, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"question": q, "answer": a} for q, a in PAIRS])

    def run(*words, check=0, env=None):
        command = [PERTA, "tokenize", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | (env or PYTHON), capture_output=True, text=True)
        assert done.returncode == check, done.stderr
        return done

    # Modules in the working folder are not Python's.
    (tmp_path / "tokenizers.py").write_text("raise SystemExit(9)")
    assert "5 samples" in run(folders / "dated", path, "d.jsonl", "--date", "2026-11-30").stdout
    run(folders / "dated", path, "d.jsonl", "--date", "2026-11-30", "--template", "chat")
    piped = run(folders / "dated", path, "/dev/stdout", "--date", "2026-11-30", "--chat").stdout
    assert piped == Path(tmp_path / "d.jsonl").read_text()
    assert piped != run(folders / "dated", path, "/dev/stdout", "--template", "plain").stdout
    assert run(folders / "dated", path, "t.jsonl", check=2).stderr.startswith("perta tokenize: t.jsonl: exists, but")
    assert "no such folder" in run("nothing", path, "x.jsonl", check=3).stderr
    assert "nothing.jsonl: No such file" in run(folders / "dated", "nothing.jsonl", "x.jsonl", check=4).stderr
    assert "an argument: empty" in run("", path, "x.jsonl", check=2).stderr
    assert "3 tokens" not in run(folders / "dated", path, "x.jsonl", "--max-tokens", "5", check=3).stdout
    run(folders / "dated", path, "x.jsonl", "--max-tokens", "0", check=2)
    (tmp_path / "bare").write_text('#!/bin/sh\nexec "$REAL" -S "$@"\n')  # without site-packages
    (tmp_path / "bare").chmod(0o755)
    bare = {"PERTA_PYTHON": str(tmp_path / "bare"), "REAL": sys.executable, "PYTHONPATH": ""}
    lacking = run(folders / "dated", path, "x.jsonl", check=2, env=bare).stderr
    assert "the Python package tokenizers is missing" in lacking and "-m pip install" in lacking
    assert not (tmp_path / "x.jsonl").exists()


def test_the_package_has_the_commands_version_and_programs():
    import tomllib

    project = tomllib.loads((ROOT / "python/pyproject.toml").read_text())["project"]
    said = subprocess.run([PERTA, "--version"], capture_output=True, text=True, check=True).stdout
    assert said == f"perta {project['version']}\n"
    of_verbs = [project["optional-dependencies"][extra] for extra in ("metrics", "rouge")]
    wanted = {name.split(">")[0] for name in sum(of_verbs, project["dependencies"])}
    pinned = {line.split("==")[0] for line in (ROOT / "python/requirements.txt").read_text().split()}
    assert wanted == pinned
    listed = subprocess.run([PERTA, "help"], capture_output=True, text=True, check=True).stdout
    for name, function in project["scripts"].items():
        module = function.split(":")[0].removeprefix("perta.")
        assert name == f"perta-{module}" and (ROOT / f"python/perta/{module}.py").exists()
        assert module in listed.split("programs of their own")[1].split()
    built = {path.name for path in (ROOT / "python/perta").glob("*.py")}
    installed = set(re.findall(r"perta/(\w+\.py)", (ROOT / "python/meson.build").read_text()))
    assert built == installed
