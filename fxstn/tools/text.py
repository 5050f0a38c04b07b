"""Word-level text: corpora by path or embedded, and windows of running text for truncated back-propagation."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxstn.ir.input_errors import as_path

END, UNKNOWN = "<eos>", "<unk>"


@dataclass(frozen=True)
class Corpus:
    """Three texts as numbers of words.

    train, valid, test: (words,) each.
    words: what the numbers stand for, the words of the training text and <unk>.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    words: tuple[str, ...]


def load(*paths: str | Path, most: int | None = None) -> Corpus:
    """A corpus of plain text. Words stand between white space, and <eos> stands at each end of a line.

    Words that the training text lacks become <unk>.

    paths: a training, a validation and a test file. Or one file: 80 % are for training, then 10 % for validation and 10 % for
        testing. Or none, for the reference texts that come with Python (`pydoc_data.topics`, PSF licence), split alike, in
        lower case, with every punctuation mark a word.
    most: how many words of the training text are used, from its start; None: all.

    Raises ValueError for another number of files, for a file that cannot be read, and for too short a text.
    """
    if len(paths) == 3:
        texts = [_words(_read(path)) for path in paths]
    elif len(paths) <= 1:
        words = _words(_read(paths[0])) if paths else _reference()
        ends = [int(share * len(words)) for share in (0, 0.8, 0.9, 1)]
        texts = [words[a:b] for a, b in itertools.pairwise(ends)]
    else:
        raise ValueError(f"give one file, or a training, a validation and a test file; got {len(paths)}")
    texts[0] = texts[0][:most]
    for text, path in zip(texts, paths if len(paths) == 3 else [*paths, "the text"] * 3, strict=False):
        if len(text) < 2:
            raise ValueError(f"{path} has {len(text)} words, too few for a training, a validation and a test text")
    counts = Counter(texts[0])
    known = sorted(counts, key=lambda word: (-counts[word], word))
    known += [UNKNOWN] if UNKNOWN not in counts else []
    number = {word: i for i, word in enumerate(known)}
    train, valid, test = (torch.tensor([number.get(word, number[UNKNOWN]) for word in text]) for text in texts)
    return Corpus(train, valid, test, tuple(known))


def _read(path: str | Path) -> str:
    try:
        return as_path(path, "text").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable text in UTF-8: {error}; give the path of a text file") from error


def _words(text: str) -> list[str]:
    return [word for line in text.splitlines() for word in (*line.split(), END)]


def _reference() -> list[str]:
    from pydoc_data.topics import topics

    lines = "\n".join(topics[name] for name in sorted(topics)).lower().splitlines()
    return [word for line in lines if line.strip() for word in (*re.findall(r"\w+|[^\w\s]", line), END)]


class Windows:
    """Batches (words, next words), (rows, length) each, of a text that is cut into rows of equal length.

    Row i of a batch goes on where row i of the batch before ended. The last batch may be shorter. Words at the end of the text
    that do not fill all rows are left out.

    text: (words,).
    rows: number of rows, read side by side.
    length: words of a row in one batch.

    Raises ValueError where the text is too short for one word and the next in each row.
    """

    def __init__(self, text: Tensor, rows: int, length: int) -> None:
        columns = (len(text) - 1) // rows if rows > 0 else 0
        if columns < 1 or length < 1:
            raise ValueError(f"a text of {len(text)} words gives no windows of {rows} rows and length {length}")
        self.words, self.next = (text[i : i + rows * columns].view(rows, columns) for i in (0, 1))
        self.length = length

    def __len__(self) -> int:
        return -(-self.words.shape[1] // self.length)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.words.shape[1], self.length):
            columns = slice(start, start + self.length)
            yield self.words[:, columns], self.next[:, columns]
