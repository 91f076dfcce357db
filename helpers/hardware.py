"""Which machine is this, and which torch build, weight format and attention should it use, and why.

`inspect()` looks, `advise()` judges. They are apart so that the advice can be tested for machines nobody here
owns.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GB = 1e9
# Peak memory of the official code with bfloat16 weights, measured on one H200 (GB of 10^9 bytes).
OFFICIAL_PEAK_GB = {"understanding": 36.5, "text-to-image 1024x1024": 33.6, "editing 1024x1024": 40.4}
# The oldest driver branches of CUDA 13 and 12 (docs.nvidia.com/deploy/cuda-compatibility).
CUDA_13_DRIVER, CUDA_12_DRIVER = 580, 525
AUTODL_DATA = Path("/root/autodl-tmp")
TORCH = "2.13.0"  # the version in constraints.txt
TORCH_SELECTOR = "https://pytorch.org/get-started/locally/"


@dataclass(frozen=True)
class Card:
    """A CUDA card; memory in bytes, `capability` as (major, minor), `driver` such as "580.65.06" (None: unknown)."""

    name: str
    capability: tuple[int, int]
    memory: int
    memory_free: int
    driver: str | None

    @property
    def bfloat16(self) -> bool:
        """Whether the card computes in bfloat16 itself: compute capability 8.0 (Ampere) and newer."""
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Machine:
    """What `inspect()` found; memory and disk in bytes, versions as text or None where a thing is missing."""

    processor: str
    cores: float
    memory: int
    memory_free: int
    disk: str
    disk_free: int
    cards: tuple[Card, ...]
    python: str
    torch: str | None
    torch_cuda: str | None
    torch_sees_card: bool
    transformers: str | None
    autodl: bool


@dataclass(frozen=True)
class Advice:
    """One decision: what it is about, what to choose, why, and the exact command (empty when nothing is to be
    done).
    """

    topic: str
    choice: str
    why: str
    command: str = ""


def inspect(disk: Path | str = ".") -> Machine:
    """Look at this machine; works without a card, without a CUDA build of torch, and without `nvidia-smi`.

    `disk` names the disk whose free space counts: any path on it.
    """
    memory, memory_free = main_memory()
    torch_cuda, sees_card, torch_cards = _torch_view()
    return Machine(
        processor=_processor(),
        cores=_cores(),
        memory=memory,
        memory_free=memory_free,
        disk=str(disk),
        disk_free=shutil.disk_usage(disk).free,
        cards=_nvidia_smi() or torch_cards,
        python=platform.python_version(),
        torch=_version("torch"),
        torch_cuda=torch_cuda,
        torch_sees_card=sees_card,
        transformers=_version("transformers"),
        autodl=AUTODL_DATA.is_dir(),
    )


def advise(machine: Machine) -> list[Advice]:
    """What this machine should use: torch build, weights, attention, download, and AutoDL's own rules."""
    advice = [
        _torch_build(machine),
        _weights(machine),
        _attention(machine),
        _flash_attn(machine),
        _mirror(machine),
    ]
    return advice + (_autodl() if machine.autodl else [])


def unusable_card(machine: Machine) -> str | None:
    """Why the installed torch cannot use the card that the driver reports, and the cure; None if it can."""
    if not machine.cards or machine.torch_sees_card:
        return None
    build = f"a build for CUDA {machine.torch_cuda}" if machine.torch_cuda else "a CPU build"
    card = machine.cards[0]
    cure = _torch_build(machine)
    return (
        f"{card.name} (driver {card.driver}) is here, but torch {machine.torch} is {build} and cannot use it."
        f" Cure: {cure.choice}: {cure.command}"
    )


def describe(machine: Machine) -> list[tuple[str, str]]:
    """The machine as (name, value) rows for a table; sizes in GB of 10^9 bytes."""
    cards = [
        f"{c.name}, compute capability {c.capability[0]}.{c.capability[1]}, "
        f"{c.memory_free / GB:.1f} of {c.memory / GB:.1f} GB free, driver {c.driver or 'unknown'}, "
        f"bfloat16 {'yes' if c.bfloat16 else 'no'}"
        for c in machine.cards
    ]
    return [
        ("processor", f"{machine.processor}, {machine.cores:g} cores"),
        ("memory", f"{machine.memory_free / GB:.1f} of {machine.memory / GB:.1f} GB free"),
        (
            "disk",
            f"{machine.disk_free / GB:.1f} GB free{'' if machine.disk == '.' else f' at {machine.disk}'}",
        ),
        *[(f"card {number}", card) for number, card in enumerate(cards)],
        *([] if cards else [("card", "none: everything runs on the processor")]),
        ("Python", machine.python),
        ("torch", f"{machine.torch or 'missing'} (CUDA {machine.torch_cuda or 'none'})"),
        ("transformers", machine.transformers or "missing"),
    ]


