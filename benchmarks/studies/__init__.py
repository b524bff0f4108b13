"""The experiments of `study.py`, their results, and the tables made of them."""
