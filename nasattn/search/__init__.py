"""The search: one Optuna study in one database, and the loop that fills it."""
