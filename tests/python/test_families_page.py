"""docs/families.md and README.md list the families that the command has, and say with how many
configurations each was compared."""

from conftest import PERTA
from families_page import FAMILIES, PAGE, README, listed, replaced, rows_of, sentence

AGAIN = "scripts/families.sh BUILD FAMILY... writes it anew"


def test_the_page_lists_the_families_of_the_command():
    rows = rows_of(PAGE.read_text()).values()
    assert [(row.model_type, row.architecture) for row in rows] == listed(PERTA), AGAIN


def test_each_family_was_compared_with_all_of_its_configurations():
    for row in rows_of(PAGE.read_text()).values():
        equal, total = (int(row.configurations.split()[i]) for i in (0, -1))
        assert equal and total == len(FAMILIES[row.model_type]), f"{row.model_type}: {AGAIN}"


def test_the_readme_lists_them():
    text = README.read_text()
    assert replaced(text, "families", sentence(listed(PERTA))) == text, AGAIN
