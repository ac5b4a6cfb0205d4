"""A run as one HTML page: results, learning curves, and where mixtures send their tokens."""
