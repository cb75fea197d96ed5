"""Training procedures: they combine models, data and ops."""
