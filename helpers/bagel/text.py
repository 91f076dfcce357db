"""Text in and out: special tokens, think prompts, chunks of ids."""

from __future__ import annotations

import re

# The system prompts the model was trained on, to the letter.
THINK_TO_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)
THINK_TO_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> "
    "image here"
)

START_OF_TEXT, END_OF_TEXT = "<|im_start|>", "<|im_end|>"
START_OF_IMAGE, END_OF_IMAGE = "<|vision_start|>", "<|vision_end|>"


class TextCodec:
    """A Qwen2 tokenizer and the four markers that frame texts and images.

    Raises ValueError when the tokenizer lacks a marker.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        missing = [m for m in (START_OF_TEXT, END_OF_TEXT, START_OF_IMAGE, END_OF_IMAGE) if m not in known]
        if missing:
            raise ValueError(f"The tokenizer has no {', '.join(missing)}: take the files of the BAGEL folder.")
        self.start, self.end = known[START_OF_TEXT], known[END_OF_TEXT]
        self.image_markers = known[START_OF_IMAGE], known[END_OF_IMAGE]

    def encode(self, text: str) -> list[int]:
        """The chunk of a text: start token, ids, end token. Special strings inside become special ids."""
        return [self.start, *self.tokenizer.encode(text, add_special_tokens=False), self.end]

    def decode(self, ids: list[int]) -> str:
        """Generated ids -> text as the official code gives it: up to an end or a second start marker.

        Special tokens stay, invalid UTF-8 is replaced, nothing is stripped or cleaned up.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.split(END_OF_TEXT)[0].split(START_OF_TEXT)[0]


def split_thought(text: str) -> tuple[str | None, str]:
    """(thought, answer) of a text in think mode; without a closing tag all of it is the answer."""
    found = re.match(r"\s*<think>(.*?)</think>\s*", text, flags=re.DOTALL)
    return (found[1].strip(), text[found.end() :]) if found else (None, text)
