"""`make bench-quality` on a model that takes seconds, so that it keeps working."""

import itertools
import json
import subprocess
import sys

import pytest
from conftest import PERTA, ROOT
from test_limits import sanitized

for module in ("torch", "transformers", "matplotlib"):
    pytest.importorskip(module, reason="examples/ or bench/requirements.txt is not installed")
sys.path.append(str(ROOT / "bench/quality"))
METHODS = (
    "tv;grad, full;grad, full, conflict-aware;signed-backoff;signed-hold;"
    "own gradient;own gradient, box 0.2;tuned by LoRA;NPO + retain, rate 1e-3"
)


@sanitized
def test_curves_are_measured_and_written_down(tmp_path):
    command = [sys.executable, ROOT / "bench/quality/run.py", PERTA.parent, tmp_path / "work"]
    command += ["--model", "tiny", "--seeds", "1", "--methods", METHODS, "--threads", "1"]
    subprocess.run([*command, "--results", tmp_path], check=True, capture_output=True)
    repair = [sys.executable, ROOT / "bench/quality/repair.py", *command[2:6], "--seeds", "1"]
    subprocess.run([*repair, "--results", tmp_path], check=True, capture_output=True)
    seed = json.loads((tmp_path / "tiny.json").read_text())["seeds"]["1"]
    assert seed["full"]["forget"] > 0.3 > 0.1 > seed["gold"]["forget"]
    assert list(seed["curves"]) == METHODS.split(";")
    for name, points in seed["curves"].items():
        assert points[0] == {"x": 0, "evaluations": 0, "text": None} | seed["full"], name
        assert len(points) > 2
    assert seed["curves"]["tv"][-1]["forget"] < 0.1 * seed["full"]["forget"]
    assert "| signed-backoff |" in (tmp_path / "tiny.md").read_text()
    repaired = json.loads((tmp_path / "tiny-repair.json").read_text())["1"]
    for edit in ("own gradient", "tv", "own gradient, half"):
        assert repaired[edit][0]["forget"] < 0.5 * seed["full"]["forget"]
        assert repaired[edit][-1]["retain"] != repaired[edit][0]["retain"]
        assert f"| {edit} | 8 | 0.01 | 16 |" in (tmp_path / "tiny-repair.md").read_text()
    assert (tmp_path / "tiny.svg").read_text().rstrip().endswith("</svg>")


@sanitized
def test_what_lasts_is_measured_and_written_down(tmp_path):
    names = ("tv", "own gradient", "NPO + retain, rate 1e-3", "RMU, rate 0.1")
    command = [sys.executable, ROOT / "bench/quality/lasting.py", PERTA.parent, tmp_path / "work"]
    command += ["--model", "tiny", "--seeds", "1", "--draws", "1", "--results", tmp_path]
    command += ["--methods", ";".join(names)]
    subprocess.run(command, check=True, capture_output=True)
    written = (tmp_path / "tiny.json").read_bytes()
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "tiny.json").read_bytes() == written  # nothing is done twice
    seed = json.loads(written)["seeds"]["1"]
    gold = seed["gold"]["asked"]["forget"]
    for name in ("tv", "NPO + retain, rate 1e-3"):
        row = seed["edits"][name]
        assert row["reached"] and row["asked"]["forget"] <= gold, name
        assert len(row["taught"]) == len(row["rounded"]) == 5
        assert row["measures"]["forget"]["probability"] == pytest.approx(row["asked"]["forget"])
        assert row["rounded"]["int8"] == pytest.approx(row["asked"]["forget"], rel=0.1)
        assert all(of[0]["taught"][-1] > 2 * of[0]["rest"][-1] for of in row["taught"].values())
    assert "| own gradient | " in (tmp_path / "tiny.md").read_text()


def test_reteaching_leaves_the_model_and_the_rest_alone(tmp_path):
    """The rest is not taught, and the model given stays as it is."""
    import reteach
    import torch
    import train

    torch.set_num_threads(1)
    spec, parts = train.SPECS["tiny"], train.make_models("tiny", 1, tmp_path, None)
    taught, rest = reteach.draw_of(parts.forget, 1)
    assert len(taught) == 3 and len(rest) == 9
    assert sorted(map(str, taught + rest)) == sorted(map(str, parts.forget))
    assert reteach.draw_of(parts.forget, 2)[0] != taught
    model = train.load(tmp_path / "base")
    for attack in (reteach.Attack(3e-3), reteach.Attack(3e-2, 4)):
        curves = [reteach.curve(model, parts.forget, attack, 1, spec) for _ in range(2)]
        assert curves[0] == curves[1]
        assert curves[0]["taught"][-1] > 3 * curves[0]["rest"][-1]


def test_steering_trains_three_weights_at_most(tmp_path):
    import curves
    import rivals
    import torch
    import train

    torch.set_num_threads(1)
    spec, parts = train.SPECS["tiny"], train.make_models("tiny", 1, tmp_path, None)
    bench = curves.Bench(PERTA, tmp_path, parts, "f32")
    before = dict(train.load(tmp_path / "full").named_parameters())
    done, model, _ = next(itertools.islice(rivals.updates(bench, rivals.RMU, 1e-2, spec), 2, None))
    assert done == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}


def test_perta_and_pytorch_agree(tmp_path):
    """`perta eval` reports what the models say in PyTorch, which trained them."""
    import curves
    import torch
    import train

    torch.set_num_threads(1)
    parts = train.make_models("tiny", 1, tmp_path, None)
    bench = curves.Bench(PERTA, tmp_path, parts, "f32")
    bench.write_data()
    with torch.no_grad():
        losses = train.losses(train.load(tmp_path / "full"), parts.held_out)
    assert bench.ask("full")["held_out"] == pytest.approx(losses.neg().exp().mean().item(), rel=1e-4)


def test_a_held_point_takes_no_gradient_of_the_forget_set():
    import methods

    path = [{"forget_probability": p} for p in (0.9, 0.4, 0.1, 0.2, 0.1)]
    assert methods.gradients(path, 0.1) == (4 + 3) / 2


def test_figures_are_read_off_a_curve():
    import curves

    points = [{"forget": f, "held_out": h, "other": h, "evaluations": e}
              for f, h, e in ((1.0, 1.0, 0), (0.5, 0.9, 1), (0.1, 0.5, 2))]  # fmt: skip
    assert curves.best_at(points, 0.3, "held_out") == pytest.approx(0.7)
    assert curves.best_at(points, 0.05, "held_out") is None
    full, gold = {"forget": 1.0, "held_out": 1.0}, {"forget": 0.1}
    read = curves.figures(points, full, gold)
    assert read["area"] == pytest.approx(0.635) and read["evaluations"] == 2
    assert read["held_out_at_gold"] == 0.5 and read["held_out_at_0.03"] is None
