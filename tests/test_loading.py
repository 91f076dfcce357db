"""Weights arrive in the model as they stand in the file: in pieces, by several threads, converted where asked."""

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import memory, tensors
from helpers.pipeline import TINY, load_bagel
from helpers.tensors import read_tensors

REFERENCE = Path(__file__).parent / "reference" / "checkpoint"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture
def many_pieces(monkeypatch):
    """Pieces of a few values, and a thread for each two of them."""
    monkeypatch.setattr(tensors, "PIECE", 1000)
    monkeypatch.setattr(tensors, "WORTH_A_THREAD", 2)


@pytest.fixture
def file(tmp_path):
    """Three tensors of 40 KB in all."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(100, 30 + i, generator=generator) for i, name in enumerate("abc")}
    save_file(made, tmp_path / "made.safetensors")
    return tmp_path / "made.safetensors"


def empty(file):
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}


def assert_loaded(folder, weights, device="cpu"):
    """The tiny model's file is in bfloat16, the reference's in float32."""
    bagel = load_bagel(folder, weights=weights, device=device, attention="sdpa")
    for module, name, dtype in (
        (bagel.model, "ema", TYPES[weights]),
        (bagel.autoencoder, "ae", torch.float32),
    ):
        loaded, written = module.state_dict(), load_file(folder / f"{name}.safetensors")
        assert loaded.keys() == written.keys()
        for key, tensor in written.items():
            assert loaded[key].dtype == dtype and loaded[key].device.type == device
            assert torch.equal(loaded[key].cpu(), tensor.to(dtype)), key


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("folder", [TINY, REFERENCE])
def test_weights_are_those_of_the_file(folder, weights):
    assert_loaded(folder, weights)


@pytest.mark.parametrize("weights", TYPES)
def test_weights_in_many_pieces(many_pieces, monkeypatch, weights):
    read, fill = [], tensors._fill
    monkeypatch.setattr(tensors, "_fill", lambda *what: read.append(threading.get_ident()) or fill(*what))
    assert_loaded(REFERENCE, weights)
    assert len(set(read)) > 2 and len(read) > 5_900_000 / 1000


@CARD
@pytest.mark.parametrize("folder", [TINY, REFERENCE])
@pytest.mark.parametrize("weights", TYPES)
def test_weights_on_a_card(many_pieces, folder, weights):
    """Small pieces, so that every buffer is written again and again while copies are under way."""
    assert_loaded(folder, weights, "cuda")


def test_a_few_tensors_of_a_file_into_parts_of_others(many_pieces, file):
    """As the weights of joined layers are; what lies around them stays."""
    written, joined = load_file(file), torch.zeros(220, 31)
    read_tensors(file, {"b": joined[20:120]})
    assert torch.equal(joined[20:120], written["b"])
    assert joined[:20].count_nonzero() == joined[120:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_types_are_converted(tmp_path, dtype):
    made = {"some": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), "one": torch.tensor(3.5)}
    made = {"none": torch.zeros(0, 4), **made}
    save_file({name: tensor.to(dtype) for name, tensor in made.items()}, tmp_path / "x.safetensors")
    for target in FLOATS:
        targets = {name: torch.empty(tensor.shape, dtype=target) for name, tensor in made.items()}
        read_tensors(tmp_path / "x.safetensors", targets)
        for name, tensor in made.items():
            assert torch.equal(targets[name], tensor.to(dtype).to(target)), name


def test_other_types_are_refused(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float64)}, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"x.safetensors holds b as F64, which must be one of F32, BF16, F16, I8, U8: use"
    ):
        read_tensors(tmp_path / "x.safetensors", {"b": torch.zeros(3)})


def test_staging_stays_small(file, monkeypatch):
    """Two buffers a thread, none larger than a piece or than what there is to read."""
    sizes, make = [], tensors._Stage.__init__
    monkeypatch.setattr(
        tensors._Stage, "__init__", lambda self, size, device: sizes.append(size) or make(self, size, device)
    )
    read_tensors(file, empty(file))
    assert sizes == [100 * 32 * 4] * 2
    monkeypatch.setattr(tensors, "PIECE", 4000)
    monkeypatch.setattr(tensors, "WORTH_A_THREAD", 1)
    sizes.clear()
    read_tensors(file, empty(file))
    assert sizes == [4000] * 2 * tensors.THREADS


def test_a_file_that_ends_early(many_pieces, file):
    """After its header was checked: cut on the way, or still being written."""
    targets = empty(file)
    file.write_bytes(file.read_bytes()[:-150])
    with pytest.raises(ValueError, match=r"made.safetensors .* ends 150 bytes too early.*truncated or damaged; fetch"):
        read_tensors(file, targets)


@pytest.mark.parametrize(("in_main", "error"), [(False, OSError("the disk is gone")), (True, KeyboardInterrupt())])
def test_an_error_in_any_thread_ends_all_and_comes_out(many_pieces, file, monkeypatch, in_main, error):
    failed, read, fill = threading.Event(), [], tensors._fill

    def fail_in_one(*what):
        if (threading.current_thread() is threading.main_thread()) == in_main:
            failed.set()
            raise error
        assert failed.wait(10)
        time.sleep(0.02)  # until the news has spread
        read.append(what)
        fill(*what)

    monkeypatch.setattr(tensors, "_fill", fail_in_one)
    with pytest.raises(type(error)):
        read_tensors(file, empty(file))
    assert len(read) < 30  # of 38 pieces


def test_loading_in_inference_mode(many_pieces, file):
    """The mode holds for one thread alone, and tensors made in it may not be written outside."""
    with torch.inference_mode():
        targets = empty(file)
        read_tensors(file, targets)
    for name, tensor in load_file(file).items():
        assert torch.equal(targets[name], tensor)


def test_nothing_to_read(file):
    read_tensors(file, {})


def test_who_holds_the_card_is_asked_only_where_it_is_full(monkeypatch):
    """nvidia-smi takes up to a second."""
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _card: (10 * 10**9, 16 * 10**9))
    monkeypatch.setattr(memory, "_card_processes", lambda: pytest.fail("asked"))
    memory.check_room(9 * 10**9, "bf16", card)
    monkeypatch.setattr(memory, "_card_processes", lambda: " (held by: 1, python, 6 GiB)")
    with pytest.raises(MemoryError, match=r"need 11.0 GB as bf16 on cuda; 10.0 of 16.0 GB are free \(held by: 1, pyt"):
        memory.check_room(11 * 10**9, "bf16", card)
