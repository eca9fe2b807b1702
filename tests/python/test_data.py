"""The keys of a line of data, compared with transformers: masks, positions, packed samples; what
is refused, ignored and reported; files that change."""

import gzip
import hmac
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import LONG, PERTA, part
from test_estimate import GOOD, MODELS, VOCABULARY, assert_close, gradients, make_model
from test_eval import evaluate, write_lines
from test_steps import STEPS, make_folders, tensors_of
from verbs import stop_at

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ESTIMATE = "estimate --model model --data data.jsonl --out imp --compute f32 --json".split()
INPUTS = ("input_ids", "labels", "attention_mask", "position_ids")


def loss_of(model, line):
    """As in training: with use_cache, transformers makes no blocks of packed samples."""
    batch = {key: torch.tensor([line[key]]) for key in INPUTS if key in line}
    batch.setdefault("labels", batch["input_ids"])
    return model(**batch, use_cache=False).loss


def model_of(folder, name):
    """With PyTorch's scaled_dot_product_attention, the default of transformers: a token that
    attends to nothing gets zeros from it (from eager attention: the mean of all)."""
    make_model(folder, *MODELS[name])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- masks and positions


def ids(n, rng):
    return [rng.randrange(VOCABULARY) for _ in range(n)]


def padded(n, left, right, rng, learned=False):
    x = ids(n, rng)
    pad = [rng.randrange(VOCABULARY)] * max(left, right)
    ignored = pad if learned else [-100] * len(pad)
    return {
        "input_ids": pad[:left] + x + pad[:right],
        "labels": ignored[:left] + x + ignored[:right],
        "attention_mask": [0] * left + [1] * n + [0] * right,
    }


def packed(lengths, rng, first=-100, start=0):
    x, labels, positions = [], [], []
    for n in lengths:
        block = ids(n, rng)
        x += block
        labels += [first if first == -100 else block[0], *block[1:]]
        positions += range(start, start + n)
    return {"input_ids": x, "labels": labels, "position_ids": positions}


def with_holes(n, share, rng):
    x = ids(n, rng)
    mask = [int(rng.random() > share) for _ in x]
    mask[rng.randrange(n)] = 1
    labels = [label if rng.random() < 0.7 else -100 for label in x]
    labels[-1] = x[-1]
    return {"input_ids": x, "labels": labels, "attention_mask": mask}


