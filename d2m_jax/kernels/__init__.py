"""One function per operation that decides speed: a reference and the fast ways per backend."""
