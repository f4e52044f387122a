"""Readers of the benchmarks' official folders. `registry.open_dataset` opens one by name."""
