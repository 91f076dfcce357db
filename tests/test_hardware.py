"""Advice for machines nobody here owns, and a look at this one."""

import dataclasses
from types import SimpleNamespace

import psutil
import pytest

from helpers import hardware
from helpers.hardware import Card, Machine, advise, describe, inspect, parse_nvidia_smi, unusable_card

BARE = Machine(
    processor="a processor",
    cores=8,
    memory=64 << 30,
    memory_free=60 << 30,
    disk=".",
    disk_free=100 << 30,
    cards=(),
    python="3.11.7",
    torch="2.13.0",
    torch_cuda=None,
    torch_sees_card=False,
    transformers="5.23.0",
    autodl=False,
)


def machine(name="NVIDIA H200", capability=(9, 0), gb=143, driver="580.65.06", **changes):
    card = Card(name, capability, memory=gb * 10**9, memory_free=gb * 10**9, driver=driver)
    return dataclasses.replace(BARE, **{"cards": (card,), "torch_cuda": "13.0", "torch_sees_card": True} | changes)


def choice(of, topic):
    return next(advice for advice in advise(of) if advice.topic == topic)


@pytest.mark.parametrize(
    ("card", "tag"),
    [
        (dict(), "cu130"),
        (dict(driver="550.90.07"), "cu126"),
        (dict(name="Tesla V100", capability=(7, 0)), "cu126"),
        (dict(name="Tesla T4", capability=(7, 5)), "cu130"),
        (dict(name="RTX 5090", capability=(12, 0)), "cu130"),
        (dict(name="RTX 5090", capability=(12, 0), driver="570.86"), "cu128"),
    ],
)
def test_the_torch_build_follows_driver_and_card(card, tag):
    advice = choice(machine(**card), "torch build")
    assert f"({tag})" in advice.choice and f"--torch-backend={tag}" in advice.command and advice.why


def test_an_old_driver_is_to_be_updated_first():
    advice = choice(machine(driver="470.82.01"), "torch build")
    assert advice.choice == "update the driver" and "470.82.01 is older than 525" in advice.why


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (dict(), "bf16"),
        (dict(name="L40S", capability=(8, 9), gb=48), "bf16"),
        (
            dict(name="A100", capability=(8, 0), gb=39),
            "bf16, for understanding and text-to-image 1024x1024 only",
        ),
        (dict(name="RTX 4090", capability=(8, 9), gb=24), "fp8"),
        (dict(name="Tesla V100", capability=(7, 0), gb=34), "int8"),
    ],
)
def test_the_weight_format_follows_the_memory_the_official_code_needed(card, said):
    advice = choice(machine(**card), "weight format")
    assert advice.choice == said and (" 40.4 GB" in advice.why or "no bfloat16" in advice.why)


def test_attention_is_cudnn_on_hopper_and_sdpa_elsewhere():
    assert choice(machine(), "attention").choice == "cudnn"
    assert choice(machine(capability=(8, 0)), "attention").choice == "sdpa"
    assert choice(BARE, "attention").choice == "sdpa"
    assert choice(machine(capability=(7, 5)), "flash-attn").choice == "leave it out"


def test_a_card_torch_cannot_use_is_named_with_the_cure():
    assert unusable_card(BARE) is None and unusable_card(machine()) is None
    said = unusable_card(machine(torch_cuda=None, torch_sees_card=False))
    assert "NVIDIA H200 (driver 580.65.06)" in said and "a CPU build" in said and "--torch-backend=cu130" in said
    assert "a build for CUDA 13.0" in unusable_card(machine(driver="535.1", torch_sees_card=False))


def test_a_card_that_only_torch_knows_gets_advice_all_the_same():
    """Where nvidia-smi is missing or fails, the driver's version is not known."""
    seen = Card("NVIDIA H200", (9, 0), 143 * 10**9, 143 * 10**9, driver=None)
    advice = choice(dataclasses.replace(machine(), cards=(seen,)), "torch build")
    assert advice.choice == "torch 2.13.0 as it is" and "nvidia-smi" in advice.why
    assert "driver unknown" in dict(describe(dataclasses.replace(machine(), cards=(seen,))))["card 0"]


def test_autodl_gets_its_own_advice():
    topics = {advice.topic for advice in advise(machine(autodl=True))}
    assert {"AutoDL disks", "AutoDL ports", "AutoDL acceleration", "AutoDL kernel"} <= topics
    assert not any(advice.topic.startswith("AutoDL") for advice in advise(machine()))
    assert choice(machine(autodl=True), "download").choice == "the mirror"


def test_nvidia_smi_is_read():
    cards = parse_nvidia_smi("NVIDIA H200, 9.0, 143771, 143000, 580.65.06\nTesla T4, 7.5, 15360, 15000, 550.1\n")
    assert [card.name for card in cards] == ["NVIDIA H200", "Tesla T4"]
    assert cards[0].memory == 143771 << 20 and cards[1].capability == (7, 5)
    assert cards[0].bfloat16 and not cards[1].bfloat16
    with pytest.raises(ValueError):
        parse_nvidia_smi("No devices were found")


def test_a_container_counts_its_own_limit(monkeypatch):
    host = SimpleNamespace(total=64 << 30, available=60 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    limits = {"memory.max": 2 << 30, "memory.current": 1 << 30}
    monkeypatch.setattr(hardware, "_control_group", limits.get)
    assert hardware.main_memory() == (2 << 30, 1 << 30)
    monkeypatch.setattr(hardware, "_control_group", lambda name: None)
    assert hardware.main_memory() == (64 << 30, 60 << 30)


def test_this_machine_is_described():
    found = inspect()
    assert found.cores > 0 and 0 < found.memory_free <= found.memory and found.disk_free > 0
    rows = dict(describe(found))
    assert rows["Python"].startswith("3.") and rows["torch"].startswith(found.torch)
    assert dict(describe(machine()))["card 0"].endswith("driver 580.65.06, bfloat16 yes")
