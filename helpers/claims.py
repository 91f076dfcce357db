"""The ledger: what the blog post that started this workbook claims, and what became of each claim.

A verdict is earned by a cell or a file that shows it. What needs the real weights, or hardware that was not
at hand, is "not testable here", and its row says which command settles it on the reader's card.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers.display import Table, table
from helpers.workbook import repository

VERDICTS = {
    "reproduced": "已复现",
    "measured differently": "测得不同",
    "refuted": "不成立",
    "not testable here": "此处无法检验",
}
MARKERS = ("<!-- ledger:start -->", "<!-- ledger:end -->")
READMES = {"en": "README.md", "zh": "README.zh.md"}
_HEADERS = {
    "en": ("claim", "verdict", "what we know", "evidence"),
    "zh": ("说法", "结论", "目前所知", "依据"),
}


@dataclass(frozen=True)
class Claim:
    """One row. `evidence` names the file (or the public source) that shows the verdict, `notebook` the one
    that lists it.

    `command` settles, or at least shows, on the reader's own card what could not be tested here; it is empty
    where nothing is left to settle, or where nothing can (the note then says so). `foreign` names whose program
    a command is, where it is not this workbook's: such a command was taken from its makers and not tried here.
    """

    key: str
    notebook: str
    claim: str
    claim_zh: str
    verdict: str
    note: str
    note_zh: str
    evidence: str
    command: str = ""
    foreign: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"claim {self.key}: verdict {self.verdict!r} is not one of {', '.join(VERDICTS)}")


CLAIMS = (
    Claim(
        key="ampere",
        notebook="00_setup",
        claim="Needs an Ampere card or newer (compute capability 8.0) for bfloat16 and flash-attn",
        claim_zh="需要 Ampere 或更新的显卡(计算能力 ≥ 8.0)才能用 bfloat16 和 flash-attn",
        verdict="measured differently",
        note="True of the official code. Here attention is PyTorch's own and the tiny model runs on "
        "a processor, so an older card is a matter of speed and memory.",
        note_zh="对官方代码成立。本项目用 PyTorch 自带的注意力,小模型在 CPU 上就能运行,旧卡只是速度和显存问题。",
        evidence="notebooks/00_setup.ipynb",
    ),
    Claim(
        key="flash-attn-2.5.8",
        notebook="00_setup",
        claim="flash_attn must be version 2.5.8",
        claim_zh="flash_attn 必须是 2.5.8",
        verdict="refuted",
        note="It is the official README's pin, older than torch 2.5, so it compiles from source; "
        "users run 2.7.4 and 2.8, and here nothing needs it.",
        note_zh="这是官方 README 的固定版本,早于 torch 2.5,只能从源码编译;有用户使用 2.7.4 和 2.8,而本"
        "项目完全不需要它。",
        evidence="ByteDance-Seed/Bagel issues 48 and 125; pyproject.toml",
    ),
    Claim(
        key="torch-2.5.0",
        notebook="00_setup",
        claim="torch 2.5.0 with CUDA 11.8 or 12.1, Python 3.10",
        claim_zh="torch 2.5.0,CUDA 11.8 或 12.1,Python 3.10",
        verdict="refuted",
        note="The official requirements say torch 2.5.1 and transformers 4.49.0; Python 3.10 is the official README's. "
        "This workbook pins torch 2.13.0 and needs 2.11 or newer, on Python 3.11 or newer.",
        note_zh="官方 requirements 写的是 torch 2.5.1 和 transformers 4.49.0;Python 3.10 与官方 README 一致。"
        "本工作簿固定 torch 2.13.0,要求 2.11 以上和 Python 3.11 以上。",
        evidence="constraints.txt",
    ),
    Claim(
        key="old-cards",
        notebook="00_setup",
        claim="V100 and older fail because bfloat16 is missing; remove flash-attn and cast to fp16 or fp32",
        claim_zh="V100 及更老的卡因没有 bfloat16 而报错;去掉 flash-attn 并转成 fp16 或 fp32",
        verdict="not testable here",
        note="No card of that age was at hand. The float32 path of the tiny model runs everywhere; this version "
        "offers no fp16.",
        note_zh="手头没有这么老的卡。小模型的 float32 路径在任何机器上都能运行;本版本不提供 fp16。",
        evidence="notebooks/00_setup.ipynb",
        command="make run NOTEBOOKS=02",
    ),
    Claim(
        key="shards",
        notebook="01_download",
        claim="The weights come in shards model-0000X-of-00006.safetensors",
        claim_zh="权重分片为 model-0000X-of-00006.safetensors",
        verdict="refuted",
        note="There is one ema.safetensors (1,223 tensors) and one ae.safetensors (244 tensors).",
        note_zh="只有一个 ema.safetensors(1,223 个张量)和一个 ae.safetensors(244 个张量)。",
        evidence="notebooks/01_download.ipynb",
    ),
    Claim(
        key="sizes-7b-14b",
        notebook="01_download",
        claim="7 G active parameters, 14 G in all",
        claim_zh="激活参数 7 G,总参数 14 G",
        verdict="reproduced",
        note="Counted from the shapes of the official tensors: 6.53 G in one expert's layers, 14.6 G in all "
        "(ViT included, autoencoder not).",
        note_zh="由官方张量的形状计数:单个专家各层 6.53 G,总计 14.6 G(含 ViT,不含自编码器)。",
        evidence="tests/reference/manifest_ema.json",
    ),
    Claim(
        key="bf16-size",
        notebook="01_download",
        claim="bfloat16: 29.21 GB, peak about 30 GB",
        claim_zh="bfloat16:29.21 GB,峰值约 30 GB",
        verdict="measured differently",
        note="The size is exact (29,214,520,256 bytes). The official code on one H200 peaks at 33.6 "
        "GB for a 1024x1024 picture, 40.4 GB for an edit, 36.5 GB for understanding.",
        note_zh="大小准确(29,214,520,256 字节)。官方代码在一块 H200 上的峰值:1024x1024 文生图 33.6 "
        "GB,编辑 40.4 GB,理解 36.5 GB。",
        evidence="official code at commit 056b5fd on one H200; notebooks/06_hardware_benchmark.ipynb",
        command="make run MODEL=<folder> NOTEBOOKS=06",
    ),
    Claim(
        key="automodel",
        notebook="02_understanding",
        claim="It loads with AutoModelForCausalLM, AutoProcessor, apply_chat_template and decode_image",
        claim_zh="可用 AutoModelForCausalLM、AutoProcessor、apply_chat_template 和 decode_image 加载",
        verdict="refuted",
        note="None of that exists upstream (transformers issue 38267 is open). Here it is load_bagel(folder).",
        note_zh="上游并不存在这些接口(transformers issue 38267 仍未关闭)。本项目用 load_bagel(folder)。",
        evidence="huggingface/transformers issue 38267; notebooks/02_understanding.ipynb",
    ),
    Claim(
        key="dynamic-routing",
        notebook="02_understanding",
        claim="The Mixture of Transformers routes dynamically",
        claim_zh="MoT 动态路由",
        verdict="refuted",
        note="Routing is fixed by the kind of token: latents take the generation expert, everything else the "
        "understanding expert.",
        note_zh="路由由 token 种类固定:潜变量走生成专家,其余都走理解专家。",
        evidence="helpers/bagel/decoder.py; notebooks/02_understanding.ipynb",
    ),
    Claim(
        key="two-encoders",
        notebook="02_understanding",
        claim="Two encoders: a VAE for pixels, a ViT for meaning",
        claim_zh="两个编码器:VAE 负责像素,ViT 负责语义",
        verdict="reproduced",
        note="Both are in the checkpoint and in the tiny model: an autoencoder and a ViT with its connector.",
        note_zh="检查点和小模型里都有:自编码器,以及带连接层的 ViT。",
        evidence="notebooks/02_understanding.ipynb",
    ),
    Claim(
        key="vllm",
        notebook="02_understanding",
        claim="vLLM serves understanding only, with less memory",
        claim_zh="vLLM 只支持理解,占用更少显存",
        verdict="not testable here",
        note="vLLM loads the understanding half, and resizes every picture to 980x980 (4,900 "
        "tokens). Its memory was not measured.",
        note_zh="vLLM 只加载理解部分,并把每张图缩放到 980x980(4,900 个 token)。未测其显存。",
        evidence="vLLM's BAGEL model file",
        command="vllm serve <folder>",
        foreign="vLLM",
    ),
    Claim(
        key="app-options",
        notebook="03_generation",
        claim="app.py takes --model_path, --server_port and --share",
        claim_zh="app.py 接受 --model_path、--server_port 和 --share",
        verdict="reproduced",
        note="Right by its source, which also has --server_name, --mode 1/2/3 and --zh.",
        note_zh="源码确实如此,另有 --server_name、--mode 1/2/3 和 --zh。",
        evidence="ByteDance-Seed/Bagel, app.py",
    ),
    Claim(
        key="inference-py",
        notebook="03_generation",
        claim="There is an official inference.py with --task",
        claim_zh="官方有带 --task 的 inference.py",
        verdict="refuted",
        note="No such file exists there.",
        note_zh="官方仓库没有这个文件。",
        evidence="ByteDance-Seed/Bagel, file list at commit 056b5fd",
    ),
    Claim(
        key="both-encoders-edit",
        notebook="04_editing",
        claim="Fusing both encoders is what makes intelligent editing possible",
        claim_zh="融合两个编码器才使智能编辑成为可能",
        verdict="not testable here",
        note="Not for the 7B model. The tiny model is scored with VAE only, ViT only and both; the "
        "scores are shown, and speak for it alone.",
        note_zh="对 7B 模型未检验。小模型分别以仅 VAE、仅 ViT、两者兼用评分;结果只代表小模型。",
        evidence="notebooks/04_editing.ipynb",
        command="make run MODEL=<folder> NOTEBOOKS=04",
    ),
    Claim(
        key="world-navigation",
        notebook="05_video_frames",
        claim="By predicting the next group of tokens it manipulates 3-D objects, navigates worlds, makes "
        "high-fidelity frames from text, and interleaves text and images",
        claim_zh="通过预测下一组 token 实现三维操控、世界导航、由文本生成高保真帧、图文交错",
        verdict="not testable here",
        note="The paper shows pictures, after further fine-tuning, and no number. Frames and "
        "interleaving run here on the tiny model.",
        note_zh="论文只展示了进一步微调后的图片,没有数字。逐帧生成和图文交错在小模型上可运行。",
        evidence="arXiv 2505.14683; notebooks/05_video_frames.ipynb",
        command="make run MODEL=<folder> NOTEBOOKS=05",
    ),
    Claim(
        key="frames-12-percent",
        notebook="05_video_frames",
        claim="3 frames in, 10 out, with an error below 12 % in physical scenes",
        claim_zh="输入 3 帧、输出 10 帧,物理场景误差低于 12%",
        verdict="not testable here",
        note="It has no source and no definition of the error, so nothing can settle it. The tiny "
        "model's own error on clips is shown instead, beside baselines.",
        note_zh="没有出处,也没有定义误差,因此无从检验。这里给出小模型自己的帧误差和基线。",
        evidence="notebooks/05_video_frames.ipynb",
    ),
    Claim(
        key="frames-8x256",
        notebook="05_video_frames",
        claim="Frames are 8 x 256 tokens in causal order, as in VILA-U",
        claim_zh="帧为 8 x 256 个 token,按因果顺序,同 VILA-U",
        verdict="not testable here",
        note="It has no source, and the released code has no such order, so nothing can settle it. "
        "A 256x256 frame does make 256 latent tokens, since one stands for 16x16 pixels.",
        note_zh="没有出处,公开代码中也没有这种顺序,因此无从检验。256x256 的帧确实是 256 个潜变量 "
        "token(每个对应 16x16 像素)。",
        evidence="notebooks/05_video_frames.ipynb",
    ),
    Claim(
        key="dfloat11",
        notebook="06_hardware_benchmark",
        claim="DFloat11: 19.89 GB, peak about 22 GB",
        claim_zh="DFloat11:19.89 GB,峰值约 22 GB",
        verdict="not testable here",
        note="Its own model card says 29.21 to 19.89 GB, peak 30.07 to 21.76 GB, 54 to 58 s on an "
        "A100, lossless. This version does not load the format.",
        note_zh="其模型卡写明 29.21 → 19.89 GB,峰值 30.07 → 21.76 GB,A100 上 54 → 58 秒,无损。本版本不加载该格式。",
        evidence="DFloat11's model card",
        command="python app.py",
        foreign="LeanModels/Bagel-DFloat11",
    ),
    Claim(
        key="int8",
        notebook="06_hardware_benchmark",
        claim="INT8: about 15 GB, peak 16 to 18 GB",
        claim_zh="INT8:约 15 GB,峰值 16-18 GB",
        verdict="not testable here",
        note="One byte for each weight of the 28 layers' linear parts and bfloat16 for the rest "
        "make about 16.2 GB; the peak was not measured.",
        note_zh="28 层线性权重每个 1 字节、其余 bfloat16,约 16.2 GB;峰值未测。",
        evidence="tests/reference/manifest_ema.json",
        command="python app.py --mode 3 --model_path <folder>",
        foreign="ByteDance-Seed/Bagel",
    ),
    Claim(
        key="memory-advice",
        notebook="06_hardware_benchmark",
        claim="At least 24 GB, 40 GB or more recommended; INT8 for RTX 3090 and 4080 SUPER",
        claim_zh="至少 24 GB,建议 40 GB 以上;RTX 3090、4080 SUPER 用 INT8",
        verdict="not testable here",
        note="It contradicts itself: it says INT8 peaks at 16 to 18 GB, and a 4080 SUPER has 16 GB. "
        "No such card was at hand.",
        note_zh="自相矛盾:它说 INT8 峰值 16-18 GB,而 4080 SUPER 只有 16 GB。手头没有这些卡。",
        evidence="notebooks/06_hardware_benchmark.ipynb",
        command="python app.py --mode 3 --model_path <folder>",
        foreign="ByteDance-Seed/Bagel",
    ),
    Claim(
        key="gguf",
        notebook="06_hardware_benchmark",
        claim="GGUF files run through llama.cpp",
        claim_zh="GGUF 可用 llama.cpp 运行",
        verdict="refuted",
        note="Such files exist (their tensor names are those of ema.safetensors), but llama.cpp "
        "does not support the model.",
        note_zh="这类文件存在(张量名与 ema.safetensors 相同),但 llama.cpp 不支持该模型。",
        evidence="ByteDance-Seed/Bagel issue 15",
    ),
)


def rows(notebook: str) -> tuple[Claim, ...]:
    """The claims of a notebook, named such as "03_generation". Raises ValueError for an unknown name."""
    found = tuple(claim for claim in CLAIMS if claim.notebook == notebook)
    if not found:
        names = ", ".join(dict.fromkeys(claim.notebook for claim in CLAIMS))
        raise ValueError(f"the ledger has no rows for {notebook}; it has rows for {names}")
    return found


def show(notebook: str, lang: str = "en") -> Table:
    """A notebook's rows, for its last section: claim, verdict, what we know, evidence and command."""
    cells = [[cell.replace("`", "") for cell in _cells(claim, lang)] for claim in rows(notebook)]
    return table(_header(lang), cells)


