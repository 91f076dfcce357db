"""Time and memory: what is computed is compared with counting, what is measured must see what is there."""

import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import bench, hub, load_bagel
from helpers.bagel.config import RELEASED
from helpers.bagel.flow import FlowSettings
from helpers.bench import Asked, Bench, Limits, Row, floors, measuring, rates, tables, works
from helpers.bench.loss import Drawn, losses, psnr
from helpers.bench.measuring import Call, Clock, Memory

CPU = torch.device("cpu")
LIMIT = Limits("cpu", "float32", matmul=1e9, copy=1e9)
OFFICIAL = {
    "cfg_text_scale": 4.0, "cfg_img_scale": 1.0, "cfg_interval": (0.4, 1.0), "timestep_shift": 3.0, "num_timesteps": 50,
    "cfg_renorm_min": 0.0, "cfg_renorm_type": "global", "step_cache": None, "height": 1024, "width": 1024,
}  # fmt: skip
EDIT = OFFICIAL | {"cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0)}
WORKS = [
    "text-to-image 128x128",
    "text-to-image 128x128, step cache",
    "text-to-image 64x64",
    "text-to-image 64x64, batch of 8",
    "edit 128x128",
    "first token after a 126x126 picture",
    "the tokens after it, up to 128",
    "autoencoder, encode 128x128",
    "autoencoder, decode 128x128",
]


@pytest.fixture(scope="module")
def bagel():
    return load_bagel(ROOT / "tests" / "reference" / "checkpoint", weights="fp32", device="cpu")


@pytest.fixture(scope="module")
def tiny():
    """The tiny model with the smallest bench of it."""
    loaded, loading = measuring.load("tiny", "fp32", "cpu")
    asked = Asked("a red circle", "Describe the picture.", "make it blue", num_timesteps=3, seed=1, runs=1)
    return Bench(loaded, "fp32", LIMIT, asked), loading


@pytest.fixture(scope="module")
def rows(tiny):
    return list(tiny[0].rows())


@pytest.fixture
def counted(bagel, monkeypatch):
    """What the decoder really does: its tokens, and the pairs of a token and one that it sees."""
    seen = SimpleNamespace(tokens=0, pairs=0)
    kernel = bagel.model.kernel

    def spy(q, k, v, causal=False, valid=None):
        (samples, n), m = q.shape[:2], k.shape[1]
        seen.pairs += samples * (n * (m - n) + n * (n + 1) / 2 if causal else n * m)
        return kernel(q, k, v, causal, valid)

    monkeypatch.setattr(bagel.model, "kernel", spy)

    def tokens(_module, inputs):
        seen.tokens += inputs[0].shape[0] * inputs[0].shape[1]

    hook = bagel.model.language_model.model.register_forward_pre_hook(tokens)
    yield seen
    hook.remove()


def decoder_work(bagel, seen):
    """The arithmetic of counted tokens and pairs."""
    decoder = bagel.config.decoder
    width = decoder.num_attention_heads * decoder.head_dim
    return floors.Arithmetic(2 * floors.expert_parameters(bagel.config) * seen.tokens, 4 * width * seen.pairs)


def close(one, other):
    return (one.linear, one.other) == pytest.approx((other.linear, other.other), rel=1e-9)


# Floors


def test_the_arithmetic_of_the_7b_model_is_the_known_one():
    assert 2 * floors.expert_parameters(RELEASED) * 4098 == pytest.approx(53.5e12, rel=1e-3)
    assert floors.block_pass(RELEASED, 4098).flop == pytest.approx(60.3e12, rel=1e-2)
    assert floors.picture_from_text(RELEASED, OFFICIAL, 10).flop == pytest.approx(5.4e15, rel=2e-2)
    assert floors.edited_picture(RELEASED, EDIT, 10).flop == pytest.approx(10.3e15, rel=2e-2)


def test_a_step_cache_takes_19_of_49_passes_and_17_of_41():
    flow = FlowSettings.among(OFFICIAL | {"step_cache": "taylorseer"})
    assert floors.passes(flow, {"conditional": 9, "text": 0}) == {"conditional": 19, "text": 17}


def test_a_text_token_reads_the_expert_the_output_layer_and_the_context():
    loaded = SimpleNamespace(config=RELEASED, model=SimpleNamespace(dtype=torch.bfloat16))
    assert floors.token_bytes(loaded, "bf16") == pytest.approx(14.1e9, rel=1e-2)
    saved = floors.token_bytes(loaded, "bf16") - floors.token_bytes(loaded, "fp8")
    assert saved == floors.expert_parameters(RELEASED)
    cache = floors.token_bytes(loaded, "bf16", context=4902) - floors.token_bytes(loaded, "bf16")
    assert cache == 4902 * 28 * 2 * 4 * 128 * 2  # layers, keys and values, heads of 128 numbers of 2 bytes


def test_the_linear_parts_are_those_that_torch_counts(bagel):
    decoder = bagel.model.language_model.model
    tokens, places = torch.zeros(1, 18, bagel.config.decoder.hidden_size), torch.zeros(1, 18, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        decoder(tokens, 2, places, lambda _layer, q, _k, _v: q)
    assert counter.get_total_flops() == 2 * floors.expert_parameters(bagel.config) * 18


SETTINGS = [{}, {"cfg_text_scale": 1.0}, {"cfg_interval": (0.0, 0.9)}, {"step_cache": "taylorseer"}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_decoder_does_what_is_counted_for_a_picture(bagel, counted, settings):
    prompt = "a red circle"
    made = bagel.generate(prompt, height=64, width=48, num_timesteps=12, **settings)
    words = len(bagel.codec.encode(prompt))
    expected = floors.picture_from_text(bagel.config, made.settings, words)
    done = decoder_work(bagel, counted) + floors.decoding(bagel.config.autoencoder, (64, 48))
    assert close(expected, done)


@pytest.mark.parametrize("settings", [*SETTINGS, {"cfg_img_scale": 1.0}])
def test_the_decoder_does_what_is_counted_for_an_edit(bagel, counted, settings):
    picture, instruction = Image.new("RGB", (48, 64), "white"), "make it blue"
    made = bagel.edit(picture, instruction, num_timesteps=12, **settings)
    words = len(bagel.codec.encode(instruction))
    expected = floors.edited_picture(bagel.config, made.settings, words)
    config, size = bagel.config, (made.image.height, made.image.width)
    done = decoder_work(bagel, counted) + floors.encoding(config.autoencoder, size)
    done += floors.decoding(config.autoencoder, size) + floors._vit(config.vision, (70, 42))
    assert close(expected, done)


def test_the_decoder_does_what_is_counted_for_a_first_token(bagel, counted):
    question, size = "What is it?", (64, 48)
    bagel.understand(Image.new("RGB", (48, 64)), question, max_new_tokens=1)
    words, seen = len(bagel.codec.encode(question)), works.block_tokens(bagel.config, size, False)
    expected = floors.looking(bagel.config, size) + floors.text_pass(bagel.config, words, seen)
    expected += floors.text_pass(bagel.config, 1, seen + words)  # the start token
    assert close(expected, decoder_work(bagel, counted) + floors._vit(bagel.config.vision, (70, 42)))


def test_encoders_and_autoencoder_are_what_torch_counts(bagel):
    config, pixels, latents = bagel.config, torch.zeros(1, 3, 70, 56), torch.zeros(1, 16, 4, 6)
    parts = [
        (bagel.model.vit_model, pixels, floors._vit(config.vision, (70, 56))),
        (bagel.autoencoder.decode, latents, floors.decoding(config.autoencoder, (32, 48))),
        (bagel.autoencoder.encode, torch.zeros(1, 3, 32, 48), floors.encoding(config.autoencoder, (32, 48))),
    ]
    for part, given, expected in parts:
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            part(given)
        assert counter.get_total_flops() == expected.flop > 0


def test_fp8_speeds_up_the_linear_layers_alone():
    work = floors.Arithmetic(linear=6e9, other=2e9)
    assert work.seconds(LIMIT) == 8.0
    assert work.seconds(replace(LIMIT, fp8=2e9)) == 5.0


def test_ninety_forwards_make_a_picture_with_the_official_settings(bagel):
    assert floors.forwards(bagel.generate("a red circle", height=16, width=16).settings) == 90


def test_weights_in_memory_are_those_of_the_files(bagel):
    tensors = hub.shapes(ROOT / "tests" / "reference" / "checkpoint")
    assert bench.weight_bytes(bagel) == 4 * sum(hub.parameters_by_part(tensors).values())


def test_the_parts_of_the_7b_model_are_the_published_ones():
    tensors = hub.official_shapes()
    parts = hub.parameters_by_part(tensors)
    assert parts["understanding expert"] == parts["generation expert"] == pytest.approx(6.53e9, rel=1e-3)
    assert parts["autoencoder"] == pytest.approx(84e6, rel=1e-2)
    assert sum(parts.values()) == pytest.approx(14.69e9, rel=1e-3)


# Rates


def test_the_limits_are_rates_of_this_machine(monkeypatch):
    monkeypatch.setattr(rates, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(rates, "_COPY", {"cpu": 1000})
    monkeypatch.setattr(rates, "_fastest", lambda _device, work: (work(), 0.5)[1])
    found = bench.limits(CPU, torch.bfloat16, fp8=True)  # which a processor has none of
    assert found == Limits("cpu", "bfloat16", matmul=4 * 64**3, copy=4000.0, fp8=None)


def test_an_fp8_product_has_a_scale_for_each_row_and_column(monkeypatch):
    def product(left, right, rows, columns, out_dtype, use_fast_accum):
        assert left.dtype == right.dtype == torch.float8_e4m3fn and right.stride() == (1, 64)
        assert (rows.shape, columns.shape) == ((64, 1), (1, 64))

    monkeypatch.setattr(rates, "_MATRIX", {"cuda": 64})
    monkeypatch.setattr(rates, "_fastest", lambda _device, work: (work(), 0.5)[1])
    monkeypatch.setattr(torch, "_scaled_mm", product)
    assert rates._fp8(CPU) == 4 * 64**3

    def refuse(*_values, **_more):
        raise RuntimeError("compute capability")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert rates._fp8(CPU) is None


# Measuring


class Later:
    """A clock whose next readings are given."""

    def __init__(self, monkeypatch, *readings):
        monkeypatch.setattr(measuring.time, "perf_counter", iter(readings).__next__)


def test_the_time_of_a_picture_is_split_at_its_steps(monkeypatch):
    # Prefill 0.3, three steps of 0.5, 0.5 and 0.4, decode 0.2.
    Later(monkeypatch, 10.0, 10.8, 11.3, 11.7, 11.9, 11.9)
    latents = [torch.full((1, 2, 4), float(step)) for step in range(3)]

    def call(on_step):
        for step, latent in enumerate(latents):
            on_step(step, 0.5, latent)
        latents[0].fill_(9)  # what a model may do with its own tensor
        return "a picture"

    found = measuring.timed(call, CPU)
    assert found.seconds == pytest.approx(1.9) and found.result == "a picture"
    assert found.split == pytest.approx((0.3, 1.4, 0.2))
    assert (found.first_latent == 0).all()


@pytest.mark.parametrize(("steps", "split"), [(0, (None,) * 3), (1, (None,) * 3), (2, (0.0, 1.0, 0.0))])
def test_below_two_steps_there_is_no_split_and_no_part_is_negative(steps, split):
    clock = Clock(CPU)
    clock.marks = [0.5 * step for step in range(steps)] + [0.5]
    assert clock.split(0.9) == split


def test_on_a_card_the_marks_are_events_of_its_own_stream(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.stream, self.milliseconds = stream, next(readings)

        def elapsed_time(self, later):
            return later.milliseconds - self.milliseconds

    readings = iter([800.0, 1300.0, 1700.0, 1900.0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = Clock(torch.device("cuda:1"))
    for step in range(3):
        clock(step, 0.5, torch.zeros(1))
    clock.mark()
    assert clock.split(1.9) == pytest.approx((0.3, 1.4, 0.2))
    assert {mark.stream for mark in clock.marks} == {"stream of cuda:1"}


@pytest.mark.parametrize(
    ("seconds", "middle"), [([9.0, 3.0, 1.0, 2.0], 2.0), ([9.0, 4.0, 3.0], 3.0), ([9.0, 5.0], 5.0)]
)
def test_a_row_is_the_median_run_and_the_first_call_stands_apart(monkeypatch, seconds, middle):
    calls = iter([Call(one, (one / 4, one / 2, one / 4), f"made in {one}", None) for one in seconds])
    monkeypatch.setattr(measuring, "timed", lambda _call, _device: next(calls))
    row, last = measuring.measure("work", "fp32", None, len(seconds) - 1, CPU, 0)
    assert (row.first_seconds, row.runs, row.seconds) == (9.0, tuple(seconds[1:]), middle)
    assert (row.prefill, row.denoise, row.decode) == (middle / 4, middle / 2, middle / 4)
    assert last.result == f"made in {seconds[-1]}"


def test_memory_that_a_call_takes_is_seen():
    with Memory(CPU, psutil.Process().memory_info().rss) as memory:
        taken = b"x" * 200_000_000
        deadline = time.monotonic() + 30
        while memory.allocated < 150e6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 150e6 < memory.allocated < 400e6 and memory.reserved is None
    del taken


def test_on_a_card_the_peaks_are_those_of_torch(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", started.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 8)
    with Memory(torch.device("cuda:1"), before=3) as memory:
        assert started == [torch.device("cuda:1")]
    assert (memory.allocated, memory.reserved) == (7, 8)


def test_an_error_becomes_a_row_without_this_machines_folders():
    found = measuring.failed("edit", "bf16", OSError("no /home/anna/x/BAGEL-7B/ema.safetensors at 3 TFLOP/s\nmore"))
    assert found.error == "OSError: no ema.safetensors at 3 TFLOP/s"
    assert measuring.failed("edit", "bf16", ValueError()).error == "ValueError: "
    assert found.share is None and found.values()["share"] is None


# Works


def test_every_work_is_measured_beside_its_floor(tiny, rows):
    assert [row.work for row in rows] == WORKS
    assert [row.error for row in rows] == [None] * 9
    assert all(row.seconds > 0 and row.first_seconds > 0 and row.floor_seconds > 0 for row in rows)
    assert all(row.share == row.floor_seconds / row.seconds for row in rows)
    assert [row.denoise is not None for row in rows] == [True] * 5 + [False] * 4
    assert [row.count for row in rows[:6]] == [1, 1, 1, 8, 1, 1]
    assert (tiny[1].work, tiny[1].weights) == ("loading", "fp32") and tiny[1].seconds > 0


def test_a_batch_is_eight_times_one_picture(rows):
    assert rows[3].floor_seconds == pytest.approx(8 * rows[2].floor_seconds)


def test_the_speed_of_a_text_leaves_the_reading_of_the_picture_out(tiny, rows):
    first, tokens = rows[5:7]
    assert tokens.first_token_seconds == first.first_token_seconds == first.seconds
    assert tokens.tokens_per_second == pytest.approx(tokens.count / tokens.seconds)
    answer = tiny[0].bagel.understand(works.scene(126), "Describe the picture.", max_new_tokens=128)
    assert tokens.count == len(answer.token_ids) - 1
    context = 81 + 2 + len(tiny[0].bagel.codec.encode("Describe the picture."))
    reads = [floors.token_bytes(tiny[0].bagel, "fp32", context + 1 + n) for n in range(1, len(answer.token_ids))]
    assert tokens.floor_seconds == pytest.approx(sum(reads) / LIMIT.copy)


WHOLE = Row("tokens", "fp32", 5, seconds=3.0, runs=(3.0, 4.0), first_seconds=7.0, floor_seconds=0.5)


def test_tokens_after_the_first_take_what_a_whole_answer_takes_beyond_it():
    found = works.after_first(WHOLE, Row("first", "fp32", seconds=1.0))
    assert (found.count, found.seconds, found.runs, found.first_seconds) == (4, 2.0, (2.0, 3.0), 6.0)
    assert (found.tokens_per_second, found.first_token_seconds, found.share) == (2.0, 1.0, 0.25)


@pytest.mark.parametrize("answer", [replace(WHOLE, count=1), replace(WHOLE, count=0), replace(WHOLE, seconds=0.9)])
def test_an_answer_that_ends_at_once_has_no_speed(answer):
    found = works.after_first(answer, Row("first", "fp32", seconds=1.0))
    assert found.tokens_per_second is None and found.seconds is None and found.error is None


def test_without_a_first_token_the_others_are_not_known():
    first = measuring.failed("first", "fp32", MemoryError("full"))
    assert "first token was not measured" in works.after_first(WHOLE, first).error
    broken = measuring.failed("tokens", "fp32", ValueError("no text"))
    assert works.after_first(broken, first) is broken


def test_an_error_stays_in_its_row(tiny, monkeypatch):
    def full(*_values, **_more):
        raise MemoryError("This call ran out of memory")

    for verb in ("generate", "edit"):
        monkeypatch.setattr(tiny[0].bagel, verb, full)
    found = Bench(tiny[0].bagel, "fp32", LIMIT, tiny[0].asked)
    kept = list(found.rows())
    assert [row.work for row in kept] == WORKS
    assert [row.error for row in kept[:5]] == ["MemoryError: This call ran out of memory"] * 5
    assert all(row.error is None for row in kept[5:]) and found.drawn == []


@pytest.mark.parametrize(("values", "said"), [({"num_timesteps": 2}, "2 must be at least 3"), ({"runs": 0}, "runs 0")])
def test_too_few_steps_or_runs_are_refused(tiny, values, said):
    with pytest.raises(ValueError, match=said):
        replace(tiny[0].asked, **values)


def test_costs_hold_every_pair_of_size_and_steps(bagel):
    found = bench.costs(bagel, "fp32", LIMIT, "a red circle", [32, 64], [2, 4], seed=1)
    pairs = [(one.side, one.num_timesteps, one.tokens, one.forwards) for one in found]
    assert [len(one.row.runs) for one in found] == [2] * 4
    assert pairs == [(32, 2, 4, 2), (32, 4, 4, 6), (64, 2, 16, 2), (64, 4, 16, 6)]
    assert all(one.row.floor_seconds == one.flop / LIMIT.matmul for one in found)
    assert bench.plot_costs(found).image.size == (1000, 360)


# Losses


@pytest.fixture
def drawn():
    """An exact picture whose latent went from 1 over 0 to -1, and one that took a tenth more at each step."""
    noise = torch.ones(4, 8)
    exact = Drawn("picture", "bf16", None, Image.new("RGB", (4, 4), "gray"), noise, 0 * noise, -noise)
    picture = Image.new("RGB", (4, 4), (129, 129, 129))
    faster = replace(exact, weights="fp8", picture=picture, first=-0.1 * noise, last=-1.2 * noise)
    return exact, faster


def test_a_loss_is_psnr_and_the_error_of_the_velocity(drawn):
    (found,) = losses(drawn)
    assert (found.weights, found.against) == ("fp8", "bf16")
    assert found.psnr == pytest.approx(48.13, abs=0.01)  # one grey level: 20 log10(255)
    assert (found.first_velocity, found.mean_velocity) == pytest.approx((0.1, 0.1))


def test_the_exact_picture_is_the_first_without_a_step_cache(drawn):
    cached = replace(drawn[0], work="picture, step cache", step_cache="taylorseer")
    found = losses([cached, *drawn])
    assert [(one.work, one.weights) for one in found] == [("picture, step cache", "bf16"), ("picture", "fp8")]
    assert found[0].psnr is None and found[0].mean_velocity == 0
    assert losses([cached]) == losses([]) == []


def test_the_noise_is_the_one_that_the_picture_came_from(bagel, monkeypatch):
    taken, velocity = [], bagel.model.velocity
    monkeypatch.setattr(bagel.model, "velocity", lambda hidden: taken.append(velocity(hidden)[0]) or taken[-1][None])
    heard = []
    settings = {"seed": 7, "num_timesteps": 3, "timestep_shift": 1.0, "cfg_text_scale": 1.0}
    made = bagel.generate("a red circle", 32, 32, **settings, on_step=lambda *one: heard.append(one[2]))
    found = Drawn.of("picture", "fp32", made, heard[0])
    assert torch.allclose(found.noise - taken[0] / 2, found.first)
    assert torch.allclose(found.first - taken[1] / 2, found.last)


def test_the_native_pictures_are_compared(tiny, rows):
    assert [one.work for one in tiny[0].drawn] == WORKS[:2]
    (found,) = losses(tiny[0].drawn)
    assert found.psnr is None  # at three timesteps a step cache extrapolates nothing


def test_random_weights_say_nothing_about_quality():
    assert "nothing about the quality" in bench.remark("random-7b")
    assert "quality" not in bench.remark("tiny")


def test_the_same_pictures_have_no_noise_between_them():
    black, white = (Image.new("RGB", (2, 2), color) for color in ("black", "white"))
    assert psnr(black, black) is None and psnr(black, white) == 0


# Tables


def test_a_row_of_the_table_has_a_text_for_every_column(rows):
    cells = dict(
        zip(tables.HEADER, tables.cells(replace(rows[3], seconds=20.0, peak_reserved=2_345_000_000)), strict=True)
    )
    assert (cells["work"], cells["seconds"], cells["each"]) == (WORKS[3], "20.00", "2.500")
    assert (cells["reserved GB"], cells["tokens/s"]) == ("2.35", "")
    text = dict(
        zip(tables.HEADER, tables.cells(works.after_first(WHOLE, Row("first", "fp32", seconds=1.0))), strict=True)
    )
    assert (text["seconds"], text["each"], text["tokens/s"], text["share"]) == ("2.000", "", "2.0", "25%")
    broken = tables.cells(measuring.failed("edit", "fp8", MemoryError("full")))
    assert broken[:3] == ("edit", "fp8", "MemoryError: full") and set(broken[3:]) == {""}


def test_only_rows_with_a_floor_are_drawn(tiny, rows):
    broken = measuring.failed("edit", "fp8", MemoryError("full"))
    whole, same = bench.plot_rows(rows).image, bench.plot_rows([tiny[1], *rows, broken]).image
    assert whole.size == same.size and whole.size[1] > bench.plot_rows(rows[:3]).image.size[1]


def test_a_loss_of_nothing_is_said_in_words(drawn):
    table = bench.loss_table(losses([*drawn, replace(drawn[0], step_cache="taylorseer")]))
    assert table.rows[0][1:] == ("fp8", "bf16", "48.1", "10.00%", "10.00%")
    assert table.rows[1][3] == "the same picture"


def test_the_blogs_rows_stand_beside_this_run(bagel):
    seen = [
        Row("small", "fp32", peak_allocated=10**6),
        Row("large", "fp32", peak_allocated=2 * 10**9),
        Row("none", "fp32"),
    ]
    found = bench.blog_table(bagel, seen).rows
    assert [row[0].split(":")[0] for row in found[:3]] == ["bfloat16", "DFloat11", "INT8"]
    assert (
        found[-1][0] == "(this run)" and "2.00 GB in large" in found[-1][1] and "weights not included" in found[-1][1]
    )
