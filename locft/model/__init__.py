"""The model: loading it, what its parts are called, where it can be edited, and what an edit changes."""
