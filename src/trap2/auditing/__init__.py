"""Judging a release: a tuned attacker against it and against its control, and a record of it."""
