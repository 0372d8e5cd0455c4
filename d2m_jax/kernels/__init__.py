"""One function per operation that decides speed: a plain reference and the fast ways per
backend."""
