"""Numbers and foreign strings as text: formats and escaping."""
