"""The tests; a package so that the suite's own tests can import the suite."""
