"""The ledger: complete, honest about what was not tested, and the same in both READMEs."""

import dataclasses

import pytest
from conftest import ROOT, SEVEN

from helpers import claims


def test_every_row_has_both_languages_and_lists_its_notebook():
    assert {claim.notebook for claim in claims.CLAIMS} == set(SEVEN)
    assert len({claim.key for claim in claims.CLAIMS}) == len(claims.CLAIMS) == 21
    for claim in claims.CLAIMS:
        assert claim.claim and claim.claim_zh and claim.note and claim.note_zh and claim.evidence, claim.key


def test_what_was_not_tested_says_what_to_run_or_that_nothing_can_settle_it():
    for claim in claims.CLAIMS:
        if claim.verdict == "not testable here":
            assert claim.command or "nothing can settle it" in claim.note, claim.key


def test_commands_are_commands_and_those_of_others_say_so():
    for claim in claims.CLAIMS:
        assert ", in " not in claim.command, claim.key
        assert bool(claim.foreign) == bool(claim.command and not claim.command.startswith("make run")), claim.key
    for lang, said in (("en", "not tried here"), ("zh", "此处未试")):
        assert claims.markdown(lang).count(said) == sum(bool(claim.foreign) for claim in claims.CLAIMS) == 4


def test_a_verdict_is_one_of_four():
    with pytest.raises(ValueError, match="'proven' is not one of reproduced"):
        dataclasses.replace(claims.CLAIMS[0], verdict="proven")


def test_the_evidence_in_this_repository_exists():
    for claim in claims.CLAIMS:
        for part in claim.evidence.split("; "):
            if part.startswith(("notebooks/", "helpers/", "tests/")):
                assert (ROOT / part).is_file(), f"{claim.key}: {part}"


def test_rows_and_show_hold_a_notebooks_claims():
    assert [claim.key for claim in claims.rows("04_editing")] == ["both-encoders-edit"]
    assert "shards" in str(claims.show("01_download")) and "不成立" in str(claims.show("01_download", "zh"))
    with pytest.raises(ValueError, match="no rows for 09_x; it has rows for 00_setup"):
        claims.rows("09_x")
    with pytest.raises(ValueError, match="en, zh"):
        claims.markdown("fr")


@pytest.mark.parametrize(("lang", "name"), claims.READMES.items())
def test_the_readmes_hold_the_generated_ledger(lang, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert claims.rewrite(text, lang) == text, "renew it: python -m helpers.claims --write"


def test_rewriting_touches_only_the_ledger():
    text = "before\n<!-- ledger:start -->\nstale rows\n<!-- ledger:end -->\nafter\n"
    renewed = claims.rewrite(text, "en")
    assert renewed.startswith("before\n<!-- ledger:start -->\n| claim |")
    assert renewed.endswith("|\n<!-- ledger:end -->\nafter\n")
    assert "stale rows" not in renewed and claims.rewrite(renewed, "en") == renewed
    with pytest.raises(ValueError, match="ledger:start"):
        claims.rewrite("no markers", "en")
