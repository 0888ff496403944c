"""Texts that tokenizers stumble over."""

from __future__ import annotations

import random

AWKWARD = (
    "",
    " ",
    "Hello world",
    " lead",
    "trail  ",
    "a  5\n\n1. x\t\r\n\n\n  y",
    "0123456789 12 345.67 1,000",
    "def f(x):\n    return x + 1\n\n\n",
    "日本語テキスト、中文字符 한국어 ไทย हिन्दी",
    "🙂👩‍👩‍👧‍👦 emoji 🏳️‍🌈 e\u0301 é ﬁ Ａ \u00a0\u2003",
    "مرحبا שלום",
    "I'm you're they'll WE'VE 'tis",
    "\x00\x01\x7f\ufffd\ufeff",
    "▁ under Ġ char Ċ <0x41> <unk>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x<|endoftext|>y <|im_start <s> </s>",
    "a" * 300,
)
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "   ", "\n\n", "12", "▁")


def awkward_texts(count: int, seed: int = 0) -> list[str]:
    """AWKWARD and `count` random mixtures of it with characters from all over Unicode."""
    chance = random.Random(seed)
    ranges = ((32, 127), (0xA0, 0x2FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD7FF))
    pool = "".join(AWKWARD) + "".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(2000))
    texts = list(AWKWARD)
    for _ in range(count):
        length = chance.randrange(1, 60)
        texts.append(
            "".join(chance.choice(_SPECIAL) if chance.random() < 0.1 else chance.choice(pool) for _ in range(length))
        )
    return texts
