"""The tiny model's tokenizer: a byte-level BPE in Qwen2's format, trained on the synthetic world's texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .clips import NEXT_FRAME, clip_prompt, random_clip
from .tasks import TASKS, Text, sample

SIZE = 768  # ids in all; below about 700 some common words split
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SAMPLES = 1000  # of each task; more change no merge that matters
# How Qwen2 splits text before merging: contractions, words with the space before them, digits, punctuation.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(folder: str | Path, think_prompts: Sequence[str], size: int = SIZE) -> Tokenizer:
    """Train a tokenizer of at most `size` ids and write it to `folder` as a Qwen2 tokenizer is stored.

    Writes vocab.json, merges.txt, tokenizer.json and tokenizer_config.json; the same call, the same bytes.
    `think_prompts` are think mode's system prompts. Raises ValueError if `size` has no room for all bytes.
    """
    least = 256 + len(SPECIAL)
    if size < least:
        raise ValueError(f"A byte-level tokenizer needs at least {least} ids; {size} were asked for.")
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated", invert=False)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts(think_prompts), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    _write(tokenizer, Path(folder))
    return tokenizer


def texts(think_prompts: Sequence[str]) -> Iterator[str]:
    """The texts to learn merges from: every task's, the clips', and the two system prompts."""
    rng = Random(0)
    for task in TASKS:
        for _ in range(SAMPLES):
            yield from (part.text for part in sample(task, rng) if isinstance(part, Text))
    for _ in range(SAMPLES):
        yield clip_prompt(random_clip(rng, prompted=True))
    for text in (NEXT_FRAME, *think_prompts):
        yield from [text] * SAMPLES


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    added = {
        tokenizer.token_to_id(name): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for name in SPECIAL
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[0],
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": SPECIAL[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
