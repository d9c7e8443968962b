"""The suite tests itself: its cases, its yardstick, and mutants of the reference that it kills."""
