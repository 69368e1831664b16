"""A package that adds a method, a figure, an observer and a reader through entry points."""
