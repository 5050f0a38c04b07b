"""The tables in which blocks of pages register rules, decompositions and operations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fxstn import hp
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.torchvision import AUGMENTING, OWNERS, RANDOM
from fxstn.rules import RULES
from fxstn.rules.own import _OWN


@contextmanager
def tables_restored() -> Iterator[None]:
    """What is registered inside is gone afterwards, and so is what is put among the modules."""
    tables: list[Any] = [RULES, DECOMPOSITIONS, RANDOM, AUGMENTING, OWNERS, hp.OPERATIONS, _OWN]
    before, modules = [table.copy() for table in tables], set(sys.modules)
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        for name in set(sys.modules) - modules:
            if name == "their_library":
                del sys.modules[name]
