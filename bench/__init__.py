"""Benchmarks against other attention implementations: `python -m bench`, from the repository root.

Data flows one way: `cases.toml` -> `cases` -> `inputs` -> `peers` -> `check` -> `timing` ->
`results`; `runner` drives it, `report` and `plot` read what it wrote.
"""
