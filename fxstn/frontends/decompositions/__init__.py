"""Decompositions: what tracing cannot look into, written out as operations. A new decomposition goes into one of these."""

from fxstn.frontends.decompositions import attention, recurrent
from fxstn.frontends.decompositions.registry import DECOMPOSITIONS, decomposes

__all__ = ["DECOMPOSITIONS", "attention", "decomposes", "recurrent"]
