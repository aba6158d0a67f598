"""Adapters merged into an adapter: exact concatenation or compression in delta space, and the formats written."""

from mergeready.merging.adapters.merge import MergedAdapter, merge_adapters

__all__ = ["MergedAdapter", "merge_adapters"]
