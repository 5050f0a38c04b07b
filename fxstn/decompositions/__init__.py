"""Modules and functions that are followed by what they compute; see `fxstn.decompositions.registry`."""

from fxstn.decompositions import attention, recurrent
from fxstn.decompositions.registry import DECOMPOSITIONS, decomposes

__all__ = ["DECOMPOSITIONS", "attention", "decomposes", "recurrent"]