def markdown(lang: str = "en") -> str:
    """The whole ledger as a Markdown table, in "en" or "zh". Raises ValueError for another language."""
    header = _header(lang)
    lines = [header, ("---",) * len(header), *(_cells(claim, lang) for claim in CLAIMS)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rewrite(readme: str, lang: str) -> str:
    """A README's text with the ledger between its markers renewed. Raises ValueError if one is missing."""
    start, end = MARKERS
    before, found_start, rest = readme.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"the README needs the lines {start} and {end}, in this order, around the ledger")
    return f"{before}{start}\n{markdown(lang)}\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    """`python -m helpers.claims` prints the ledger; `--write` puts it into both READMEs."""
    parser = argparse.ArgumentParser(prog="python -m helpers.claims", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lang", choices=sorted(_HEADERS), default="en")
    parser.add_argument("--write", action="store_true", help="rewrite the ledger in README.md and README.zh.md")
    given = parser.parse_args(arguments)
    if not given.write:
        print(markdown(given.lang))
        return 0
    for lang, name in READMES.items():
        file: Path = repository() / name
        file.write_text(rewrite(file.read_text(encoding="utf-8"), lang), encoding="utf-8")
        print(f"wrote the ledger into {name}")
    return 0


def _header(lang: str) -> tuple[str, ...]:
    if lang not in _HEADERS:
        raise ValueError(f"the ledger is written in {', '.join(_HEADERS)}, not in {lang!r}")
    return _HEADERS[lang]


def _cells(claim: Claim, lang: str) -> tuple[str, str, str, str]:
    """One row's texts in a language; a command follows the evidence."""
    if lang == "zh":
        said = (claim.claim_zh, VERDICTS[claim.verdict], claim.note_zh)
    else:
        said = (claim.claim, claim.verdict, claim.note)
    settle = {"en": "; on your card: `{}`", "zh": "; 在你的卡上:`{}`"}[lang].format(claim.command)
    whose = {"en": " ({}'s, not tried here)", "zh": "({} 的命令,此处未试)"}[lang].format(claim.foreign)
    return (*said, claim.evidence + (settle if claim.command else "") + (whose if claim.foreign else ""))


if __name__ == "__main__":
    sys.exit(main())
