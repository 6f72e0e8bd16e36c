"""How well a candidate does: `train` trains it."""
