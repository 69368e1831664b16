"""A package that adds a method, a figure and a reader through entry points."""
