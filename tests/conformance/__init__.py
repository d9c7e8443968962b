"""The conformance suite: every backend against every case of `spec/cases`.

    case ── inputs ──┬── oracle  float64 reference            ─┐
                     ├── eager   textbook, dtype of the inputs ─┼── compare  N1
                     └── calls   the public API of a backend   ─┘

Nothing here knows a backend by its name.
"""
