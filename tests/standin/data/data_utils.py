"""Stand-in for the official file of this name."""


def pil_img2rgb(image):
    return image.convert("RGB")


def add_special_tokens(tokenizer):
    names = {
        "bos_token_id": "<|im_start|>",
        "eos_token_id": "<|im_end|>",
        "start_of_image": "<|vision_start|>",
        "end_of_image": "<|vision_end|>",
    }
    return tokenizer, {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}, 0
