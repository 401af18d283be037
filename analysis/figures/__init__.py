"""Figures, each in two steps: what is shown, then how."""
