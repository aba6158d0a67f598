"""Merging: one short file a method, one registry, engines on disk, in memory and in a live model."""

from mergeready.merging import (  # noqa: F401 - each registers its methods
    average,
    breadcrumbs,
    consensus,
    core_space,
    dare,
    della,
    fisher,
    iso_c,
    iso_cts,
    knots,
    model_stock,
    pcb,
    regmean,
    sce,
    slerp,
    svc,
    task_arithmetic,
    ties,
    tsv_m,
    wudi,
)
from mergeready.merging.adapters import MergedAdapter, merge_adapters
from mergeready.merging.api import merge
from mergeready.merging.folders import merge_folders
from mergeready.merging.in_place import MergedInPlace
from mergeready.merging.method import ElementwiseMethod, MatrixMethod, MergeMethod, Place
from mergeready.merging.plan import MergePlan, merge_plan
from mergeready.merging.registry import make_method, method_class, method_names, register

__all__ = [
    "ElementwiseMethod",
    "MatrixMethod",
    "MergeMethod",
    "MergePlan",
    "MergedAdapter",
    "MergedInPlace",
    "Place",
    "make_method",
    "merge",
    "merge_adapters",
    "merge_folders",
    "merge_plan",
    "method_class",
    "method_names",
    "register",
]
