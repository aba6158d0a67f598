"""Tasks, backbones and heads of the benchmarks, fetched from public package registries."""
