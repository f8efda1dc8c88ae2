"""Recipes: settings of whole runs, as YAML."""
