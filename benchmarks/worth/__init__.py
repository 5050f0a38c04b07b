"""Is tuning in one run worth it, against what a practitioner would do instead? docs/results/worth.md."""
