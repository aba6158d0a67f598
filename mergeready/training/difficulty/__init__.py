"""Which examples are hard, what a run does to them, and what merging does to them afterwards."""
