"""Training objectives: teacher and student in lockstep, and flow matching from scratch."""