def lines_of(rng):
    """Some shorter, some longer than a block of rows in attention (64)."""
    both = with_holes(30, 0.3, rng)
    return {
        "right": padded(9, 0, 70, rng),
        "left": padded(9, 5, 0, rng),  # its first label is predicted by a token that attends to nothing
        "padding that is learned": padded(70, 6, 9, rng, learned=True),
        "holes": with_holes(100, 0.4, rng),
        "hardly any": with_holes(20, 0.95, rng),
        "all ones": padded(12, 0, 0, rng),
        "packed": packed((20, 1, 30, 90, 3), rng),
        "packed, with labels between": packed((5, 12, 40), rng, first=0),
        "packed, from elsewhere": packed((10, 17), rng, start=7),
        "positions with gaps": both | {"attention_mask": [1] * 30, "position_ids": list(range(0, 60, 2))},
        "both, packed": packed((14, 9, 20), rng) | {"attention_mask": [1] * 43},
        "both, with holes": both | {"position_ids": [t // 2 for t in range(30)]},
        "neither": {"input_ids": ids(40, rng)},
        "gaps alone": {"input_ids": ids(8, rng), "position_ids": [3, 4, 5, 9, 10, 10, 0, 1]},
    }


WINDOWS = ["llama", "mistral, window", "qwen2, a window in the second block", "qwen3"]


@pytest.mark.parametrize("name", MODELS if LONG else WINDOWS)
def test_masks_and_positions_are_transformers(perta, tmp_path, name):
    """The loss of each line, and gradients over all of them."""
    model = model_of(tmp_path / "model", name)
    for seed in range(5 if LONG else 1):
        lines = list(lines_of(random.Random(seed)).values())
        write_lines(tmp_path / "data.jsonl", lines)
        with torch.no_grad():
            want = [loss_of(model, line).item() for line in lines]
        have = evaluate(perta, "model", "--compute", "f32")["per_sample"]
        assert [item["loss"] for item in have] == pytest.approx(want, abs=1e-5)
        loss, mean, meansq = gradients(model, lines, loss_of)
        flags = ["--stat", "mean,meansq", "--force"]
        assert json.loads(perta(*ESTIMATE, *flags).stdout)["loss"] == pytest.approx(loss, abs=1e-5)
        for stat, g in (("mean", mean), ("meansq", meansq)):
            have = {k: x.double() for k, x in tensors_of(tmp_path / "imp" / stat).items()}
            assert_close(have, g, relative=1e-4, cosine=0.99999)


def random_line(rng):
    n = rng.randrange(2, 90)
    line = with_holes(n, rng.choice((0, 0.1, 0.5)), rng)
    if rng.random() < 0.6:
        step = [rng.choice((1, 1, 1, 1, 1, 2, -3)) for _ in range(n)]
        line["position_ids"] = [max(0, 5 + sum(step[:t])) for t in range(n)]
    if rng.random() < 0.5:
        del line["attention_mask"]
    return line


@pytest.mark.parametrize("name", part(WINDOWS, plain=2))
def test_any_mask_and_any_positions(perta, tmp_path, name):
    model = model_of(tmp_path / "model", name)
    rng = random.Random(7)
    lines = [random_line(rng) for _ in range(1000 if LONG else 60)]
    write_lines(tmp_path / "data.jsonl", lines)
    with torch.no_grad():
        want = [loss_of(model, line).item() for line in lines]
    have = evaluate(perta, "model", "--compute", "f32")["per_sample"]
    assert [item["loss"] for item in have] == pytest.approx(want, abs=1e-5)


def test_blocks_are_samples_of_their_own(perta, tmp_path):
    """What packing means, without transformers; and padding on the right has no effect."""
    model_of(tmp_path / "model", "mistral, window")
    rng = random.Random(3)
    whole = packed((20, 30, 9), rng)
    blocks, start = [], 0
    for n in (20, 30, 9):
        blocks.append({"input_ids": whole["input_ids"][start : start + n]})
        start += n
    write_lines(tmp_path / "data.jsonl", [*blocks, whole])
    *alone, together = (item["loss"] for item in evaluate(perta, "model", "--compute", "f32")["per_sample"])
    weights = [19, 29, 8]
    want = sum(w * loss for w, loss in zip(weights, alone, strict=True)) / sum(weights)
    assert together == pytest.approx(want, abs=1e-6)
    line = padded(17, 0, 11, rng)
    short = {key: value[:17] for key, value in line.items() if key != "attention_mask"}
    write_lines(tmp_path / "data.jsonl", [line, short])
    summary = evaluate(perta, "model")
    a, b = (item["loss"] for item in summary["per_sample"])
    assert a == b and summary["tokens"] == 34


def test_other_answers_and_steps_have_them_too(perta, tmp_path):
    """The same rules everywhere: in paraphrased and perturbed answers, and in steps."""
    make_folders(tmp_path, "mistral, window")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    kinds = lines_of(random.Random(1))
    line = kinds["left"] | {"paraphrased": kinds["packed"], "perturbed": [kinds["holes"], kinds["right"]]}
    write_lines(tmp_path / "data.jsonl", [line])
    item = evaluate(perta, "full", "--compute", "f32")["per_sample"][0]
    with torch.no_grad():
        have = [item["loss"], item["paraphrased_loss"], *item["perturbed_loss"]]
        names = ("left", "packed", "holes", "right")
        assert have == pytest.approx([loss_of(model, kinds[name]).item() for name in names], abs=1e-5)
        write_lines(tmp_path / "forget.jsonl", [kinds["packed"], kinds["holes"]])
        write_lines(tmp_path / "retain.jsonl", [kinds["left"], kinds["both, packed"]])
        path = json.loads(perta(*STEPS, "1").stdout)["path"]
        perta("apply", "full", "patch", "--out", "out")
        for point, folder in zip(path, ("full", "out"), strict=True):
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
            forget = (loss_of(model, kinds["packed"]) + loss_of(model, kinds["holes"])) / 2
            retain = (loss_of(model, kinds["left"]) + loss_of(model, kinds["both, packed"])) / 2
            assert point["forget_loss"] == pytest.approx(forget.item(), abs=2e-5)
            assert point["retain_loss"] == pytest.approx(retain.item(), abs=2e-5)


def test_threads_and_memory_do_not_matter(perta, tmp_path):
    model_of(tmp_path / "model", "qwen2, a window in the second block")
    lines = list(lines_of(random.Random(2)).values()) * 15
    write_lines(tmp_path / "data.jsonl", lines)
    command = [*ESTIMATE, "--force", "--stat", "mean,meansq"]
    little = re.search(r"needs (\d+M)", perta(*command, "--memory", "20M", check=2).stderr)[1]
    runs = []
    for threads, memory in ((1, "1G"), (3, little)):
        summary = json.loads(perta(*command, "--threads", threads, "--memory", memory).stdout)
        runs.append([p.read_bytes() for p in sorted((tmp_path / "imp").rglob("*.safetensors"))])
        runs[-1].append(summary["loss"])
    assert runs[0] == runs[1] and summary["batches"] > 1


# --- other keys

FOUR = {"input_ids": [1, 2, 3, 4]}
PACKED = FOUR | {"position_ids": [0, 1, 0, 1]}
NEUTRAL = [
    FOUR | {"labels": None, "attention_mask": None, "position_ids": None, "loss_mask": None},
    FOUR | {"attention_mask": [1, 1, 1, 1], "position_ids": [0, 1, 2, 3]},
    FOUR | {"attention_mask": [True] * 4},
    FOUR | {"attention_mask": [1.0] * 4},
    FOUR | {"loss_mask": [0, 1, 1, 1]},  # the first label never counts
    FOUR | {"labels": [-100, -100, 3, 4], "completion_mask": [0, 0, 1, 1]},
    FOUR | {"labels": [-100, -100, 3, 4], "assistant_masks": [1, 1, 1, 1]},
    FOUR | {"weight": 1, "loss_weights": [1.0, 1, 1, 1], "sample_weight": 1.0},
    FOUR | {"token_type_ids": [0, 0, 1, 1], "special_tokens_mask": [1, 0, 0, 1]},
    FOUR | {"cache_position": [0, 1, 2, 3], "is_causal": True, "inputs_embeds": []},
    FOUR | {"label": 3, "label_ids": [1, 2, 3, 4], "pixel_values": None},
    FOUR | {"cu_seq_lens_q": [0, 4], "max_length_q": 4, "seq_lengths": [4], "seq_idx": [0, 0, 0, 0]},
    FOUR | {"length": 99, "lengths": [4], "attn_mask": [1, 1, True, 1], "positions": [0, 1, 2, 3]},
    FOUR | {"labels": [-100, -100, 3, 4], "target_ids": [-100, -100, 3, 4], "loss_scale": [1.0] * 4},
    FOUR | {"position_ids": [5, 6, 7, 8], "pos_ids": [5, 6, 7, 8], "doc_ids": [2, 2, 2, 2]},
    PACKED | {"length": [2, 2], "lengths": [4], "seqlens": [2, 2], "sample_ids": [0, 0, 1, 1]},
    PACKED | {"cu_seq_lens_q": [0, 2, 4], "cu_seq_lens_k": [0, 2, 4], "seq_lengths": [2, 2]},
    PACKED | {"seq_idx": [0, 0, 1, 1], "segment_ids": [7, 7, 3, 3], "document_ids": "a string"},
    PACKED | {"question": "Who?", "text": "", "id": 5, "messages": [{"role": "user"}]},
]
REFUSED = [
    (FOUR | {"attention_mask": [1, 1, 0, 1]}, '"attention_mask" has zeros, and no "labels"'),
    (FOUR | {"attention_mask": [0, 0, 0, 0], "labels": [1, 2, 3, 4]}, "leaves no token"),
    (FOUR | {"attention_mask": [1, 1, 2, 2]}, '"attention_mask", element 2: 2 is neither 0 nor 1'),
    (FOUR | {"attention_mask": [1, 1]}, '"attention_mask" is not as long as "input_ids"'),
    (FOUR | {"attention_mask": [[1, 1, 1, 1]] * 4}, '"attention_mask" holds arrays'),
    (FOUR | {"attention_mask": "1111"}, '"attention_mask" is not as long'),
    (FOUR | {"position_ids": [0, 1, 2]}, '"position_ids" is not as long as "input_ids"'),
    (FOUR | {"position_ids": [0, 1, 2, -1]}, '"position_ids", element 3: -1 is not a position'),
    (FOUR | {"position_ids": [0, 1, 2, 2.5]}, "element 3: 2.5 is not a position"),
    (FOUR | {"loss_mask": [1, 0, 1, 1]}, '"loss_mask": it leaves out what "labels" learn'),
    (FOUR | {"assistant_masks": [0, 0, 1, 1]}, '"assistant_masks": it leaves out'),
    (FOUR | {"completion_mask": [0, 0, 1]}, '"completion_mask": '),
    (FOUR | {"weight": 0.5}, '"weight": weights other than 1'),
    (FOUR | {"loss_weights": [1, 1, 1, 0]}, '"loss_weights": weights'),
    (FOUR | {"inputs_embeds": [[0.1]]}, '"inputs_embeds": it would change the loss'),
    (FOUR | {"pixel_values": [[0]]}, '"pixel_values": it would change'),
    (FOUR | {"shift_labels": [2, 3, 4, -100]}, '"shift_labels": it would change'),
    (FOUR | {"num_items_in_batch": 7}, '"num_items_in_batch": it would'),
    (FOUR | {"cache_position": [4, 5, 6, 7]}, '"cache_position": it would'),
    (FOUR | {"is_causal": False}, '"is_causal": it would'),
    (FOUR | {"label_ids": [-100, -100, 3, 4]}, '"label_ids": it is not what "labels" are'),
    (FOUR | {"cu_seq_lens_q": [0, 2, 4]}, '"cu_seq_lens_q": it makes other blocks than "position_ids"'),
    (FOUR | {"seq_lengths": [2, 2]}, '"seq_lengths": it makes other blocks'),
    (FOUR | {"seq_idx": [0, 0, 1, 1]}, '"seq_idx": it makes other blocks'),
    (PACKED | {"segment_ids": [1, 1, 1, 2]}, '"segment_ids": it makes other blocks'),
    (PACKED | {"seq_lengths": [2, 3]}, '"seq_lengths": it makes other blocks'),
    (PACKED | {"seq_idx": [0, 0, 1, 1], "attention_mask": [1] * 4}, '"seq_idx": it makes'),
    (FOUR | {"length": [2, 2]}, '"length": it makes other blocks'),
    (FOUR | {"attn_mask": [1, 1, 1, 0]}, '"attn_mask": it hides other tokens than "attention_mask"'),
    (FOUR | {"positions": [0, 1, 0, 1]}, '"positions": it says other positions than "position_ids"'),
    (FOUR | {"target_ids": [-100, 2, 3, -100]}, '"target_ids": it is not what "labels" are'),
    (FOUR | {"loss_scale": [1, 1, 0.5, 1]}, '"loss_scale": weights other than 1'),
    (FOUR | {"labels": [1, 2, 3]}, '"labels" is not as long'),
    ({"input_ids": [[1, 2, 3]]}, '"input_ids" holds arrays, as batches do'),
    ({"input_ids": [1, 5.0]}, '"input_ids", element 1: 5.0 is not a token id'),
    ({"input_ids": [1, "2"]}, '"input_ids", element 1: "2" is not a token id'),
    ({"input_ids": None}, 'no array "input_ids" with tokens in it'),
    ({"input_ids": "1 2 3"}, 'no array "input_ids" with tokens in it'),
    ({"question": "Who?", "answer": "Me."}, "`perta tokenize MODEL TEXT.jsonl OUT.jsonl'"),
]


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})


