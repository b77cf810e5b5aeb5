"""Comparisons of objectives: grids, what makes them fair, running them, their results."""
