"""Time and memory: what is computed is compared with counting, what is measured must see what is there."""

import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from helpers import bench, hub, load_bagel
from helpers.bagel.config import RELEASED
from helpers.bench import Cost, Limits, Measured

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bagel():
    return load_bagel(ROOT / "tests" / "reference" / "checkpoint", weights="fp32", device="cpu")


@pytest.fixture(scope="module")
def measured(bagel):
    return bench.verbs(bagel, "a red circle", "Describe it.", "make it blue", 64, 4, 5, 2, 1)


def test_the_arithmetic_of_the_7b_model_is_the_known_one():
    linear = 2 * bench.expert_parameters(RELEASED) * 4098
    assert linear == pytest.approx(53.5e12, rel=1e-3)
    assert bench.forward_flop(RELEASED, 4096) == pytest.approx(60.2e12, rel=1e-2)
    loaded = SimpleNamespace(config=RELEASED, model=SimpleNamespace(dtype=torch.bfloat16))
    assert bench.token_bytes(loaded) == pytest.approx(14.1e9, rel=1e-2)


def test_the_linear_parts_are_those_that_torch_counts(bagel):
    decoder = bagel.model.language_model.model
    tokens, places = (
        torch.zeros(1, 18, bagel.config.decoder.hidden_size),
        torch.zeros(1, 18, dtype=torch.long),
    )
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        decoder(tokens, 2, places, lambda _layer, q, _k, _v: q)
    assert counter.get_total_flops() == 2 * bench.expert_parameters(bagel.config) * 18


@pytest.mark.parametrize(
    "settings", [{}, {"cfg_text_scale": 1.0}, {"cfg_interval": (0.0, 1.0)}, {"cfg_img_scale": 2.0}]
)
def test_the_forwards_of_a_picture_are_those_that_happen(bagel, settings):
    sizes = []
    hook = bagel.model.language_model.model.register_forward_pre_hook(
        lambda _module, inputs: sizes.extend([inputs[0].shape[1]] * len(inputs[0]))  # a row for each branch
    )
    made = bagel.generate("a red circle", height=64, width=64, num_timesteps=9, **settings)
    hook.remove()
    assert bench.forwards(made.settings) == sizes.count(4 * 4 + 2)


def test_ninety_forwards_make_a_picture_with_the_official_settings(bagel):
    made = bagel.generate("a red circle", height=16, width=16)
    assert bench.forwards(made.settings) == 90


def test_every_verb_is_measured(measured):
    assert [one.verb for one in measured] == [
        "understand",
        "generate",
        "edit",
        "predict_frames",
        "interleave",
    ]
    assert all(one.seconds > 0 and one.memory >= 0 for one in measured)
    assert [one.made for one in measured[1:3]] == ["1 picture of 64x64"] * 2
    assert measured[3].made == "2 frames of 64x64"


@pytest.mark.parametrize(("tokens", "speed"), [(4, 2.0), (1, None)])
def test_the_speed_of_a_text_leaves_the_reading_of_the_picture_out(monkeypatch, tokens, speed):
    def understand(_picture, _question, max_new_tokens):
        return SimpleNamespace(seconds=0.5, token_ids=[7] * min(tokens, max_new_tokens))

    def measure(_bagel, verb, made, call, _before):
        call()
        return Measured(verb, made, 2.0, 0)

    monkeypatch.setattr(bench, "_measure", measure)
    found = bench._text(SimpleNamespace(understand=understand), None, "What?", 9, 0)
    assert (found.made, found.tokens_per_second) == (f"{tokens} tokens", speed)


def test_memory_that_a_call_takes_is_seen():
    with bench._Memory(CPU, psutil.Process().memory_info().rss) as memory:
        taken = b"x" * 200_000_000
        deadline = time.monotonic() + 30
        while memory.bytes < 150e6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 150e6 < memory.bytes < 400e6
    del taken


def test_on_a_card_the_peak_is_that_of_torch(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", started.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    with bench._Memory(torch.device("cuda:1"), before=3) as memory:
        assert started == [torch.device("cuda:1")]
    assert memory.bytes == 7


def test_costs_hold_every_pair_of_size_and_steps(bagel):
    found = bench.costs(bagel, "a red circle", [32, 64], [2, 4], seed=1)
    assert [(one.side, one.num_timesteps, one.tokens) for one in found] == [
        (32, 2, 4),
        (32, 4, 4),
        (64, 2, 16),
        (64, 4, 16),
    ]
    assert all(one.flop == one.forwards * bench.forward_flop(bagel.config, one.tokens) for one in found)
    assert bench.plot_costs(found, Limits("cpu", "float32", 1e9, 1e9)).image.size == (1000, 360)


def test_the_limits_are_rates_of_this_machine(monkeypatch):
    monkeypatch.setattr(bench, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(bench, "_COPY", {"cpu": 1000})
    monkeypatch.setattr(bench, "_fastest", lambda _device, work: (work(), 0.5)[1])
    found = bench.limits(CPU, torch.bfloat16)
    assert found == Limits("cpu", "bfloat16", matmul=4 * 64**3, copy=4000.0)


def test_the_model_stands_beside_the_machine(bagel):
    texts = [
        Measured("understand", "9 tokens", 1.0, 0, 10.0),
        Measured("generate", "1 picture", 1.0, 2_000_000),
    ]
    picture = Cost(side=64, num_timesteps=2, tokens=16, forwards=2, flop=3e9, seconds=2.0)
    limit = Limits("cpu", "float32", matmul=15e9, copy=100.0 * bench.token_bytes(bagel))
    table = bench.limit_table(limit, bagel, texts, picture)
    assert table.rows[0] == ("arithmetic, GFLOP/s", "15.0", "1.5", "10%")
    assert table.rows[1][-1] == "10%"
    assert bench.verb_table(texts).rows[0] == ("understand", "9 tokens", "1.00", "0", "10")
    assert bench.verb_table(texts).rows[1] == ("generate", "1 picture", "1.00", "2", "")
    assert len(bench.limit_table(limit, bagel, texts[1:], picture).rows) == 1


def test_the_blogs_rows_stand_beside_this_run(bagel, measured):
    rows = bench.blog_table(bagel, measured).rows
    assert [row[0].split(":")[0] for row in rows[:3]] == ["bfloat16", "DFloat11", "INT8"]
    assert rows[-1][0] == "(this run)" and "weights not included" in rows[-1][1]


def test_weights_in_memory_are_those_of_the_files(bagel):
    tensors = hub.shapes(ROOT / "tests" / "reference" / "checkpoint")
    assert bench.weight_bytes(bagel) == 4 * sum(hub.parameters_by_part(tensors).values())


def test_the_parts_of_the_7b_model_are_the_published_ones():
    tensors = hub.official_shapes()
    parts = hub.parameters_by_part(tensors)
    assert parts["understanding expert"] == parts["generation expert"] == pytest.approx(6.53e9, rel=1e-3)
    assert parts["autoencoder"] == pytest.approx(84e6, rel=1e-2)
    assert sum(parts.values()) == pytest.approx(14.69e9, rel=1e-3)