def test_keys_that_change_nothing_are_passed_over(perta, tmp_path, model):
    write_lines(tmp_path / "data.jsonl", NEUTRAL)
    summary = evaluate(perta, "model", "--compute", "f32")
    assert not [note for note in summary["notes"] if "not know" in note]
    plain = [{key: line[key] for key in INPUTS if line.get(key)} for line in NEUTRAL]
    write_lines(tmp_path / "data.jsonl", plain)
    assert evaluate(perta, "model", "--compute", "f32")["per_sample"] == summary["per_sample"]


@pytest.mark.parametrize("line, message", REFUSED)
def test_keys_that_change_the_loss_are_refused(perta, tmp_path, model, line, message):
    for lines, place in (([GOOD, line], "line 2: "), ([GOOD | {"perturbed": [line]}], 'line 1: "perturbed": ')):
        write_lines(tmp_path / "data.jsonl", lines)
        stderr = perta("eval", "--model", "model", "--data", "data.jsonl", check=3).stderr
        assert f"data.jsonl: {place}" in stderr and message in stderr


def test_unknown_keys_are_named_once(perta, tmp_path, model):
    write_lines(tmp_path / "data.jsonl", [GOOD | {"mood": 1}, GOOD | {"colour": "x", "mood": 2, "id": 3}])
    note = 'data.jsonl: keys that perta does not know are ignored: "mood","colour"'
    for words in (["eval", "--model", "model", "--data", "data.jsonl"], ESTIMATE[:-1]):
        run = perta(*words)
        assert run.stderr.count(note) == 1
        assert note not in perta(*words, *(["--force"] if "imp" in words else []), "--quiet").stderr
    assert evaluate(perta, "model")["notes"] == [note]
    write_lines(tmp_path / "data.jsonl", [GOOD | {f"k{i}": i for i in range(20)}])
    assert evaluate(perta, "model")["notes"][0].endswith('"k7" and more')


