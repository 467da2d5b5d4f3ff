"""What an attacker does with released weights: merging methods, one file each, and a live model.

An attacker has the released files and the public base, so nothing here imports `protecting`.
"""
