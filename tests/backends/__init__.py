"""Tests of one backend each; what holds for every backend is in `tests/conformance`."""
