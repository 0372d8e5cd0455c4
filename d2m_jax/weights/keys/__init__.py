"""Which tensor of which layout is which parameter."""
