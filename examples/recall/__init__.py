"""Multi-query associative recall with dense, sliding-window and dynamic-mask attention.

`python -m examples.recall`, from the root of the repository; `examples/README.md` says the rest.
"""