def test_blocks_are_noted(perta, tmp_path, model):
    write_lines(tmp_path / "data.jsonl", [GOOD, PACKED, PACKED])
    (note,) = evaluate(perta, "model")["notes"]
    assert 'line 2: "position_ids" start again' in note
    write_lines(tmp_path / "data.jsonl", [PACKED | {"attention_mask": [1] * 4}])
    (note,) = evaluate(perta, "model")["notes"]
    assert 'line 1: with "attention_mask"' in note and "no blocks" in note


# --- text

RAW = [
    b'{"input_ids": [1, 2, 3], "hash": 18446744073709551616, "t": "a\\u0000b"}',
    b'{"x": [NaN, -Infinity, {"y": Infinity}], "input_ids": [1, 2, 3], "z": 1e999}',
    b'{"input_ids": [1, 2, 3], "labels\\u0000": 7, "\\u0000": 1}',
    b'{"text": "half \\ud83d", "input_ids": [1, 2, 3]}',
    b'{"text": "\xff\xfe", "meta": {"a": 1, "a": 2}, "input_ids": [1, 2, 3]}',
    b'\xef\xbb\xbf  {"input_ids" : [ 1,\t2 , 3 ] , "deep": [[[[[]]]], {}, "\\"}]"]}\r',
    b'{"perturbed": [], "paraphrased": null, "labels": null, "input_ids": [1, 2, 3]}',
]
BROKEN = [
    (b'{"input_ids": [1, 2, 3]', "the line ends where ',' or '}' should be; each line is one whole"),
    (b'{"input_ids": [1, 2, 3], "x": [1, 2}}', "byte 36: ',' or ']' expected near '}}'"),
    (b'{"input_ids": [1, 2, 3], "x": nan}', "byte 31: a value expected near 'nan}'"),
    (b"{'input_ids': [1, 2, 3]}", "byte 2: a key expected near ''input_ids"),
    (b'{"input_ids": [1, 2, 3],}', "a key expected near '}'"),
    (b'{"input_ids": [1, 2, 3]} {}', "the line's end expected near '{}'"),
    (b'{"input_ids": [1, 2, 3]}\0', "the line's end expected"),
    (b'{"input_ids": [1, NaN, 3]}', '"input_ids": invalid token near'),
    (b'{"input_ids": [1, 18446744073709551616]}', '"input_ids": too big integer'),
    (b'{"input_ids": [1, 2], "input_ids": [1, 2]}', 'key "input_ids" is there twice'),
    (b'{"input_ids": [1, 2], "x \\ud83d": 1}', "a key: invalid Unicode"),
    (b'{"input_ids": [1, 2], "x": 1, "x": 1}', 'key "x" is there twice'),
    (b'{"input_ids": [1, 2], "x": ' + b"[" * 600 + b"]" * 600 + b"}", "arrays nested more than"),
    (b'[{"input_ids": [1, 2, 3]}]', "a JSON array"),
    (b"Once upon a time", "no JSON object near 'Once"),
    (b'"Once upon a time"', "no JSON object near '\"Once"),
]


