"""The joiner: the only place that knows more than one room."""
