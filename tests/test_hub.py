"""What a folder holds of the official files, and the command that fetches them."""

import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from helpers import hub
from helpers.__main__ import main
from helpers.download import command


@pytest.fixture
def folder(tmp_path):
    """A folder with two small weight files, the second cut short, and one config."""
    for name in ("ema.safetensors", "ae.safetensors"):
        save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / name, metadata={"format": "pt"})
    whole = (tmp_path / "ae.safetensors").read_bytes()
    (tmp_path / "ae.safetensors").write_bytes(whole[:-1])
    (tmp_path / "llm_config.json").write_text("{}")
    return tmp_path


def test_the_inventory_tells_whole_truncated_and_missing_files_apart(folder):
    found = {file.official.name: file for file in hub.inventory(folder)}
    assert (found["ema.safetensors"].tensors, found["ema.safetensors"].truncated) == (2, False)
    assert found["ae.safetensors"].truncated
    assert found["llm_config.json"].bytes == 2 and found["vocab.json"].bytes is None
    assert hub.bytes_missing(list(found.values())) == 335_278_732
    assert hub.bytes_missing(hub.inventory(folder / "none")) == 29_214_520_256 + 335_278_732


def test_a_file_without_a_header_counts_as_truncated(folder):
    (folder / "ema.safetensors").write_bytes(b"\xff" * 20)
    assert hub.inventory(folder)[0].truncated
    with pytest.raises(ValueError, match="no whole safetensors header: fetch it again"):
        hub.read_header(folder / "ema.safetensors")


def test_the_folder_of_a_model_is_found(folder, monkeypatch):
    assert hub.where(str(folder)) == folder and hub.where("no/such/folder") is None
    assert hub.where("tiny") == ROOT / "helpers" / "tiny" / "checkpoint"
    monkeypatch.setattr(hub, "usual_places", lambda: [folder / "none", folder])
    assert hub.where() == folder


@pytest.mark.parametrize(("place", "mirror"), [("here", False), ("my models/here", True)])
def test_the_fetch_command_is_one_that_the_command_understands(monkeypatch, place, mirror):
    asked = {}
    monkeypatch.setattr(command, "download", lambda *given, **named: asked.update(named, folder=given[1]))
    monkeypatch.setattr(command, "_report", lambda result: 0)
    words = shlex.split(hub.fetch_command(place, mirror))
    assert words[:4] == ["python", "-m", "helpers", "download"] and main(words[3:]) == 0
    assert asked == {"folder": Path(place).absolute(), "mirror": hub.MIRROR if mirror else None}


def test_the_manifest_is_that_of_one_file():
    assert [len(hub.manifest(name)) for name in ("ema.safetensors", "ae.safetensors", "config.json")] == [1223, 244, 0]


@pytest.mark.parametrize("header", [b"[1]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"\xff\xff"])
def test_a_header_that_is_none_is_named(tmp_path, header):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="a.safetensors .* has no whole safetensors header: fetch it again"):
        hub.read_header(file)


def test_free_space_is_that_of_the_nearest_existing_folder(tmp_path):
    assert hub.free_bytes(tmp_path / "a" / "b") > 0


def test_models_with_random_weights_come_from_no_file():
    """Yet they have shapes: those of the model whose sizes they take."""
    assert [hub.where(name) for name in hub.RANDOM] == [None, None]
    assert hub.shapes("random-tiny") == hub.shapes(hub.where("tiny"))
    assert hub.shapes("random-7b") == hub.official_shapes()
    assert len(hub.official_shapes()) == 1223 + 244
    assert all(file.bytes is None for file in hub.inventory("random-7b"))
