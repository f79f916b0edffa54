"""Comparing recipes: a grid of runs, what remains of them, and the tables and figures they give."""
