"""The run: what to measure when, what to keep, when to stop. Knows modules, no training framework."""
