"""The paper's experiments (Bae & Grosse 2020): python -m benchmarks.paper --help."""
