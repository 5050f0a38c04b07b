"""Is tuning in one run worth it, against what a practitioner would do instead? `python -m benchmarks.worth`, docs/worth.md."""
