"""Instruments that measure what an update buys and costs, on the base model and rows of text."""
