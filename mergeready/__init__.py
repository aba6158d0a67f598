"""Fine-tune experts that merge well: measure, steer and verify composability while you train."""

__version__ = "0.1.0"
