"""A study: its axes, its file, its plan, and what it will take."""
