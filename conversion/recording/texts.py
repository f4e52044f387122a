"""Thousands of texts for a case about the tokenizer: sentences, and what a tokenizer may stumble over."""

import random

SUBJECTS, VERBS, PLACES = (
    words.split()
    for words in (
        "dog cat man woman zebra panda lizard car red bus child's kite bird boat horse truck monkey fish",
        "running jumping eating turning standing flying swimming chasing that moves which falls being",
        "left right back front middle of the frame behind it in water on grass near a tree with white tail",
    )
)
ENDS = ("", ".", "?", "!", "...", " ", "  ", "\n", "?!")
# code points that are drawn from; some join to others, some have two spellings
BLOCKS = (
    (0x20, 0x7E),
    (0xA0, 0xFF),
    (0x100, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x4FF),
    (0x590, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x1100, 0x11FF),
    (0x1E00, 0x1EFF),
    (0x2000, 0x206F),
    (0x2100, 0x21FF),
    (0x3000, 0x30FF),
    (0x4E00, 0x4FFF),
    (0xAC00, 0xACFF),
    (0xFE00, 0xFE0F),
    (0xFF00, 0xFFEF),
    (0x1F300, 0x1F64F),
    (0x1F900, 0x1F9FF),
)
SPACES = (" ", "  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\u00a0", "\u2003", "\u3000")
WORDS = (
    *("it's", "IT'S", "we'll", "I'd've", "they\u2019re", "'s", "don't", "O'Neill's", "1st", "x2", "3.14", "1,000,000"),
    *("2026-11-30", "50%", "#1", "e.g.", "a/b", "C++", "http://a.b/c?d=e&f", "snake_case", "camelCase", "ALLCAPS"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[SEG]", "[seg]", "[SEG][SEG]", "(0) [SEG],", "<image>", "<|x|>"),
    *("e\u0301", "\u00e9", "\ufb01", "\u212b", "\u1100\u1161", "\U0001f469\u200d\U0001f680", "\U0001f1fa\U0001f1f8"),
    *("\u200b", "\ufeff", "\u0000", "\u007f", "''", '""', "--", "__", "((", "\\n", "{}", "0" * 12, "ab" * 30),
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts, none twice: a third sentences, a third words that are easily got wrong, a third drawn characters."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        kind = len(found) % 3
        if kind == 0:
            words = [draw.choice(SUBJECTS), draw.choice(VERBS), *draw.choices(PLACES, k=draw.randint(0, 6))]
            text = " ".join(("the", *words)) + draw.choice(ENDS)
            text = draw.choice((str, str.upper, str.title))(text)
        elif kind == 1:
            pieces = draw.choices(WORDS + tuple(SUBJECTS), k=draw.randint(1, 6))
            text = "".join(piece + draw.choice((*SPACES, "", "")) for piece in pieces)
        else:
            blocks = draw.choices(BLOCKS, k=draw.randint(1, 4))
            text = "".join(chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(1, 24)))
        found[text] = None
    return list(found)
