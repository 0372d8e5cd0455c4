"""From a run directory to its page: measurements, comparisons, tables, pictures."""
