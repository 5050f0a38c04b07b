"""Tools around a network: explain, verify, report, show, benchmarks, data, and the command line."""
