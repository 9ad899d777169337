"""An example: layers are removed at equal distances."""
