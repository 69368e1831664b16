"""Figures as data, and the two backends that draw them."""
