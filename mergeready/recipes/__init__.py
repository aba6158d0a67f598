"""Recipes: training runs as data. The schema is here; the recipes themselves are in the top-level ``recipes/``."""

from mergeready.recipes.recipe import Recipe, json_schema, parse_recipe, read_recipe

__all__ = ["Recipe", "json_schema", "parse_recipe", "read_recipe"]
