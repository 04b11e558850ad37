"""Texts of many kinds, for whatever counts tokens, and the encodings that are at hand."""

from __future__ import annotations

import functools
import random

from fast_litellm_shm import EncodingUnavailableError
from fast_litellm_shm.tokens import encoding

CORPUS = {
    "empty": "",
    "one letter": "a",
    "space": " ",
    "newlines": "\n\n\r\n\n \t\n",
    "nul": "a\0b\0",
    "english": "The quick brown fox doesn't jump over the lazy dog; it's 12,345.67 metres away. "
    * 9,
    "german": "Fünf süße Bären äßen größere Nüsse, während der Straßenbahnfahrer übte. " * 7,
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 7,
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. " * 7,
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق. " * 6,
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה. " * 6,
    "hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले। " * 6,
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน " * 6,
    "chinese": "我能吞下玻璃而不伤身体。天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。" * 8,
    "japanese": "いろはにほへと ちりぬるを わかよたれそ つねならむ。カタカナと漢字。" * 8,
    "korean": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. " * 6,
    "tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம். " * 6,
    "georgian": "გთხოვთ ახლავე გაიაროთ რეგისტრაცია. " * 6,
    "emoji": "👍🏽👩‍👩‍👧‍👦🏳️‍🌈 ok 🇩🇪🤖🫠 " * 9,
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!͖̬̰̙̗̿̋ͥͥ̂ͣ̐́́͜͞ " * 4,
    "mathematical": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), 𝔸𝕓𝕔 𝒳𝓎𝓏 ½¾⅚ ²³" * 5,
    "python": "def f(x: int) -> int:\n    return [i ** 2 for i in range(x)][-1]  # tail\n\n\n" * 8,
    "c": "static inline int max(int a, int b) {\n\treturn a > b ? a : b; /* 0xdeadbeef */\n}\n" * 8,
    "json": '{"a": [1, 2.5e-10, null, true], "b": {"c": "\\u00e9\\n"}}\n' * 9,
    "html": '<div class="x" data-y=\'1\'><a href="https://e.org/?q=1&amp;r=2#z">t</a></div>' * 8,
    "base64": "dGhlIHF1aWNrIGJyb3duIGZveCBqdW1wcyBvdmVyIHRoZSBsYXp5IGRvZw==" * 12,
    "digits": "3141592653589793238462643383279502884197169399375105820974944592" * 9,
    "one letter repeated": "a" * 3000,
    "spaces": " " * 1500 + "x" + "\t" * 700,
    "special tokens": "<|endoftext|><|endofprompt|> <|fim_prefix|>x <|start|>user<|end|>",
    "half a special token": "<|endoftext <|endo|> |endoftext|>",
    "lone surrogates": "\ud800 a \udfff\udc00b \ud83d" * 3,
    "a pair of surrogates": "\ud83d\ude00 and 😀",
    "astral": "".join(map(chr, range(0x1F600, 0x1F650))),
    "non-characters": "\ufffe\uffff\U0010ffff\ufeff",
}


def random_text(seed: int, length: int) -> str:
    """Characters of all planes and of a few words, the same for the same seed."""
    rng = random.Random(seed)
    words = [word for text in CORPUS.values() for word in text.split(" ")]
    parts: list[str] = []
    size = 0
    while size < length:
        odd = rng.random() < 0.1
        part = chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) if odd else " "
        parts.append(part if odd else part + rng.choice(words))
        size += len(parts[-1])
    return "".join(parts)[:length]


@functools.cache
def encodings_at_hand() -> tuple[str, ...]:
    """Those that can be loaded here: without litellm or a filled TIKTOKEN_CACHE_DIR, none."""
    found = []
    for name in sorted(set(encoding.names()) - {"gpt2"}):  # gpt2 is r50k_base
        try:
            encoding.load(name)
        except EncodingUnavailableError:
            continue
        found.append(name)
    return tuple(found)


WHY_NOT = "no tiktoken file here: install litellm (the extra `litellm`), or set TIKTOKEN_CACHE_DIR"
