"""Strings that tokenizers disagree about: scripts, marks, emoji, spaces, specials, lengths."""

# ruff: noqa: RUF001 (letters that look alike are the point)

from __future__ import annotations

SCRIPTS = (
    """
a cat|the red circle|A PHOTO OF A DOG|two cats and a remote on a blanket|naïve café façade
Ærøskøbing
Привет, мир|Ελληνικά Σίσυφος ΟΔΟΣ|עברית|السلام عليكم|हिन्दी में|ภาษาไทย
日本語のテキスト|中文字符|한국어 문장|ქართული
Հայերեն|አማርኛ|ᚠᚢᚦᚨᚱᚲ|𝔘𝔫𝔦𝔠𝔬𝔡𝔢|𝟘𝟙𝟚𝟛|①②③|Ⅷ ⅷ|½ ¾ ⅓|x² y³|١٢٣|१२३|〇一二三
İstanbul ıI|STRASSE straße ẞ|ǅ ǆ Ǆ|ﬁ ﬂ ﬃ|Å Å Å|K vs K|ŉ|ΐ|ﬆ|ϴ θ|Ω ω Ω|Σ ς σ ΑΣ. ΑΣΑ
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
CONTRACTIONS = [
    f"{left}{mark}{end}{right}"
    for mark in ("'", "’")
    for end in ("s", "t", "re", "ve", "m", "ll", "d", "LL", "x", "")
    for left, right in (("don", ""), ("", ""), ("I", " go"), ("A", "s"))
]
PUNCTUATION = [
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    *(mark * 3 for mark in "!?.-'\"</>|"),
    "...!?...",
    "a.b,c;d",
    "e-mail: x@y.z",
    "(a)[b]{c}",
    "100%",
    "$9.99",
    "C++ & C#",
    "--flag=1",
    "''''ss",
    "'s's't",
    "“quoted” «text» „this“",
    "a—b–c‐d",
    "†‡•…‰",
    "€£¥₿",
    "snake_case",
    "a/b\\c",
    "1,000.5e-7",
    "3.14 2023-01-01 12:30",
    "0123456789",
    "b2b 4x4 h2o",
]
SPACES = [
    "",
    " ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    " a",
    "a ",
    "  a   b  ",
    "a\tb\nc\rd\fe\vf",
    "a\u00a0b",
    "\u00a0",
    "a\u2003b\u2009c\u3000d",
    "a\u200bb\u200cc\u200dd",
    "\ufeffbom",
    "a\u2028b\u2029c",
    "a\u0085b",
    "a\u1680b\u180ec",
    "soft\u00adhyphen",
    "a\x1cb\x1dc\x1ed\x1fe",
]
CONTROLS = ["\x00", "a\x00b", *(f"x{chr(code)}y" for code in (1, 7, 8, 0x1B, 0x7F, 0x80, 0x9F))]
CONTROLS += ["\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "a\u202eb\u202c", "\u061c"]
MARKS = [
    "e\u0301",
    "é",
    "a\u0300\u0301\u0302",
    "\u0301",
    "n\u0303o",
    "Z̴̛͙a̶l̵g̷o",
    "\u1100\u1161\u11a8",
    "각",
    "ᾳ\u0345",
    "\u0344",
    "q\u0307\u0323",
    "q\u0323\u0307",
    "i\u0307",
    "I\u0307",
    "क\u093c",
    "க்ஷ",
]
EMOJI = [
    "😀",
    "😀😀😀",
    "cat😀dog",
    "👍🏽",
    "👨‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇩🇪🇫🇷",
    "❤️ ❤",
    "#️⃣ 1️⃣",
    "🧑🏿‍🚀 in space",
    "☃ ☂︎ ☂️",
    "\u200d",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
]
SPECIALS = [
    "<|endoftext|>",
    "<|endoftext|> cat",
    "a cat <|endoftext|> a dog",
    "a<|endoftext|>b",
    "<|startoftext|>",
    "<|startoftext|>a cat<|endoftext|>",
    "<|startoftext|><|startoftext|><|endoftext|>",
    "<|ENDOFTEXT|> <|StartOfText|>",
    "<|endoftext|",
    "|endoftext|>",
    "< |endoftext| >",
    "<|end\u200boftext|>",
    "<|endoftext|>" * 90,
    "</w>",
    "a</w>",
    "a </w> b</W>",
    "[PAD] [UNK] <pad> <unk> <s>",
    "!",
    "! !! a!b",
    "&amp; &lt;b&gt; &#39; &nbsp; &quot;",
    "<b>bold</b><br/>",
]
LONG = [
    "cat " * 200,
    " ".join(f"word{i}" for i in range(200)),
    "a" * 5000,
    "é" * 300,
    "猫" * 500,
    "1" * 300,
    "-" * 1000,
    "'s" * 200,
    "ab" * 2000 + " end",
    "the " * 74 + "cat",
    "the " * 75 + "cat",
    "the " * 76 + "cat",
    "😀" * 100,
]
WORDS = [
    f"{adjective} {noun}"
    for adjective in ("Old", "photograph of a", "my very own", "NOT a", "one half-eaten")
    for noun in ("bicycle", "wind-turbine", "T-shirt's label", "crème brûlée", "x-ray no. 7")
]
STRINGS = [
    *SCRIPTS,
    *CONTRACTIONS,
    *PUNCTUATION,
    *SPACES,
    *CONTROLS,
    *MARKS,
    *EMOJI,
    *SPECIALS,
    *LONG,
    *WORDS,
]
