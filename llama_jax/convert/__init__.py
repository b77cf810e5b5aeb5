"""Weights and settings of other code bases, both ways."""