def test_what_others_write_beside_does_not_matter(perta, tmp_path, model):
    """Also blank lines, Windows line ends, and no newline at the end."""
    for words in (ESTIMATE, "eval --model model --data data.jsonl --json --compute f32".split()):
        text = b"\n\r\n".join(RAW[:-1]) + (b"" if words is not ESTIMATE else b"\n" + RAW[-1])
        (tmp_path / "data.jsonl").write_bytes(text)
        n = len(RAW) - (words is not ESTIMATE)
        summary = json.loads(perta(*words).stdout)
        assert (summary["samples"], summary["tokens"]) == (n, 3 * n)


@pytest.mark.parametrize("raw, message", BROKEN)
def test_broken_lines_are_named_by_byte(perta, tmp_path, model, raw, message):
    (tmp_path / "data.jsonl").write_bytes(RAW[0] + b"\n" + raw + b"\n")
    stderr = perta("eval", "--model", "model", "--data", "data.jsonl", check=3).stderr
    assert "data.jsonl: line 2: " in stderr and message in stderr


GOOD_TEXT = json.dumps(GOOD)


@pytest.mark.parametrize(
    "raw, message",
    [
        (GOOD_TEXT.encode("utf-16"), "is UTF-16, by its byte order mark; write it as UTF-8"),
        (b"\xfe\xff" + GOOD_TEXT.encode("utf-16-be"), "is UTF-16, by its byte order mark"),
        (GOOD_TEXT.encode("utf-16-le"), "is UTF-16; write it as UTF-8"),
        (GOOD_TEXT.encode("utf-32"), "is UTF-32"),
        (gzip.compress(GOOD_TEXT.encode()), "is compressed; gunzip it first"),
        (b"\x28\xb5\x2f\xfd....", "unzstd it first"),
        (b"PAR1\x15\x04", "is Parquet; write it as JSON lines"),
        (b"ARROW1\0\0", "is Arrow; write it as JSON lines"),
        (b"\xff\xff\xff\xff\x10\0\0\0", "is Arrow"),
        (b"PK\x03\x04", "is a zip file"),
        (b"[\n" + GOOD_TEXT.encode() + b"\n]\n", "line 1: a JSON array"),
        (b"{\n" + GOOD_TEXT.encode()[1:], "each line is one whole JSON object"),
        (b"\n \n", "no samples"),
    ],
)  # fmt: skip
def test_files_that_are_no_json_lines_are_named(perta, tmp_path, model, raw, message):
    (tmp_path / "data.jsonl").write_bytes(raw)
    for words in (ESTIMATE, ["eval", "--model", "model", "--data", "data.jsonl"]):
        stderr = perta(*words, check=3).stderr
        assert "data.jsonl: " in stderr and message in stderr
    assert not list(tmp_path.glob("imp*/*"))


