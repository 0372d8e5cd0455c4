"""What a model is worth and what it costs: scores, accounting, routing, the report."""
