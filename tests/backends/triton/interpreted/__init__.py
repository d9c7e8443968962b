"""Tests that need `TRITON_INTERPRET=1`; `../test_interpreted.py` runs them."""
