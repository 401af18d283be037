"""Figures, most of them in two steps: what is shown, then how."""
