"""Solvers: statistics and dense weights of one layer in, its factors out. Pure, no files."""