# --- the record is of the data that were read


def fifo(path, text):
    """A file that can be read only once."""
    os.mkfifo(path)
    return subprocess.Popen(["sh", "-c", 'printf %s "$1" > "$0"', path, text])


def test_the_hmac_is_of_what_was_parsed(perta, tmp_path, model):
    (tmp_path / "key").write_bytes(b"sixteen bytes, or more")
    text = GOOD_TEXT + "\r\n\n" + GOOD_TEXT  # read once: a second reading would find nothing, or block
    writer = fifo(tmp_path / "data.jsonl", text)
    perta(*ESTIMATE, "--data-key", "key")
    assert writer.wait(60) == 0
    header = next((tmp_path / "imp/mean").glob("*.safetensors")).read_bytes()
    digest = hmac.digest(b"sixteen bytes, or more", text.encode(), "sha256").hex()
    assert f'"perta.data_hmac_sha256":"{digest}"'.encode() in header.replace(b'": "', b'":"')


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, model):
    """Long enough, with blank lines, to be changed while it is read."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(GOOD_TEXT.encode() + b"\n" * (32 << 20) + GOOD_TEXT.encode())
    command = [str(PERTA), "eval", "--model", "model", "--data", "data.jsonl"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        while not is_being_read(run.pid, data):
            assert run.poll() is None, run.stderr.read()
        with data.open("ab") as file:
            file.write(b"\n" + GOOD_TEXT.encode())
        assert "data.jsonl: changed while it was read" in run.stderr.read()
        assert run.wait() == 3


def is_being_read(pid, path):
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.path.realpath(fd) == str(path):
                return int(re.search(r"pos:\s*(\d+)", Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text())[1]) > 0
        except FileNotFoundError:
            pass
    return False


def steps_that_are_stopped_for(tmp_path, change, *flags):
    """Call change() after the first step; returns the status and the output."""
    command = [str(PERTA), *STEPS, "200", *flags]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "patch.steps.perta-partial/scales-1").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        change()
        stderr = run.stderr.read()
        return run.wait(), stderr


def change_data(tmp_path):
    write_lines(tmp_path / "new", [GOOD])
    (tmp_path / "new").replace(tmp_path / "retain.jsonl")


def change_shard(folder):
    def change(tmp_path):
        """Change bytes in place, and restore the modification time."""
        path = sorted((tmp_path / folder).glob("*.safetensors"))[-1]
        was, data = path.stat(), path.read_bytes()
        with path.open("r+b") as file:
            file.seek(len(data) - 4)
            file.write(b"\0\0\0\x3c")
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))

    return change


def change_config(tmp_path):
    path = tmp_path / "full/config.json"
    text = path.read_text()
    (tmp_path / "new").write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 1e-3}))
    (tmp_path / "new").replace(path)


@pytest.mark.parametrize(
    "change, name",
    [
        (change_data, "retain.jsonl: is not what it was when the run began"),
        (change_shard("full"), "full/model"),
        (change_shard("tuned"), "tuned/model"),
        (change_shard("base"), "base/model"),
        (change_config, "full/config.json: changed since it was first read"),
    ],
)
def test_inputs_that_change_between_steps_are_refused(perta, tmp_path, change, name):
    make_folders(tmp_path)
    status, stderr = steps_that_are_stopped_for(tmp_path, lambda: change(tmp_path))
    assert status == 3 and name in stderr and ("chang" in stderr or "not what it was" in stderr)
    assert not (tmp_path / "patch").exists()


def test_a_run_does_not_go_on_with_another_config(perta, tmp_path):
    make_folders(tmp_path)
    assert stop_at(tmp_path, [*STEPS, "2"], "commit", 6)[0] == -signal.SIGKILL
    was = (tmp_path / "full/config.json").read_text()
    change_config(tmp_path)
    assert "cannot continue: config.json was" in perta(*STEPS, "2", "--resume", check=2).stderr
    (tmp_path / "full/config.json").write_text(was)
    perta(*STEPS, "2", "--resume")


def test_steps_refuse_what_can_be_read_once(perta, tmp_path):
    """A second reading would block, or find nothing."""
    make_folders(tmp_path)
    text = (tmp_path / "retain.jsonl").read_text()
    (tmp_path / "retain.jsonl").unlink()
    os.mkfifo(tmp_path / "retain.jsonl")
    said = "not a regular file, but every step reads it again"
    assert f"retain.jsonl: {said}" in perta(*STEPS, "1", check=3).stderr
    words = ["/dev/stdin" if word == "retain.jsonl" else word for word in STEPS]
    assert f"/dev/stdin: {said}" in perta(*words, "1", input=text, check=3).stderr
    assert not list(tmp_path.glob("patch*"))


# --- stop rules that are not reached


def test_a_rule_that_is_not_reached_is_said(perta, tmp_path):
    """The patch exists, and a script can tell."""
    make_folders(tmp_path)
    done = json.loads(perta(*STEPS, "1").stdout)
    assert "reached" not in done
    start, end = (point["forget_probability"] for point in done["path"])
    for flags, reached in (
        (["--stop-probability", (start + end) / 2], True),
        (["--stop-probability", end / 2], False),
        (["--stop-forget", done["path"][1]["forget_loss"] + 1], False),
        (["--stop-forget", 0.1], True),
        (["--stop-probability", end / 2, "--max-retain-rise", "-100"], False),
    ):
        run = perta(*STEPS, "1", "--force", *flags, check=0 if reached else 1)
        assert json.loads(run.stdout)["reached"] is reached
        assert ("not enough is forgotten" in run.stderr) is not reached
        assert reached or flags[0] in run.stderr
        perta("verify", "patch")
    shutil.rmtree(tmp_path / "patch")
