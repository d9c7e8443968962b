"""The backends, one package each, listed in `order.txt`; none imports another (`README.md`)."""
