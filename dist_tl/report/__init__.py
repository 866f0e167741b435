"""Reports of finished runs: results table, verdict, and a self-contained HTML report."""
