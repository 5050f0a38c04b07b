"""Modules and functions that are followed by what they compute; see `fxstn.frontends.decompositions.registry`."""

from fxstn.frontends.decompositions import attention, recurrent
from fxstn.frontends.decompositions.registry import DECOMPOSITIONS, decomposes

__all__ = ["DECOMPOSITIONS", "attention", "decomposes", "recurrent"]
