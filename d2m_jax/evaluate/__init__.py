"""What a model is worth: scores on the embedded task, errors, latency, routing."""
