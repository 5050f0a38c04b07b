"""The live frontend: the original forward runs as it is, with tangents carried beside it."""
