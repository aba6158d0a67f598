"""Benchmarks of mergeready on real models and real data."""
