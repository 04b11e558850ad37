"""Each algorithm, through the C API with explicit times, against a model of its definition."""
