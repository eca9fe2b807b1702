"""The list of supported families in docs/families.md and README.md.

    python tests/python/families_page.py PERTA [FAMILY...]

compares these families (all, if none is named) with transformers, and writes their rows; rows of
others stay as they are, rows of families that the command does not list go. The order is that of
`perta help families`. test_families_page.py checks that the page is complete."""

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from family_configs import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs/families.md", ROOT / "README.md"
HEAD = "| `model_type` | `architectures` | configurations | error of the loss | of gradients |\n|---|---|---|---|---|\n"


@dataclasses.dataclass
class Row:
    model_type: str
    architecture: str
    configurations: str = "0"
    loss: str = ""
    gradient: str = ""

    def __str__(self):
        return f"| {' | '.join(dataclasses.astuple(self))} |\n"


def listed(perta):
    """The command's own table: model_type and architecture of each family."""
    said = subprocess.run([perta, "help", "families"], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split()) for line in said.splitlines()]


def rows_of(text):
    """The rows of the page, by model_type."""
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in re.findall(r"^\| .*", text, re.M)]
    return {row.model_type: row for row in (Row(*five) for five in cells[1:])}


def replaced(text, mark, new):
    """The text with what is between the mark and <!-- end --> replaced."""
    pattern = rf"(<!-- {mark}[^>]*-->\n).*?(<!-- end -->)"
    assert len(re.findall(pattern, text, re.S)) == 1, mark
    return re.sub(pattern, lambda found: found[1] + new + found[2], text, flags=re.S)


def sentence(families):
    """For README.md: the architectures by their short names."""
    names = dict.fromkeys(re.sub("(ForCausalLM|LMHeadModel)$", "", name) for _, name in families)
    return f"{len(names)} architectures: {', '.join(names)}.\n"


def measured(perta, model_type, architecture):
    from families import outcome_of

    hows = FAMILIES.get(model_type, [])
    with tempfile.TemporaryDirectory() as folder:
        found = [outcome_of(perta, Path(folder) / "run", model_type, how) for how in hows]
    equal = [outcome for outcome in found if outcome.state == "equal"]
    for outcome in found:
        if outcome.state != "equal":
            print(f"{model_type}: {outcome.state}: {outcome.why[-300:]}", file=sys.stderr)
    count = f"{len(equal)} of {len(found)}" if len(equal) < len(found) else f"{len(found)}"
    worst = [f"{max((getattr(o, key) for o in equal), default=0):.0e}" for key in ("loss", "gradient")]
    return Row(model_type, architecture, count, *worst)


def main(perta, *only):
    families = listed(perta)
    text = PAGE.read_text()
    old = rows_of(text)
    new = []
    for model_type, architecture in families:
        known = old.get(model_type, Row(model_type, architecture))
        new.append(measured(perta, model_type, architecture) if not only or model_type in only else known)
    PAGE.write_text(replaced(text, "families", HEAD + "".join(map(str, new))))
    README.write_text(replaced(README.read_text(), "families", sentence(families)))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(str(Path(sys.argv[1]).resolve()), *sys.argv[2:])
