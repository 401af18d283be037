"""The results table and what can be concluded from it."""
