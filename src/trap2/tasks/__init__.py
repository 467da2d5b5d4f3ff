"""What a model is asked to do: labelled rows, a head, and how well it does."""
