"""Studies: what training, stopping and merging do to each other, over many cells that are computed once and kept."""
