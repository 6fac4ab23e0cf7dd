"""Everything about text, above the engine and below the server: templates, tokens, exact streaming, stop strings."""