def _torch_build(machine: Machine) -> Advice:
    """The wheel for the driver: CUDA 13 needs driver 580 and a card from Turing on, CUDA 12 driver 525."""
    if not machine.cards:
        return Advice("torch build", "the CPU build", "no CUDA card is here", _install("cpu"))
    card = min(machine.cards, key=lambda one: one.capability)
    if card.driver is None:
        why = f"it uses {card.name}; the driver's version is not known without nvidia-smi"
        return Advice("torch build", f"torch {machine.torch} as it is", why)
    driver = int(card.driver.split(".")[0])
    if driver < CUDA_12_DRIVER:
        return Advice(
            "torch build",
            "update the driver",
            f"driver {card.driver} is older than {CUDA_12_DRIVER}, the oldest for CUDA 12 and so for torch",
            "pick an image with a newer driver, or install one: https://www.nvidia.com/drivers",
        )
    if driver >= CUDA_13_DRIVER and card.capability >= (7, 5):
        why = f"driver {card.driver} runs CUDA 13, and {card.name} is Turing or newer"
        return Advice("torch build", "the CUDA 13.0 build (cu130)", why, _install("cu130"))
    if card.capability >= (10, 0):
        why = f"driver {card.driver} runs CUDA 12 and {card.name} needs 12.8, last in torch 2.11"
        return Advice("torch build", "torch 2.11 for CUDA 12.8 (cu128)", why, _install("cu128", "2.11.0"))
    runs_12 = f"driver {card.driver} runs CUDA 12"
    why = runs_12 if driver < CUDA_13_DRIVER else f"CUDA 13 left {card.name} behind"
    return Advice("torch build", "the CUDA 12.6 build (cu126)", why, _install("cu126"))


def _install(tag: str, version: str = TORCH) -> str:
    """The command that installs a build: uv knows where PyTorch keeps it; the selector page shows it too."""
    uv = f"uv pip install --python $(which python) torch=={version} --torch-backend={tag}"
    return f"python -m pip install uv && {uv}  # or choose {tag} at {TORCH_SELECTOR}"


def _weights(machine: Machine) -> Advice:
    """bfloat16 where the official peaks fit the largest card; otherwise what is left."""
    small = "the tiny model (MODEL=tiny) runs everywhere"
    if not machine.cards:
        why = f"no CUDA card: the 7B model's 29.2 GB of weights want one; {small}"
        return Advice("weight format", "fp32 for the tiny model", why, "make run")
    card = max(machine.cards, key=lambda one: one.memory)
    have = card.memory / GB
    fits = [work for work, need in OFFICIAL_PEAK_GB.items() if need <= have]
    needs = ", ".join(f"{work} {need} GB" for work, need in OFFICIAL_PEAK_GB.items())
    measured = f"peaks of the official code in bfloat16, measured on an H200: {needs}; this card has {have:.1f} GB"
    if not card.bfloat16:
        capability = f"{card.capability[0]}.{card.capability[1]}"
        why = f"compute capability {capability} has no bfloat16 of its own (8.0 has)"
        return _smaller_format(card, why, small)
    if not fits:
        return _smaller_format(card, measured, small)
    choice = "bf16" if len(fits) == len(OFFICIAL_PEAK_GB) else f"bf16, for {' and '.join(fits)} only"
    return Advice("weight format", choice, measured, "make run MODEL=<folder of the weights>")


def _smaller_format(card: Card, reason: str, small: str) -> Advice:
    """What `python -m helpers doctor` recommends where bfloat16 does not fit, for this reason."""
    from .fitting import recommended  # which needs this module

    best = recommended(card)
    if best is None:
        return Advice("weight format", "none that fits the 7B model", f"{reason}; {small}", "make run")
    peaks = ", ".join(f"{work} {best.peaks[work] / GB:.1f} GB" for work in best.works)
    why = f"{reason}; with {best.format.name} is expected: {peaks}"
    return Advice("weight format", best.format.name, why, "python -m helpers doctor")


def _attention(machine: Machine) -> Advice:
    """PyTorch's own attention; on Hopper its cuDNN backend, which was the fastest measured there."""
    if any(card.capability[0] == 9 for card in machine.cards):
        why = "on an H200 the cuDNN backend reached 611-635 TFLOP/s where the flash kernel reached 351-357"
        return Advice("attention", "cudnn", why, 'load_bagel(folder, attention="cudnn")')
    why = "part of torch and runs on every card and processor; nothing to compile"
    return Advice("attention", "sdpa", why, 'load_bagel(folder, attention="sdpa")')


