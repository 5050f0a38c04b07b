"""Rung 3: the original forward runs as it is, with tangents carried beside it."""
