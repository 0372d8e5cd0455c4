"""What a run would need on chips that need not be there: compilation, collectives, a roofline."""
