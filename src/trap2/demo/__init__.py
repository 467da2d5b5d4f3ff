"""A whole round of protecting, merging, attacking and auditing on a real model, offline."""
