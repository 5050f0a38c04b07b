"""How easy README and guides are to read: `python docs/tools/readability.py [FILES]`. No gate.

Flesch reading ease (Flesch 1948): 206.835 - 1.015 words per sentence - 84.6 syllables per word. 60 is plain English, 30 is a
paper. Code, tables, headings and links' addresses are left out; code in a sentence counts as one word of one syllable.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("start", "guides", "concepts", "about")
LONG = 35  # words of a sentence


def prose(text: str) -> list[str]:
    """Paragraphs and entries of lists, as plain text."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(#|\|| {4}|:::|!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "Code", text)
    text = re.sub(r"[*]", "", text)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n\s*(?:-|\d\.) ", text) if part.strip()]


def sentences(text: str) -> list[str]:
    parts = [sentence for part in prose(text) for sentence in re.split(r"(?<=[.?!:])\s+(?=[A-Z0-9\"(λΘσεw])", part)]
    return [part for part in parts if len(words(part)) > 1]


def words(sentence: str) -> list[str]:
    return re.findall(r"[A-Za-z][A-Za-z'’-]*", sentence)


def syllables(word: str) -> int:
    """Groups of vowels, without a silent e at the end."""
    word = word.lower()
    count = len(re.findall(r"[aeiouy]+", word))
    silent = (word.endswith("e") and not word.endswith(("le", "ee"))) or re.search(r"[^td]ed$", word)
    return max(1, count - bool(silent and count > 1))


def reading_ease(text: str) -> float:
    found = sentences(text)
    counted = [word for sentence in found for word in words(sentence)]
    return 206.835 - 1.015 * len(counted) / len(found) - 84.6 * sum(map(syllables, counted)) / len(counted)


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    files = files or [
        ROOT / "README.md",
        *(path for room in ROOMS for path in sorted((ROOT / "docs" / room).glob("*.md"))),
    ]
    for path in files:
        text = path.read_text(encoding="utf-8")
        if not sentences(text):
            continue
        print(f"{reading_ease(text):5.0f}  {path}")
        for sentence in sentences(text):
            if len(words(sentence)) > LONG:
                print(f"       {len(words(sentence))} words: {sentence}")


if __name__ == "__main__":
    main()
