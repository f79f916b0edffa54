"""Mixed precision: how sensitive each layer is, and which bits it gets within a budget."""
