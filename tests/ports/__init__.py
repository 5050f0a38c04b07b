"""Training scripts of the shapes that people have, on tiny data, and the few lines of each that `fxstn.tune` takes.

A script runs as it stands. In its tuned form, a line that is only the comment `# fxstn: CODE` is CODE, and a line that ends in
`# fxstn: CODE` is CODE instead. So the comments of a script are its port, and their number is what the port costs.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
SCRIPTS = ("mnist", "imagenet", "nanogpt", "cifar", "word_language_model", "references", "timm_train")
_PORT = re.compile(r"^( *)(?:.*\S  )?# fxstn: (.*)$", re.MULTILINE)


def source(script: str) -> str:
    return (HERE / f"{script}.py").read_text(encoding="utf-8")


def changed_lines(script: str) -> list[str]:
    """The lines that the port adds to a script, or changes."""
    return [code for _, code in _PORT.findall(source(script))]


def plain(script: str) -> ModuleType:
    """The script as it stands, executed anew."""
    return _module(script, source(script))


def tuned(script: str) -> ModuleType:
    """The script with the lines of its port, executed anew."""
    return _module(script, _PORT.sub(r"\1\2", source(script)))


def _module(script: str, text: str) -> ModuleType:
    module = ModuleType(f"{__name__}.{script}")
    module.__file__ = str(HERE / f"{script}.py")
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module
