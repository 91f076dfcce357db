"""Which weight format fits which card: the memory model against measurements, and what is recommended."""

import json

import pytest
from conftest import ROOT

from helpers.doctor import KNOWN, known_card, main, memory_advice
from helpers.fitting import BESIDE, FORMATS, expected_peak, fits, recommended, weight_bytes
from helpers.hardware import Card

BY_NAME = {form.name: form for form in FORMATS}
# Rows of the bench -> the work that they measure.
MEASURED = {
    "first token after a 980x980 picture": "understanding",
    "text-to-image 1024x1024": "text-to-image 1024x1024",
    "edit 1024x1024": "editing 1024x1024",
}


def card(gigabytes, capability=(8, 9)):
    return Card("a card", capability, int(gigabytes * 1e9), int(gigabytes * 1e9), driver=None)


def test_expected_peaks_are_within_seven_percent_of_what_an_h200_took():
    rows = json.loads((ROOT / "outputs" / "h200" / "bench.json").read_text())["rows"]
    compared = 0
    for row in rows:
        if row["work"] in MEASURED:
            expected = expected_peak(BY_NAME[row["weights"]], MEASURED[row["work"]])
            assert expected == pytest.approx(row["peak_allocated"], rel=0.07), row["work"]
            compared += 1
    assert compared == 6


def test_the_weights_are_those_that_a_load_asks_for():
    """The sum over the names of the released tensors, and that over the modules of a model of its sizes."""
    import torch

    from helpers.bagel.autoencoder import Autoencoder
    from helpers.bagel.config import RELEASED
    from helpers.bagel.model import Bagel
    from helpers.checkpoint import _bytes

    for experts in ("all", "understanding"):
        with torch.device("meta"):
            model = Bagel(RELEASED, (0, 1), draws=experts == "all")
            autoencoder = _bytes(Autoencoder(RELEASED.autoencoder), torch.float32) if experts == "all" else 0
        for form in FORMATS:
            dtype = torch.float16 if form.name == "fp16" else torch.bfloat16
            needed = _bytes(model, dtype, form.name) + autoencoder
            assert weight_bytes(form, experts) == pytest.approx(needed, rel=1e-3), (form.name, experts)


@pytest.mark.parametrize(
    ("name", "format", "works"),
    [
        ("H200", "bf16", 3),
        ("A100 40GB", "bf16", 3),
        ("NVIDIA GeForce RTX 4090", "fp8", 3),
        ("rtx 3090", "int8", 3),
        ("V100 32GB", "int8", 3),
        ("RTX 4080 super", "nf4", 3),
        ("RTX 3060", "nf4", 1),
        ("RTX 3080", None, 0),
    ],
)
def test_recommended_formats(name, format, works):
    """The first that fits for most: nothing is lost where nothing must be."""
    best = recommended(known_card(name))
    assert (best and best.format.name) == format
    assert len(best.works if best else []) == works


def test_a_card_must_be_able_to_compute_in_a_format():
    by_name = {fit.format.name: fit for fit in fits(card(200, (7, 5)))}
    assert not by_name["bf16"].works and not by_name["fp8"].works and not by_name["df11"].works
    assert len(by_name["fp16"].works) == len(by_name["int4"].works) == len(BESIDE)


def test_what_fits_grows_with_the_memory():
    most = 0
    for gigabytes in range(8, 60):
        works = sum(len(fit.works) for fit in fits(card(gigabytes)))
        assert works >= most
        most = works
    assert most == len(FORMATS) * len(BESIDE)


def test_the_command_shows_the_recommended_format_first(capsys):
    assert main(["--card", "RTX 4090"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("recommended: fp8, the first that fits for everything")
    assert 'weights="fp8"' in lines[2]
    rows = [line.split()[0] for line in lines[5 : 5 + len(FORMATS)]]
    assert rows[0] == "fp8" and sorted(rows) == sorted(BY_NAME)
    assert "(31.9)" in next(line for line in lines if line.startswith("bf16"))
    assert "No format of the 7B model fits; the tiny model does" in memory_advice(known_card("RTX 3080"))


def test_the_command_knows_this_machine_and_refuses_unknown_cards(capsys):
    assert main([]) == 0
    assert "torch build: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as wrong:
        main(["--card", "RTX 9999"])
    assert wrong.value.code == 2
    told = capsys.readouterr().err
    assert "card 'RTX 9999' is not known here" in told and all(name in told for name in KNOWN)
