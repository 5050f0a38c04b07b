"""Benchmarks against known answers and against plain training; each file is a script with --help."""
