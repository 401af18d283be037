"""The `locft` command."""