def _flash_attn(machine: Machine) -> Advice:
    """flash-attn is a choice, never a need: where it can work at all, take a prebuilt one."""
    if not any(card.bfloat16 for card in machine.cards):
        return Advice("flash-attn", "leave it out", "it needs a card of compute capability 8.0 or newer")
    why = "optional; on the package index it is source only and compiles for long, conda-forge has it prebuilt"
    return Advice("flash-attn", "none, or prebuilt from conda-forge", why, "conda install -c conda-forge flash-attn")


def _mirror(machine: Machine) -> Advice:
    """The download mirror; without HF_HUB_DISABLE_XET large files would leave it."""
    choice = "the mirror" if machine.autodl else "Hugging Face, or the mirror where it cannot be reached"
    why = "without HF_HUB_DISABLE_XET=1 large files are fetched from elsewhere"
    return Advice("download", choice, why, "export HF_ENDPOINT=https://hf-mirror.com HF_HUB_DISABLE_XET=1")


def _autodl() -> list[Advice]:
    """What is particular about AutoDL's rented machines."""
    return [
        Advice(
            "AutoDL disks",
            f"weights and HF_HOME on {AUTODL_DATA}",
            "the system disk has 30 GB and is saved with the image, the data disk 50 GB or more and is not",
            f"export HF_HOME={AUTODL_DATA}/huggingface",
        ),
        Advice(
            "AutoDL acceleration",
            "switch it on for GitHub and Hugging Face",
            "it is a proxy: other addresses get slower, so switch it off afterwards",
            "source /etc/network_turbo  # off: unset http_proxy https_proxy",
        ),
        Advice(
            "AutoDL ports",
            "6006 or 6008",
            "only these two are mapped to the outside; an SSH tunnel always works",
            "ssh -L 8888:localhost:8888 -p <port> root@<host>",
        ),
        Advice(
            "AutoDL kernel",
            "register this environment as `bagel`",
            "JupyterLab starts from conda's base there: pick `bagel` in it; `make lab` needs no picking",
            "python -m ipykernel install --user --name bagel",
        ),
        Advice(
            "AutoDL without a card",
            "downloads only",
            "that mode has half a core and 2 GB of memory",
            "/usr/bin/shutdown  # stops the machine, and its price",
        ),
    ]


def _nvidia_smi() -> tuple[Card, ...]:
    """The cards that the driver reports; empty without `nvidia-smi`, or if it fails."""
    fields = "name,compute_cap,memory.total,memory.free,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return parse_nvidia_smi(answer)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


def parse_nvidia_smi(answer: str) -> tuple[Card, ...]:
    """Cards from lines "name, capability, total MiB, free MiB, driver". Raises ValueError for
    anything else.
    """
    cards = []
    for line in filter(str.strip, answer.splitlines()):
        name, capability, total, free, driver = (part.strip() for part in line.rsplit(",", 4))
        major, minor = capability.split(".")
        cards.append(Card(name, (int(major), int(minor)), int(total) << 20, int(free) << 20, driver))
    return tuple(cards)


def _torch_view() -> tuple[str | None, bool, tuple[Card, ...]]:
    """(CUDA version torch was built for, whether it can use a card, the cards as it sees them)."""
    try:
        import torch
    except ImportError:
        return None, False, ()
    if not torch.cuda.is_available():
        return torch.version.cuda, False, ()
    cards = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name, capability = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
        cards.append(Card(name, capability, total, free, driver=None))
    return torch.version.cuda, True, tuple(cards)


def main_memory() -> tuple[int, int]:
    """(total, free) bytes of main memory; in a container its own limit counts, not the host's memory."""
    import psutil

    host = psutil.virtual_memory()
    limit = _control_group("memory.max")
    if limit is None or limit >= host.total:
        return host.total, host.available
    return limit, max(0, min(host.available, limit - (_control_group("memory.current") or 0)))


def _control_group(name: str) -> int | None:
    """A number from this container's control group (version 2); None where there is none or no limit."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _cores() -> float:
    """Processor cores this process may use: its affinity, or the container's share where that is smaller."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(usable, int(quota) / int(period))
    except (OSError, ValueError):
        return usable


def _processor() -> str:
    """The processor's name; Linux hides it in a file."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """An installed package's version without importing it; None when it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
