"""Training shared by two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from helpers.tiny.team import Team

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def member(rank, port, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with Team("cpu") as team:
        tensors = [torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank])]
        team.average(tensors)
        results[rank] = {
            "leads": team.leads,
            "average": [tensor.tolist() for tensor in tensors],
            "seed": team.seed(7),
            "any": [team.any(rank == 1), team.any(False)],
        }


def test_two_processes_agree():
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(member, (free_port(), results), nprocs=2)
        first, second = results[0], results[1]
    assert first["average"] == second["average"] == [[[0.5] * 3] * 2, [5.0]]
    assert first["any"] == second["any"] == [True, False]
    assert (first["leads"], second["leads"]) == (True, False)
    assert first["seed"] != second["seed"]


def test_one_process_is_a_team_of_one():
    team = Team("cpu")
    tensors = [torch.ones(2)]
    team.average(tensors)
    assert tensors[0].tolist() == [1, 1] and team.leads and team.any(True) and not team.any(False)
    assert team.seed(7) == 7


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A training of a few steps by two processes."""
    out = tmp_path_factory.mktemp("shared")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "helpers.tiny.train", "--out", str(out), "--device", "cpu", "--workers", "0", "--no-compile",
        "--steps", "2", "--autoencoder-steps", "2", "--autoencoder-batch", "2", "--batch-scale", "0.001",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_two_processes_train_one_model(shared):
    assert (shared / "checkpoint" / "ema.safetensors").is_file()
    assert json.loads((shared / "progress.json").read_text())["step"] == 2
    rows = [json.loads(line) for line in (shared / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("autoencoder", 2), ("joint", 1), ("joint", 2)]
