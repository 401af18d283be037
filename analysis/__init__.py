"""Analysis of a study: pure functions over a results table, figures and the report."""
