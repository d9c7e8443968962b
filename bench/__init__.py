"""Benchmarks against other attention implementations: `python -m bench`, from the repository root.

Data flows one way: `cases.toml` -> `cases` -> `inputs` -> `peers` -> `check` -> `calls` -> `timing`
-> `results`; `runner` drives it; `report`, with `tables`, and `plot` read what it wrote.
"""
