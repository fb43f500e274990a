"""The list of planted bugs fits the code; `python tests/faults/mutants.py` plants them all (minutes)."""

import ast

import pytest
from mutants import MUTANTS, ROOT, plant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_bug_can_be_planted_and_its_test_exists(mutant):
    path, text, bad = plant(mutant)
    assert bad != text and path.read_text() == text
    ast.parse(bad)
    file, _, function = mutant.test.partition("::")
    assert f"def {function}(" in (ROOT / "tests" / file).read_text() or not function


def test_there_are_enough():
    assert len(MUTANTS) >= 15 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
