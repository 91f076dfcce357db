"""What several tests share: small notebooks to run, and the workbook's own."""

import os
from pathlib import Path

import nbformat
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

# huggingface_hub reads it when it is imported, and would ask the real hub which programs to name in its requests.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

ROOT = Path(__file__).resolve().parents[1]
SEVEN = [
    "00_setup",
    "01_download",
    "02_understanding",
    "03_generation",
    "04_editing",
    "05_video_frames",
    "06_hardware_benchmark",
]
PARAMETERS = 'MODEL: str = "tiny"  # the model\nSEED: int = 1  # first seed\nOUT: str = "outputs/x"  # results'


@pytest.fixture
def make_notebook(tmp_path):
    """A function that writes `<tmp_path>/<name>.ipynb`: a heading, a parameters cell, then one cell for each
    source.
    """

    def make(name: str, *sources: str, parameters: str = PARAMETERS) -> Path:
        cells = [nbformat.v4.new_markdown_cell(f"# {name}"), nbformat.v4.new_code_cell(parameters)]
        cells[1].metadata["tags"] = ["parameters"]
        cells += [nbformat.v4.new_code_cell(source) for source in sources]
        file = tmp_path / f"{name}.ipynb"
        kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), file)
        return file

    return make
