"""Each algorithm, through the public C API with explicit times, against a model of its definition."""
