"""Other programs' training loops and data, joined to nlpinf."""
